"""Fit the weights of deescal.roles and measure them: python bench/roles.py <folder of released transcripts> [--write]

Gold: data/gold/roles.csv, labels of (file, speaker label) pairs by salted hash, so the folder is needed to use them.
Prints cross-validated figures (scenarios dealt into folds); with --write fits on all of it and writes
deescal/roles.json.
"""
import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold

from _shared import read_gold, read_turns, script
from deescal.audit import DIVIDED
from deescal.engine.errors import InputError
from deescal.engine.files import project_root, write_text
from deescal.loops import find_loops
from deescal.roles import ROLES, SPEAKER, WEIGHTS, assign_roles, speaker_matrix, speaker_numbers, terms_of, utterances

SALT, GOLD = "deescal roles 2026", "data/gold/roles.csv"
TERMS, FOLDS, C = 1500, 10, 1.0


def gold_key(file, label):
    name = file.rsplit("/", 1)[-1]
    return hashlib.sha256(f"{SALT}\0{name}\0{label}".encode()).hexdigest()[:24]


def vocabulary(turns):
    """Words and pairs said in at least 20 (pairs: 40) scenarios, most frequent first, without what is mostly a name.

    A word is taken for a name where, inside a sentence, it is written with a capital in 3 of 10 places or more."""
    said = utterances(turns)
    terms = terms_of(said).join(said.select("utterance", "scenario_id"), on="utterance").group_by("term").agg(
        pl.col("scenario_id").n_unique().alias("df"), pl.len().alias("n"))
    inside = (
        turns.select(pl.col("text").str.replace_all("’", "'").str.extract_all(r"[\p{Ll},;'] [\p{L}\p{N}']+").alias("x"))
        .explode("x").drop_nulls().select(w=pl.col("x").str.slice(2))
        .group_by(term=pl.col("w").str.to_lowercase()).agg(capital=pl.col("w").str.contains(r"^\p{Lu}").mean()))
    one = terms.filter(~pl.col("term").str.contains(" ") & (pl.col("df") >= 20)).join(inside, on="term", how="left")
    plain = (pl.col("capital").fill_null(1) < 0.3) | (pl.col("term") == "i") | pl.col("term").str.starts_with("i'")
    words = one.filter(plain).sort("n", "term", descending=[True, False])["term"].to_list()[:2500]
    pairs = terms.filter(pl.col("term").str.contains(" ") & (pl.col("df") >= 40)).sort(
        "n", "term", descending=[True, False])
    known = set(words)
    return words + [p for p in pairs["term"].to_list() if known.issuperset(p.split())][:3000]


def fit(x, y, weight): return LogisticRegression(C=C, max_iter=500).fit(x, y, sample_weight=weight)


def figures(y, p, turns):
    "Turn-weighted accuracy; precision and recall of the civilian; accuracy by speaker."
    c = ROLES.index("civilian")
    return {
        "accuracy of turns": np.average(p == y, weights=turns),
        "civilian precision": np.average(y[p == c] == c, weights=turns[p == c]),
        "civilian recall": np.average(p[y == c] == c, weights=turns[y == c]),
        "accuracy of speakers": np.mean(p == y)}


def show(name, values): print(f"{name:44}" + "".join(f"  {k} {v:.3f}" for k, v in values.items()), flush=True)


def mean(values): return round(float(np.mean(values)), 3) if len(values) else None     # JSON has no NaN


def check(labelled, where, write):
    "Raise where there is too little to deal into folds or to compare readers, or, to write weights, a role is missing."
    n, missing = labelled["scenario_id"].n_unique(), [r for r in ROLES if r not in set(labelled["gold"])]
    if n < FOLDS:
        raise InputError(f"{n} scenarios of this folder have every speaker in the gold, {FOLDS} are needed", where,
                         "give the folder that the gold was made from, as released: the key holds names and labels")
    if not (labelled["second"] != "").any():
        raise InputError("no speaker has a second label in the gold: nothing to take kappa from", where,
                         "have some scenarios read twice: the column `second`")
    if missing and write:
        raise InputError(f"no speaker of this folder is labelled {missing[0]!r}", where,
                         "weights need all five roles: give more transcripts, or leave --write out")


def main(folder, gold_file, write):
    turns = read_turns(folder)
    gold_file = Path(gold_file or project_root() / GOLD)
    gold = read_gold(gold_file)
    files = turns.group_by(SPEAKER, maintain_order=True).agg(pl.col("file").first())
    rows = [gold.get(gold_key(f, l)) for _, l, f in files.rows()]
    files = files.with_columns(
        pl.Series("gold", [r and r["role"] for r in rows], dtype=pl.String),
        pl.Series("first", [r and r["first"] for r in rows], dtype=pl.String),
        pl.Series("second", [r and r["second"] for r in rows], dtype=pl.String),
        pl.Series("mixed", [r and int(r["mixed"]) for r in rows], dtype=pl.Int64))
    whole = files.group_by("scenario_id").agg(pl.col("gold").is_not_null().all()).filter("gold")["scenario_id"]
    known = files["scenario_id"].is_in(whole.implode()).to_numpy()
    check(files.filter(pl.Series(known)), f"{folder}, {gold_file}", write)
    numbers = speaker_numbers(turns)
    names = [c for c in numbers.columns if c not in (*SPEAKER, "turns")]
    model = {"numbers": {n: [0.0, 1.0, []] for n in names}, "words": dict.fromkeys(vocabulary(turns), [])}
    table = numbers.filter(pl.Series(known))
    for n in names: model["numbers"][n] = [float(table[n].mean()), float(table[n].std() or 0) + 1e-6, []]
    speakers, x = speaker_matrix(turns, model)
    assert speakers.select(SPEAKER).equals(files.select(SPEAKER)), "speakers in another order"
    looped = find_loops(turns).filter(kind="across").select("scenario_id", "turn")
    heard = turns.join(looped, on=["scenario_id", "turn"], how="anti").group_by(SPEAKER).len("heard")
    files = files.join(heard, on=SPEAKER, how="left", maintain_order="left").with_columns(
        all=speakers["turns"], heard=pl.col("heard").fill_null(0))
    lab, x = files.filter(pl.Series(known)), x[np.flatnonzero(known)]
    y, turn_count = np.array([ROLES.index(r) for r in lab["gold"]]), lab["heard"].to_numpy().astype(float)
    weight = np.sqrt(turn_count + 1)
    weight /= weight.mean()
    two = (lab["second"] != "").to_numpy()
    a, b, n = (
        lab.filter(pl.Series(two))["first"], lab.filter(pl.Series(two))["second"], lab.filter(pl.Series(two))["all"])
    made = {
        "scenarios labelled": lab["scenario_id"].n_unique(), "speakers labelled": len(lab),
        "scenarios labelled by two readers": lab.filter(pl.Series(two))["scenario_id"].n_unique(),
        "kappa of the two readers, by speaker": round(cohen_kappa_score(a, b), 3),
        "kappa of the two readers, by turn": round(cohen_kappa_score(a, b, sample_weight=n), 3)}
    print(json.dumps(made, indent=1))

    def predict(columns):
        "Each fold judged by a model that was fitted on the others; terms are chosen within the fold."
        p, sure = np.zeros(len(y), int), np.zeros(len(y))
        for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(
                x, groups=lab["scenario_id"].to_numpy()):
            keep = columns(train)
            model = fit(x[train][:, keep], y[train], weight[train])
            p[test], sure[test] = model.predict(x[test][:, keep]), model.predict_proba(x[test][:, keep]).max(1)
        return p, sure

    def strongest(train):
        "All numbers and the `TERMS` terms with the largest weights times spread."
        first = fit(x[train], y[train], weight[train])
        size = np.linalg.norm(first.coef_, axis=0) * np.sqrt(np.asarray(x[train].multiply(x[train]).mean(0)).ravel())
        terms = len(names) + np.argsort(-size[len(names):], kind="stable")[:TERMS]
        return np.concatenate([np.arange(len(names)), np.sort(terms)])

    by_label = assign_roles(turns, "label").group_by(SPEAKER, maintain_order=True).agg(pl.col("role").first())
    by_label = np.array([ROLES.index(r) for r in by_label.filter(pl.Series(known))["role"]])
    paper = np.where(np.isin(by_label, [0, 1]), by_label, 2)
    evidence, sure = predict(strongest)
    results = {
        "label, authority or civilian (as the paper)": paper, "label, five roles": by_label,
        "evidence without words": predict(lambda train: np.arange(len(names)))[0], "evidence": evidence}
    every = lab["all"].to_numpy().astype(float)
    for name, p in results.items():
        show(name, figures(y, p, turn_count))
        show("   on the scenarios of two readers", figures(y[two], p[two], turn_count[two]))
        show("   loops counted as turns", figures(y, p, every))
    best = figures(y, results["evidence"], turn_count)
    made |= {f"{k}, {FOLDS}-fold": round(v, 3) for k, v in best.items()}
    made |= {f"{k}, {FOLDS}-fold, two readers": round(v, 3)
             for k, v in figures(y[two], results["evidence"][two], turn_count[two]).items()}
    mixed, told, enough = np.array(lab["mixed"].to_list()) > 0, sure < DIVIDED, every >= 6
    made |= {"mixed speakers among those of 6 turns or more": mean(mixed[enough]),
             "reported as divided": mean(told[enough]),
             "mixed among the reported": mean(mixed[enough & told]),
             "reported among the mixed": mean(told[enough & mixed])}
    made["accuracy of turns by label alone"] = round(figures(y, by_label, turn_count)["accuracy of turns"], 3)
    confusion = np.zeros((len(ROLES), len(ROLES)), int)
    np.add.at(confusion, (y, results["evidence"]), turn_count.astype(int))
    print(pl.DataFrame({"gold": ROLES} | {r: confusion[:, i] for i, r in enumerate(ROLES)}))
    if not write: return
    keep = strongest(np.arange(len(y)))
    final, terms = fit(x[:, keep], y, weight), list(model["words"])
    w = [[round(float(v), 3) for v in row] for row in final.coef_.T]
    out = {
        "made": made, "bias": [round(float(v), 3) for v in final.intercept_],
        "confusion (rows gold, columns model, turns)": {r: confusion[i].tolist() for i, r in enumerate(ROLES)},
        "numbers": {n: [round(model["numbers"][n][0], 5), round(model["numbers"][n][1], 5), w[i]]
                    for i, n in enumerate(names)},
        "words": dict(sorted((terms[k - len(names)], w[i]) for i, k in enumerate(keep) if k >= len(names)))}
    text = json.dumps(out, ensure_ascii=False, indent=1)
    write_text(WEIGHTS, re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n")
    print(f"wrote {WEIGHTS.name}: {len(keep)} features")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder")
    args.add_argument("--gold", dest="gold_file", metavar="FILE", help=f"another gold than {GOLD}")
    args.add_argument("--write", action="store_true")
    script(main, **vars(args.parse_args()))
