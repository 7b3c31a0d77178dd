"The sample that ships: what issue and README promise of it, and the defects planted in it."
import re
from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest

from deescal.audit import audit, duplicate_groups, near_duplicates
from deescal.clean import clean
from deescal.engine.jobs import resolve
from deescal.corpus import summarize_scenarios
from deescal.loops import find_loops
from deescal.read import read_folder
from deescal.roles import assign_roles
from deescal.examples import find_points, split_scenarios, to_messages

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample"
PAIR = ("facebook_900000000000057", "youtube_9055")


@pytest.fixture(scope="module")
def sample():
    turns, rejects, files = read_folder(SAMPLE)
    return assign_roles(turns), rejects, files


def test_size_platforms_and_long_scenarios(sample):
    turns, rejects, files = sample
    sizes = turns.group_by("scenario_id").len()["len"]
    assert (len(files) >= 36 and len(turns) >= 1000 and len(rejects) == 0
            and set(files["platform"]) == {"youtube", "tiktok", "facebook"})
    assert (sizes > 120).sum() >= 6


def test_no_two_scenarios_share_eight_words_but_the_planted_pair(sample):
    seen = defaultdict(set)
    for (sid,), g in sample[0].sort("scenario_id", "turn").group_by("scenario_id", maintain_order=True):
        words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", " ".join(g["text"]).lower().replace("\u2019", "'"))
        for i in range(len(words) - 7):
            seen[tuple(words[i:i + 8])].add(sid)
    assert {tuple(sorted(s)) for s in seen.values() if len(s) > 1} == {PAIR}


def test_the_planted_pair_is_found_and_stays_on_one_side(sample):
    turns = sample[0]
    pairs = near_duplicates(turns)
    assert pairs.select("scenario_a", "scenario_b").rows() == [PAIR]
    params = next(j for j in resolve("sample") if j.stage.name == "examples").params
    scenarios, groups = summarize_scenarios(turns, sample[2]), duplicate_groups(turns["scenario_id"].unique(), pairs)
    split = split_scenarios(scenarios, groups, *(params[k] for k in ("seed", "test_fraction", "validation_fraction")))
    assert split.filter(pl.col("scenario_id").is_in(PAIR))["split"].n_unique() == 1
    assert (split["split"] == "test").sum() >= 12
    points = find_points(to_messages(turns), split)
    assert points.filter(split="test").height > 200 and points.filter(split="train").height > 200


def test_planted_defects(sample):
    turns = sample[0]
    assert find_loops(turns)["scenario_id"].to_list() == ["youtube_9016"]
    times = turns.filter(scenario_id="youtube_9026")
    assert times["start_s"].null_count() == 2 and (times["start_s"].drop_nulls().diff() < 0).sum() == 1
    assert "narrator" in turns.filter(scenario_id="youtube_9015")["role"]
    named = turns.filter(scenario_id="youtube_9006")
    assert "officer" in named["role"] and "officer" not in assign_roles(named, "label")["role"]


def test_the_audit_finds_what_was_planted_and_cleaning_removes_it(sample):
    turns, _, files = sample
    scenarios, pairs = summarize_scenarios(turns, files), near_duplicates(turns)
    found = {(r["finding"], r["scenario_id"])
             for r in audit(turns, scenarios, pairs).filter(pl.col("action") != "tell").rows(named=True)}
    planted = {("loop_inside", "youtube_9016"), ("narrator", "youtube_9015"), ("odd_time", "youtube_9026"),
               ("backward_time", "youtube_9026"), ("near_duplicate", PAIR[0])}
    assert planted <= found
    faults = {(f, s) for f, s in found if f not in ("narrator", "personal_text", "personal_label")}
    assert faults == {p for p in planted if p[0] != "narrator"}, "something sound is called a fault"
    tidy, trace, _ = clean(turns, scenarios)
    assert len(trace) == len(turns) and PAIR[0] not in tidy["scenario_id"] and tidy["words"].max() < 100
    assert set(audit(tidy, summarize_scenarios(tidy, files), near_duplicates(tidy))["action"]) <= {"tell"}
