"The real transcripts, where they are: DEESCAL_DATA=<folder> make test. Asserts on counts only; shows no text."
import os
from pathlib import Path

import polars as pl
import pytest

from deescal.audit import audit, near_duplicates
from deescal.clean import clean, word_budget
from deescal.corpus import corpus_accounting, summarize_scenarios
from deescal.read import find_transcripts, read_folder
from deescal.roles import assign_roles

DATA = os.environ.get("DEESCAL_DATA", "")
pytestmark = pytest.mark.skipif(
    not Path(DATA or "none").is_dir(), reason="DEESCAL_DATA names no folder with the released transcripts")


def test_every_row_of_the_release_is_accounted_for():
    turns, rejects, files = read_folder(DATA)
    assert (len(files) == len(find_transcripts(DATA))
            and files["rows"].sum() == len(turns) + (rejects["unit"] == "row").sum())
    assert set(files["encoding"]) == {"utf-8"} and turns.select("scenario_id", "turn").is_duplicated().sum() == 0
    assert turns["start_s"].null_count() < 0.001 * len(turns)
    assert len(corpus_accounting(assign_roles(turns), rejects, files))


def test_the_faults_of_the_release_are_found_and_gone_when_it_is_clean():
    turns, _, files = read_folder(DATA)
    turns = assign_roles(turns)
    scenarios, pairs = summarize_scenarios(turns, files), near_duplicates(turns)
    count = dict(audit(turns, scenarios, pairs)["finding"].value_counts().rows())
    assert (count["loop_inside"] >= 40 and count["loop_across"] > 1000 and count["narrator"] > 1000
            and count["odd_time"] == 82)
    tidy, trace, key = clean(turns, scenarios)
    assert len(trace) == len(turns) and word_budget(trace)["words"].sum() == turns["words"].sum()
    assert set(audit(tidy, summarize_scenarios(tidy, files), near_duplicates(tidy))["action"]) <= {"tell"}
    assert key.group_by("scenario_id").agg(pl.col("pseudonym").is_duplicated().any()).select(
        pl.col("pseudonym").any()).item() is False
