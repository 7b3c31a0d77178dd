"""How much personal data is found? python bench/deidentify.py <folder of released transcripts> [--write] [--half rules]

Gold: data/gold/personal.csv, spans marked by reading, by salted hash of (file, line). One half was looked at while the
rules were written (`rules`), the other was not (`measure`, the default). A marked span counts as found where most of it
was replaced; what was replaced counts as right where it touches a marked span. --write writes data/gold/personal.json.
"""
import argparse
import difflib
import hashlib
import json
import re
from pathlib import Path

import polars as pl

from _shared import read_gold, read_turns, script
from deescal.deidentify import deidentify
from deescal.engine.errors import InputError
from deescal.engine.files import project_root, write_text

SALT, GOLD = "deescal personal data 2026", "data/gold/personal.csv"


def span_key(file, line):
    name = file.rsplit("/", 1)[-1]
    return hashlib.sha256(f"{SALT}\0{name}\0{line}".encode()).hexdigest()[:24]


def changed(before, after):
    "Spans of `before` that `after` has replaced."
    a, b = re.findall(r"\w+|\s+|[^\w\s]", before), re.findall(r"\[[A-Z]+\]|\w+|\s+|[^\w\s]", after)
    at = [0]
    for token in a: at.append(at[-1] + len(token))
    ops = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(at[i], at[j]) for op, i, j, _, _ in ops if op in ("replace", "delete")]


def share(part, whole): return round(part / whole, 3) if whole else None     # JSON has no NaN


def main(folder, half, gold_file, write, show):
    turns = read_turns(folder)
    gold_file = Path(gold_file or project_root() / GOLD)
    gold = {key: r["spans"] for key, r in read_gold(gold_file).items() if r["half"] == half}
    keys = [span_key(f, n) for f, n in turns.select("file", "line").rows()]
    turns = turns.with_columns(pl.Series("key", keys))
    wanted = turns.filter(pl.col("key").is_in(list(gold)))
    if not len(wanted):
        raise InputError(f"no utterance of this folder is in the half {half!r} of the gold", f"{folder}, {gold_file}",
                         "give the folder that the gold was made from, as released: the key holds file names and lines")
    scenes = turns.filter(pl.col("scenario_id").is_in(wanted["scenario_id"].unique().implode()))
    after, _, _ = deidentify(scenes)
    texts = dict(after.select("key", "text").rows())
    found, total, right, made = {}, {}, 0, 0
    for key, before in wanted.select("key", "text").rows():
        spans = [(*map(int, s.split(":")[0].split("-")), s.split(":")[1]) for s in gold[key].split()]
        replaced = changed(before, texts[key])
        def cover(a, b): return sum(max(0, min(b, y) - max(a, x)) for x, y in replaced)
        for a, b, kind in spans:
            hit = cover(a, b) > (b - a) / 2
            total[kind], found[kind] = total.get(kind, 0) + 1, found.get(kind, 0) + hit
            if show and not hit: print("MISSED", kind, repr(before[max(0, a - 40):b + 20]), repr(before[a:b]))
        for x, y in replaced:
            good = any(x < b and a < y for a, b, _ in spans)
            right, made = right + good, made + 1
            if show and not good: print("WRONG ", repr(before[max(0, x - 40):y + 20]), repr(before[x:y]))
    types = [{"type": k, "marked": total[k], "found": found[k], "recall": share(found[k], total[k])}
             for k in sorted(total)]
    types.append({"type": "all", "marked": sum(total.values()), "found": sum(found.values()),
                  "recall": share(sum(found.values()), sum(total.values()))})
    out = {"utterances": len(wanted), "replaced": made, "precision": share(right, made), "types": types}
    print(json.dumps(out, indent=1))
    if write: write_text(project_root() / "data/gold/personal.json", json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder")
    args.add_argument("--half", default="measure", choices=["rules", "measure"])
    args.add_argument("--gold", dest="gold_file", metavar="FILE", help=f"another gold than {GOLD}")
    args.add_argument("--write", action="store_true")
    args.add_argument(
        "--show", action="store_true", help="print what is missed or wrong: real text, for your eyes only")
    script(main, **vars(args.parse_args()))
