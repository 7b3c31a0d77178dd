"""Fit where the lexicon of deescal.lexicon begins to say yes, and measure it:
python bench/features.py <folder of released transcripts> [--write]

Gold: data/gold/features.csv, what two readers said of the 30 features of a scenario, by salted hash, so the folder is
needed to use it. Prints for each feature how far the readers agree and, cross-validated (scenarios dealt into folds),
what the lexicon finds of it; with --write fits on all of it and writes deescal/lexicon_rules.csv and what was measured,
data/gold/features.json.
"""
import argparse
import csv
import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import KFold
from statsmodels.stats.proportion import proportion_confint

from _shared import read_gold, read_turns, script
from deescal.engine.errors import InputError
from deescal.engine.files import project_root, write_text
from deescal.features import read_guide
from deescal.filteraudit import corrected_prevalence, gold_counts
from deescal.lexicon import (
    LEXICON_RULES, RULES_CSV, apply_rules, feature_scores, lexicon_hits, read_lexicon)
from deescal.roles import assign_roles
from deescal.selectionrules import SELECTION_RULES, feature_columns, judge_videos

SALT, GOLD, MEASURED, FOLDS = "deescal features 2026", "data/gold/features.csv", "data/gold/features.json", 10
POLICE = "police_identified_by_role police_commands_present id_request_event legal_procedure_language"
BELOW = {"no_police_presence": POLICE, "no_conversation_detected": "conversation_present"}  # yes where little is said
SLOPES = np.r_[0, np.geomspace(.1, 40, 40)].round(2)
NAMES = [f.feature for f in read_guide()]


def gold_key(file): return hashlib.sha256(f"{SALT}\0{file.rsplit('/', 1)[-1]}".encode()).hexdigest()[:24]


def mcc(yes, truth):
    "Matthews correlation of booleans, for many thresholds at once: `yes` (thresholds, n), `truth` (n,)."
    tp, fp = (yes & truth).sum(1).astype(float), (yes & ~truth).sum(1).astype(float)
    fn, tn = (~yes & truth).sum(1).astype(float), (~yes & ~truth).sum(1).astype(float)
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(below > 0, (tp * tn - fp * fn) / np.maximum(below, 1e-9), 0)


def fit(yes, truth):
    """Position of the slope whose answers `yes` (slopes, n) correlate most with what the readers said (readers, n);
    the middle one of equals."""
    found = np.mean([mcc(yes, t) for t in truth], axis=0)
    ties = np.flatnonzero(found >= found.max() - 1e-12)
    return int(ties[len(ties) // 2]) if found.max() > 0 else 0


def ratio(a, b): return round(float(a / b), 3) if b else None


def figures(yes, truth):
    "Against each reader in turn, the mean: precision, recall, specificity, kappa."
    tp, n_yes = np.mean([(yes & t).sum() for t in truth]), yes.sum()
    n_true, n_false = np.mean([t.sum() for t in truth]), np.mean([(~t).sum() for t in truth])
    tn = np.mean([(~yes & ~t).sum() for t in truth])
    kappas = [cohen_kappa_score(yes, t) for t in truth if len({*yes, *t}) > 1]
    return {"precision": ratio(tp, n_yes), "recall": ratio(tp, n_true), "specificity": ratio(tn, n_false),
            "kappa": round(float(np.mean(kappas)), 3) if kappas else None}


def held_out(yes, truth):
    "What a slope that was fitted on the other folds says of each scenario: (n,) bool."
    out = np.zeros(truth.shape[1], bool)
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(out):
        out[test] = yes[fit(yes[:, train], truth[:, train]), test]
    return out


def of_rules(ids, labels, said, wide):
    """How much of the release each selection rule keeps: by the readers, with Wilson's interval, and by the lexicon,
    raw and with its errors corrected for, against one reader and the other.

    The correction takes the gold for a sample beside the release, whose part it is, and the fitted rules for as good
    as those by folds that judged the gold; both are close, neither is exact."""
    def sides(bits): return pl.DataFrame({"video_id": ids} | {n: bits[:, i] for i, n in enumerate(NAMES)})
    for rule in SELECTION_RULES:
        first, second, mine = (judge_videos(sides(b), rule)["kept"].to_numpy() for b in (*labels, said))
        kept = judge_videos(wide, rule)["kept"]
        print(f"rule {rule}: readers keep {first.sum()} and {second.sum()} of {len(ids)} (kappa "
              f"{cohen_kappa_score(first, second):.3f}), the lexicon {kept.sum()} of {len(kept)}")
        for name, reader in (("first", first), ("second", second)):
            low, high = proportion_confint(reader.sum(), len(ids), method="wilson")
            true = corrected_prevalence(int(kept.sum()), len(kept), gold_counts(reader, mine)).row(0, named=True)
            print(f"  {name} reader {reader.mean():.3f} [{low:.3f}, {high:.3f}]; lexicon corrected by it "
                  f"{true['estimate']:.3f} [{true['low']:.3f}, {true['high']:.3f}] (sensitivity "
                  f"{true['sensitivity']:.3f}, specificity {true['specificity']:.3f})")


def read_labels(turns, gold_file, folder):
    "(video ids in order, labels of two readers: (2, scenarios, features)) of the scenarios that the gold knows."
    gold, files = read_gold(gold_file), turns.group_by("scenario_id", maintain_order=True).agg(pl.col("file").first())
    known = [(s, gold[gold_key(f)]) for s, f in files.rows() if gold_key(f) in gold]
    if len(known) < 2 * FOLDS:
        raise InputError(f"{len(known)} scenarios of this folder are in the gold, {2 * FOLDS} are needed", f"{folder}, {gold_file}",
                         "give the folder that the gold was made from, as released: the key holds the files' names")
    def bits(text):
        if len(text) != len(NAMES) or set(text) - {"0", "1"}:
            raise InputError(f"a label has {len(text)} bits, not {len(NAMES)} of 0 and 1", gold_file, "mend this row")
        return [c == "1" for c in text]
    return [s for s, _ in known], np.array([[bits(r[who]) for _, r in known] for who in ("first", "second")])


def main(folder, gold_file, write):
    turns = assign_roles(read_turns(folder)).select("scenario_id", "turn", "file", "role", "text")
    ids, labels = read_labels(turns, Path(gold_file or project_root() / GOLD), folder)
    lines = turns.select("role", "text", video_id="scenario_id", line="turn")
    agree = {n: figures(labels[0, :, i], labels[1:, :, i]) for i, n in enumerate(NAMES)}
    rows, measured = [], []
    said = np.zeros(labels[0].shape, bool)
    for kind in ("text", "roles"):
        given = lines if kind == "roles" else lines.drop("role")
        start = time.perf_counter()
        scores = feature_scores(given, lexicon_hits(given, read_lexicon()))
        print(f"{kind}: {lines['video_id'].n_unique()} scenarios in {time.perf_counter() - start:.1f} s")
        wide = pl.DataFrame({"video_id": ids}).join(
            scores.pivot("feature", index=["video_id", "words"], values="score"), on="video_id", maintain_order="left")
        growth = np.sqrt(wide["words"].to_numpy() / 1000)
        for i, name in enumerate(NAMES):
            adds, side = BELOW.get(name, name), "below" if name in BELOW else "at_least"
            base = 0.5 if side == "below" else 1.5
            score = wide.select(pl.sum_horizontal(adds.split())).to_series().to_numpy()
            yes = (score[None] >= base + SLOPES[:, None] * growth) ^ (side == "below")
            truth, best = labels[:, :, i], SLOPES[fit(yes, labels[:, :, i])]
            said[:, i] = held_out(yes, truth)
            rows.append((name, kind, adds, side, base, best))
            measured.append({"feature": name, "input": kind, "prevalence": round(float(truth.mean()), 3),
                             "readers_kappa": agree[name]["kappa"]} | figures(said[:, i], truth))
    print(f"{len(ids)} scenarios, two readers\n{'feature':42}{'input':7}{'says yes':>9}{'readers':>9}"
          f"{'kappa':>8}{'precision':>11}{'recall':>8}{'specificity':>13}")
    def show(x): return "-" if x is None else f"{x:.3f}"
    for m in measured:
        print(f"{m['feature']:42}{m['input']:7}{show(m['prevalence']):>9}{show(m['readers_kappa']):>9}"
              f"{show(m['kappa']):>8}{show(m['precision']):>11}{show(m['recall']):>8}{show(m['specificity']):>13}")
    for kind in ("text", "roles"):
        known = [m["kappa"] for m in measured if m["input"] == kind and m["kappa"] is not None]
        print(f"mean kappa, lexicon to reader, {kind}: {np.mean(known):.3f}")
    between = [a["kappa"] for a in agree.values() if a["kappa"] is not None]
    print(f"mean kappa, reader to reader: {np.mean(between):.3f}")
    rules = pl.DataFrame(rows, schema=LEXICON_RULES, orient="row").filter(input="roles")  # of which `scores` are now
    of_rules(ids, labels, said, feature_columns(apply_rules(scores, rules)))
    if write:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([LEXICON_RULES, *rows])
        write_text(RULES_CSV, out.getvalue())
        made = {"scenarios": len(ids), "features": measured}
        write_text(project_root() / MEASURED, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="released transcripts")
    parser.add_argument("--gold", help=f"labels; {GOLD} by default")
    parser.add_argument("--write", action="store_true", help="write the rules and what was measured")
    args = parser.parse_args()
    script(main, args.folder, args.gold, args.write)
