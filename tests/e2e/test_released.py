"The real transcripts, where they are: DEESCAL_DATA=<folder> make test. Asserts on counts only; shows no text."
import os
from pathlib import Path

import pytest

from deescal.corpus import assign_roles, corpus_accounting, find_transcripts, read_folder

DATA = os.environ.get("DEESCAL_DATA", "")
pytestmark = pytest.mark.skipif(not Path(DATA or "none").is_dir(), reason="DEESCAL_DATA names no folder with the released transcripts")


def test_every_row_of_the_release_is_accounted_for():
    turns, rejects, files = read_folder(DATA)
    assert len(files) == len(find_transcripts(DATA)) and files["rows"].sum() == len(turns) + (rejects["unit"] == "row").sum()
    assert set(files["encoding"]) == {"utf-8"} and turns.select("scenario_id", "turn").is_duplicated().sum() == 0
    assert turns["start_s"].null_count() < 0.001 * len(turns)
    assert len(corpus_accounting(assign_roles(turns), rejects, files))
