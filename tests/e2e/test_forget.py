"A person's video is taken out of a finished run: no trace of it is left, and it does not come back."
import html
import json
import os
import re
import shutil
import subprocess
import sys

import polars as pl
import pytest

from deescal.engine.forget import known_videos, marked, marks
from deescal.engine.run import Run
from deescal.read import read_folder

GONE = "youtube_7000"


def only_its(folder, scenario):
    "Sentences that stand in one scenario of `folder` and in no other."
    turns = read_folder(folder)[0]
    others = " ".join(turns.filter(pl.col("scenario_id") != scenario)["text"])
    return [t for t in turns.filter(scenario_id=scenario)["text"] if len(t) > 15 and t not in others]


def traces(run, names, sentences):
    "Files of a run that name a video or hold a sentence of it, as text, in JSON or in HTML; tables are looked into."
    forms = {f for s in sentences for f in (s, html.escape(s), html.escape(s, quote=False), json.dumps(s)[1:-1])}
    out = []
    for path in (p for folder in (run.data, run.figures) for p in sorted(folder.rglob("*")) if p.is_file()):
        if path.suffix == ".parquet":
            text = json.dumps(pl.read_parquet(path).rows(), default=str, ensure_ascii=False)
            forms_here = {json.dumps(f, ensure_ascii=False)[1:-1] for f in forms}
        else:
            text, forms_here = path.read_bytes().decode("utf-8", "replace"), forms
        if re.search(marked(names), f"{path.name}\n{text}") or any(f in text for f in forms_here):
            out.append(path.relative_to(run.root).as_posix())
    return out


@pytest.fixture
def forgetful(checkout, tmp_path):
    "The finished micro run in a checkout that may be spoilt."
    root = tmp_path / "deescal"
    shutil.copytree(checkout.root, root, symlinks=True)
    copy = type(checkout)(root)
    return copy, Run("micro", root=root)


def test_no_trace_is_left_and_the_video_does_not_come_back(forgetful):
    checkout, run = forgetful
    names, sentences = marks(run, GONE), only_its(checkout.root / "data/planted", GONE)
    assert sentences and traces(run, names, sentences), "nothing to look for"
    (run.data / "harvest/audio").mkdir(parents=True)
    (run.data / f"harvest/audio/{GONE}.m4a").write_bytes(b"sound")
    said = checkout.deescal("forget", GONE, "--profile", "micro").stdout
    assert traces(run, names, sentences) == []
    learnt = pl.read_csv(checkout.root / "data/planted" / f"{GONE}.csv").height
    assert learnt and "05_diarize" in said and "14_report" in said and f"{GONE}.csv" in said
    assert (checkout.root / "data/planted" / f"{GONE}.csv").is_file()  # named, and not ours to remove
    assert checkout.deescal("forget", GONE, "--profile", "micro").returncode == 0  # twice does no harm


@pytest.mark.slow
def test_the_series_makes_the_rest_without_it(forgetful):
    checkout, run = forgetful
    split = pl.read_parquet(run.table_path("split"))
    gone = split.filter(pl.col("split") == "train")["scenario_id"].sort()[0]
    names, sentences = marks(run, gone), only_its(checkout.root / "data/planted", gone)
    said = checkout.deescal("forget", gone, "--profile", "micro").stdout
    assert "trained again: adapter/tiny" in said and not (run.data / "adapter/tiny").exists()
    assert traces(run, names, sentences) == []
    checkout.reproduce()
    assert traces(run, names, sentences) == []
    assert known_videos(run) & {gone} == set() and len(run.read("scenarios")) == len(split) - 1
    for stage in ("diarize",):
        lines = run.read("accounting", [stage]).filter(measure="rejected", reason="forgotten")
        assert lines["count"].to_list() == [1], stage
    assert (run.data / "adapter/tiny").exists() and (run.figures / "report.html").is_file()
    assert "nothing has changed" in checkout.reproduce().stdout


def test_a_harvested_clip_is_forgotten_too(forgetful):
    "The first stage of the micro run reads the sample's archive; what it found there goes by the same command."
    checkout, run = forgetful
    said = checkout.deescal("forget", "youtube_9103", "--profile", "micro").stdout
    assert traces(run, marks(run, "youtube_9103") + ["9103"], []) == []
    assert "01_harvest" in said and "data/clips/youtube_9103.ogg" in said
    assert (checkout.root / "data/clips/youtube_9103.ogg").is_file()


@pytest.mark.parametrize("hostile", ["../../x", "", "youtube_nobody", "youtube_*", "-x"])
def test_what_is_no_video_is_an_error_with_a_remedy(forgetful, hostile):
    checkout, run = forgetful
    before = {p: p.stat().st_mtime_ns for p in run.data.rglob("*") if p.is_file() and p.name != ".series"}
    r = checkout.deescal("forget", "--profile", "micro", "--", hostile, ok=False)
    assert r.returncode and "remedy" in r.stderr and "Traceback" not in r.stderr
    assert before == {p: p.stat().st_mtime_ns for p in run.data.rglob("*") if p.is_file() and p.name != ".series"}


def test_nothing_is_forgotten_while_a_series_is_at_work(forgetful):
    checkout, run = forgetful
    code = "import sys; from pathlib import Path; from deescal.engine.locks import hold; " \
           "h = hold(Path(sys.argv[1]), Exception); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, run.data / ".series"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert holder.stdout.readline() == "held\n"
        r = checkout.deescal("forget", GONE, "--profile", "micro", ok=False)
        assert r.returncode and "another process" in r.stderr and not (run.data / "forgotten.txt").exists()
    finally:
        holder.kill()
        holder.wait()
