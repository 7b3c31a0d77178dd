"""How fast are reading, roles and findings? python bench/corpus.py [FOLDER] [--scale 1 10 100]

First reading, roles by label and merging against a plain loop over the same files; then notebooks 06 and 07 as a whole,
by part; with --scale a corpus of so many times the scenarios, made of pieces of the folder's, with planted copies to be
found. Ratios of one run on one machine. Every part runs in a process of its own, so that its peak memory is its own.
Prints counts only, no text.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import polars as pl
from tqdm import tqdm

from _shared import script, transcripts
from deescal.audit import (
    audit, duplicate_groups, find_mixed, find_personal, find_rates, find_scenarios, find_text, find_times,
    near_duplicates, shingles)
from deescal.engine.files import project_root
from deescal.corpus import summarize_scenarios
from deescal.loops import find_loops
from deescal.read import find_transcripts, read_folder
from deescal.examples import to_messages
from deescal.roles import assign_roles

ROUNDS, SEED, BATCH = 3, 3407, 1000
COPIES, LEAST = 0.02, 200       # share of scenarios that are copies; words below which a scenario is not copied
MOST_SHINGLES = 40_000_000      # above it shingles are sampled: the search over so many takes about 3 GB
AUTHORITY = (
    "officer police cop deputy deputies sheriff sergeant sgt lieutenant captain corporal trooper detective marshal "
    "constable ranger chief dispatch").split()


def plain_messages(paths, read_csv):
    "The published steps as they were published: a frame a file, a step a row, neighbours of one role in one message."
    scenarios = {}
    for path in paths:
        messages = []
        for _, row in read_csv(path).iterrows():
            label, text = str(row["speaker_label"]).lower(), str(row["transcript"])
            role = "user" if any(word in label for word in AUTHORITY) else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += " " + text
            else:
                messages.append({"role": role, "content": text})
        scenarios[path.name] = messages
    return scenarios


def timed(f, *args, **kwargs):
    start = time.perf_counter()
    out = f(*args, **kwargs)
    return out, time.perf_counter() - start


def against_plain(folder):
    "Least seconds of the plain loop and of ours, taken in turns so that a busy machine slows both."
    from pandas import read_csv     # here, so that its import is neither timed nor in another part's peak
    paths, plain, ours = [f[0] for f in find_transcripts(folder)], [], []
    for _ in range(ROUNDS):
        scenarios, seconds = timed(plain_messages, paths, read_csv)
        plain.append(seconds)
        messages, seconds = timed(lambda: to_messages(assign_roles(read_folder(folder)[0], "label")))
        ours.append(seconds)
    return {"files": len(paths), "plain": min(plain), "ours": min(ours),
            "plain_messages": sum(map(len, scenarios.values())), "messages": len(messages)}


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def whole(folder):
    "Seconds of each part of notebooks 06 and 07, and peak memory."
    seconds = {}
    (turns, rejects, files), seconds["read_folder"] = timed(read_folder, folder)
    turns, seconds["assign_roles"] = timed(assign_roles, turns)
    scenarios, seconds["summarize_scenarios"] = timed(summarize_scenarios, turns, files)
    pairs, seconds["near_duplicates"] = timed(near_duplicates, turns)
    _, seconds["duplicate_groups"] = timed(duplicate_groups, scenarios["scenario_id"], pairs)
    findings, seconds["audit"] = timed(audit, turns, scenarios, pairs)
    return {"scenarios": len(scenarios), "turns": len(turns), "words": int(turns["words"].sum()), "pairs": len(pairs),
            "rejects": len(rejects), "findings": len(findings), "seconds": seconds, "gb": peak_gb()}


class Pieces:
    "Scenarios made of pieces of real ones. `i` is the same whenever it is asked for: a copy needs no other to be kept."

    def __init__(self, turns, n):
        t = turns.sort("scenario_id", "turn")
        gap = pl.col("start_s").forward_fill().diff().over("scenario_id").fill_null(0.0)
        said = t.select(pl.col("text").str.extract_all(r"\S+").alias("word"))
        self.turns = t.select("speaker_label", "start_time", "start_s", gap=gap)
        self.words = said.explode("word").drop_nulls()["word"]
        self.at = np.r_[0, np.cumsum(said["word"].list.len().to_numpy().astype(np.int64))]
        self.size = t["scenario_id"].rle().struct.field("len").to_numpy().astype(np.int64)
        self.begin = np.cumsum(self.size) - self.size
        self.copied, rng = {}, np.random.default_rng(SEED)
        copies = {int(i) for i in rng.choice(n, round(COPIES * n), replace=False)}
        for i in sorted(copies):
            for j in rng.integers(n, size=100).tolist():
                if j not in copies and len(self.pieces(j)[1]) >= LEAST:
                    self.copied[i] = j
                    break

    def noise(self, at, share, rng):
        "Words replaced by others of the corpus."
        swap = rng.random(len(at)) < share
        return np.where(swap, rng.integers(len(self.words), size=len(at)), at)

    def pieces(self, i):
        "An ordinary scenario: rows of its turns, positions of its words, how many each turn has."
        rng, rows, used = np.random.default_rng([SEED, i]), [], set()
        left = int(rng.choice(self.size))
        most = -(-left // int(rng.integers(2, 4)))
        while left > 0 and len(used) < len(self.size):
            s = int(rng.integers(len(self.size)))
            if s in used: continue
            used.add(s)
            take = min(most, left, int(self.size[s]))
            first = self.begin[s] + rng.integers(self.size[s] - take + 1)
            rows.append(np.arange(first, first + take))
            left -= take
        rows = np.concatenate(rows)
        n = self.at[rows + 1] - self.at[rows]
        at = np.arange(n.sum()) + np.repeat(self.at[rows] - np.cumsum(n) + n, n)
        return rows, self.noise(at, rng.uniform(0.10, 0.15), rng), n

    def scenario(self, i):
        "A scenario, or where it is a planted copy, 50 to 90 % of another with a tenth of its words changed."
        if i not in self.copied: return self.pieces(i)
        rows, at, n = self.pieces(self.copied[i])
        rng, ends = np.random.default_rng([SEED, i, 1]), np.r_[0, np.cumsum(n)]
        take = max(1, round(rng.uniform(0.5, 0.9) * len(rows)))
        a = int(rng.integers(len(rows) - take + 1))
        b = a + take
        return rows[a:b], self.noise(at[ends[a]:ends[b]], 0.10, rng), n[a:b]

    def share_turns(self, *names):
        "Whether two scenarios hold the same turn of an original: such a pair is not false, though it was not planted."
        a, b = (self.scenario(int(x.split("_")[1]))[0] for x in names)
        return bool(np.isin(a, b).any())

    def make(self, numbers):
        "The turns of some scenarios. Clocks run on from piece to piece."
        parts = [self.scenario(i) for i in numbers]
        rows, at, n = (np.concatenate(p) for p in zip(*parts))
        text = (
            pl.DataFrame({"row": np.repeat(np.arange(len(rows)), n), "text": self.words.gather(at)})
            .group_by("row", maintain_order=True).agg(pl.col("text").str.join(" ")))
        whose = np.repeat(np.arange(len(parts)), [len(p[0]) for p in parts])
        ids = pl.Series([name(i) for i in numbers]).gather(whose)
        joint = pl.Series(np.r_[True, np.diff(rows) != 1])
        return (
            self.turns[rows].with_columns(
                scenario_id=ids, row=pl.int_range(pl.len(), dtype=pl.Int64),
                gap=pl.when(joint).then(2.0).otherwise("gap"))
            .join(text, on="row", how="left", maintain_order="left")
            .select(
                "scenario_id", pl.int_range(pl.len()).over("scenario_id").alias("turn"), "start_time", "speaker_label",
                pl.col("text").fill_null(""),
                start_s=pl.when(pl.col("start_s").is_not_null()).then(pl.col("gap").cum_sum().over("scenario_id"))))


def name(i): return f"made_{i:07}"


def count_findings(turns):
    "How many findings of each kind the scenarios have by themselves."
    loops = find_loops(turns)
    counts = Counter({f"loop_{k}": n for k, n in loops.group_by("kind").len().rows()})
    for frame in (
            find_times(turns), find_rates(turns, loops), find_text(turns), find_scenarios(turns), find_mixed(turns),
            find_personal(turns)):
        counts.update(dict(frame.group_by("finding").len().rows()))
    return counts


def at_scale(folder, scale):
    "A corpus of `scale` times the scenarios, a batch at a time; duplicates among all of them."
    original = read_folder(folder)[0]
    n, keep = scale * original["scenario_id"].n_unique(), -(-scale * int(original["words"].sum()) // MOST_SHINGLES)
    pieces, ids = Pieces(original, n), pl.Enum([name(i) for i in range(n)])
    del original
    few = pieces.make(range(min(n, 5)))
    count_findings(assign_roles(few))  # these two lines load what there is to load
    duplicate_groups(few["scenario_id"].unique(), near_duplicates(few))
    kept, counts, turns, words = [], Counter(), 0, 0

    def numbered(batch): return shingles(batch, keep=keep).with_columns(pl.col("scenario_id").cast(ids))

    seconds = dict.fromkeys(("making", "roles", "findings", "duplicates"), 0.0)
    for first in tqdm(range(0, n, BATCH), desc=f"batches, {scale} times", disable=None):
        batch, s = timed(pieces.make, range(first, min(first + BATCH, n)))
        seconds["making"] += s
        turns, words = turns + len(batch), words + int(batch["text"].str.count_matches(r"\S+").sum())
        batch, s = timed(assign_roles, batch)
        seconds["roles"] += s
        found, s = timed(count_findings, batch)
        seconds["findings"] += s
        counts += found
        some, s = timed(numbered, batch)
        seconds["duplicates"] += s
        kept.append(some)
    del batch, some
    gb = peak_gb()
    every = pl.concat(kept, rechunk=True)
    kept.clear()
    # of a sample, three shingles stand for 3 * keep; one or two would link short scenarios by chance
    pairs, s = timed(near_duplicates, every, min_shared=6 if keep == 1 else max(3, 6 // keep))
    seconds["duplicates"] += s
    groups, s = timed(duplicate_groups, ids.categories, pairs)
    seconds["duplicates"] += s
    planted = {tuple(sorted((name(i), name(j)))) for i, j in pieces.copied.items()}
    linked = set(pairs.select("scenario_a", "scenario_b").rows())
    others = sorted(linked - planted)
    some = [others[i] for i in np.random.default_rng(SEED).permutation(len(others))[:1000]]
    several = groups.group_by("group").len().filter(pl.col("len") > 1)
    return {"scenarios": n, "turns": turns, "words": words, "shingles": len(every), "keep": keep, "seconds": seconds,
            "findings": dict(sorted(counts.items())), "planted": len(planted), "found": len(planted & linked),
            "pairs": len(pairs), "groups": len(several), "looked_at": len(some),
            "related": sum(pieces.share_turns(a, b) for a, b in some), "gb_batches": gb, "gb": peak_gb()}


def alone(folder, part):
    "The result of one part, run in a process of its own."
    command = [sys.executable, __file__, str(folder), "--part", part]
    r = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if r.returncode: raise SystemExit(r.returncode)     # it has said why
    return json.loads(r.stdout.splitlines()[-1])


def main(folder, scale):
    transcripts(folder)
    r = alone(folder, "plain")
    print(f"reading, roles by label, merging, {r['files']} files: {r['ours']:.2f} s; a plain loop {r['plain']:.2f} s; "
          f"ratio {r['plain'] / r['ours']:.1f} (least of {ROUNDS})", flush=True)
    r = alone(folder, "whole")
    print(f"\n06 and 07: {r['scenarios']:,} scenarios, {r['turns']:,} turns, {r['words']:,} words; "
          f"{r['findings']:,} findings, {r['pairs']} pairs; peak {r['gb']:.2f} GB")
    for part, s in (r["seconds"] | {"all": sum(r["seconds"].values())}).items(): print(f"{part:22}{s:8.2f} s")
    if not scale: return
    head = "scale,scenarios,turns,words,roles s,find s,dupl. s,s per 1000,ratio,GB,recall".split(",")
    print("\n" + "".join(f"{h:>12}" for h in head), flush=True)
    first, notes = None, []
    for n in scale:
        r = alone(folder, str(n))
        s = r["seconds"]
        each = sum(s[k] for k in ("roles", "findings", "duplicates")) / r["scenarios"] * 1000
        first = first or each
        print(f"{n:>12}{r['scenarios']:>12,}{r['turns']:>12,}{r['words']:>12,}{s['roles']:>12.1f}{s['findings']:>12.1f}"
              f"{s['duplicates']:>12.1f}{each:>12.2f}{each / first:>12.2f}{r['gb']:>12.2f}"
              f"{r['found'] / max(r['planted'], 1):>12.3f}", flush=True)
        notes.append(
            f"{n}: {r['shingles']:,} shingles, one in {r['keep']}; {r['found']} of {r['planted']} planted copies among "
            f"{r['pairs']:,} pairs in {r['groups']:,} groups; of {r['looked_at']:,} other pairs {r['related']:,} hold "
            f"turns of the same original; {r['gb_batches']:.2f} GB before the search over all; made in "
            f"{s['making']:.1f} s; findings {', '.join(f'{k} {c}' for k, c in r['findings'].items())}")
    print("\nratio: seconds for 1,000 scenarios to those of the first line; 1 is linear\n" + "\n".join(notes))


PARTS = {"plain": against_plain, "whole": whole}

if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder", nargs="?", default=project_root() / "data/sample")
    args.add_argument("--scale", nargs="+", type=int, default=[], help="how many times the scenarios of the folder")
    args.add_argument("--part", help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.part:
        part = PARTS.get(given.part, lambda f: at_scale(f, int(given.part)))
        script(lambda: print(json.dumps(part(given.folder))))
    else: script(main, given.folder, given.scale)
