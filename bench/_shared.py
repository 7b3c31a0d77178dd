"What the benches share: how the real transcripts are found, and how an error is told. No bench of its own."
import csv
import sys
from pathlib import Path

from deescal.engine.errors import DeescalError, InputError
from deescal.read import find_transcripts, read_folder, require_turns

BENCH = f"python bench/{Path(sys.argv[0]).name}"


def transcripts(folder):
    "`folder`, if transcripts are in it; else an error whose remedy is this bench's command, not the series'."
    try: find_transcripts(folder)
    except InputError as e:
        raise InputError(e.what, e.where, "give the folder that holds the transcripts (or train/ and test/ with them): "
                         f"{BENCH} <folder>; the released ones are at doi.org/10.7910/DVN/CWMCZI") from None
    return folder


def read_turns(folder):
    turns, rejects, _ = read_folder(transcripts(folder))
    require_turns(turns, rejects, folder)
    return turns


def read_gold(path):
    "Rows of a gold file (CSV with a column `key`), by key."
    try:
        with open(path, newline="") as f: return {r["key"]: r for r in csv.DictReader(f)}
    except (OSError, KeyError, UnicodeDecodeError) as e:
        raise InputError(f"this is no gold file: {type(e).__name__}", path,
                         "give a file made like those in data/gold (its README.md says how)") from None


def script(main, *args, **kwargs):
    "Run `main`; an error is a sentence with what, where and remedy, not a traceback."
    try: main(*args, **kwargs)
    except DeescalError as e: raise SystemExit(f"{BENCH}: {e}") from None
