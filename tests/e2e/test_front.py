"01 to 05 in one series, on a platform on loopback: killed in each, refused for a while, and without sound afterwards."
import base64
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from conftest import Checkout, copy_checkout, edit_cell
from llm_server import LLMServer, heard_answer
from platform_server import Platform

from deescal.audio import decode_audio
from deescal.review import append_verdict

CLIPS = Path(__file__).resolve().parents[2] / "data/clips"
VIDEOS = [f"oak{n}" for n in (9101, 9103, 9105, 9106)]  # the platform's; clips of these numbers ship
FRONT = ["01_harvest", "02_transcribe", "03_annotate", "04_select", "05_diarize"]
HEARD = (9101, 9103, 9106)
ON = {"harvest.channels": "data/oak.csv", "harvest.videos_from": "network", "harvest.youtube": "true", "harvest.audio": "true",
      "transcribe.fetch": "true", "diarize.method": "local", "diarize.labelled": "''",
      "select.reviews": "data/reviews/all"}


def said(number):
    turns = pl.read_csv(CLIPS / "reference.csv").filter(clip=f"youtube_{number}").sort("start_s")
    return [(s, round(e - s, 2), text) for s, e, text in turns.select("start_s", "end_s", "text").rows()]


@pytest.fixture(scope="module")
def platform():
    with Platform({"/@oak/videos": VIDEOS}, slow=0.1, said={v: said(v[3:]) for v in VIDEOS},
                  sounds={v: (CLIPS / f"youtube_{v[3:]}.ogg").read_bytes() for v in VIDEOS}) as server:
        yield server


class Front(Checkout):
    "A checkout whose series ends with 05."

    def __init__(self, root):
        super().__init__(root)
        self.env["PYTHONPATH"] += f":{root / 'tests/e2e'}"  # for the lines that `on_loopback` puts into 02
        self.data = root / "data/runs/micro"
        store = root / "data/reviews/all"
        for video in [] if store.is_dir() else [*VIDEOS, *HEARD]:  # somebody who accepts all: what is tested is elsewhere
            append_verdict(store, {
                "video_id": f"youtube_{video}", "reviewer": "all", "verdict": "accept", "reason": "",
                "at": "2026-01-01T00:00:00", "seen_features": False})

    def to_05(self, **over):
        "The parameters; `over` is section__name -> value, over `ON`."
        values = ON | {k.replace("__", "."): v for k, v in over.items()}
        return "--set", "; ".join(f"{k}={v}" for k, v in values.items())

    def run(self, **over):
        command = self.as_far_as("diarize", *self.to_05(**over))
        r = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr
        return self.records()

    def lacks(self, job, **over):
        "What `make check` says of a job that is due only because something was not to be had; '' of one that is not."
        said = self.deescal("check", "--profile", "micro", *self.to_05(**over)).stdout
        line = next(x.split() for x in said.splitlines() if x.split()[:1] == [job])
        return " ".join(line[1:]).partition("run: not to be had last time: ")[2]

    def files(self, below, pattern="[!.]*"):
        "The whole files in a folder of the run: path -> when it was written."
        return {p: p.stat().st_mtime_ns for p in (self.data / below).glob(pattern) if p.suffix != ".part"}


def on_loopback(root, platform):
    "A checkout in which 01 and 02 ask `platform`, as fast as they can: their run cells say so."
    copy_checkout(root)
    edit_cell(root, "01_harvest", "run_it", lambda s: s.replace("videos_per_hour, seconds_between,", "10**9, 0,").replace(
        "forgotten=run.forgotten)", f"forgotten=run.forgotten, loopback={platform.base!r})"))
    edit_cell(root, "02_transcribe", "run_it", lambda s: s.replace(
        "limited_session(requests.Session())", f"limited_session(to_loopback(requests.Session(), {platform.base!r}))").replace(
        "import requests", "import requests\n    from platform_server import to_loopback"))
    (root / "data/oak.csv").write_text("channel,url\noak,https://www.youtube.com/@oak\n")
    return Front(root)


@pytest.fixture(scope="module")
def whole(platform, tmp_path_factory):
    "A run of these three stages that nothing disturbed."
    front = on_loopback(tmp_path_factory.mktemp("whole"), platform)
    start = len(platform.asked)
    front.run()
    front.asked = platform.asked[start:]
    return front


def test_what_the_front_half_found(whole):
    "What the tests below compare with: every clip is fetched, transcribed and diarized, and its sound removed."
    tables = whole.data / "tables"
    assert list(whole.records()) == FRONT
    assert pl.read_parquet(tables / "videos.parquet")["clip_sha256"].null_count() == 0
    assert pl.read_parquet(tables / "transcripts.parquet")["status"].to_list() == ["ok"] * 4
    assert pl.read_parquet(tables / "diarizations.parquet")["status"].to_list() == ["ok"] * 4
    assert whole.files("harvest/audio") == {}


@pytest.mark.slow
def test_a_run_killed_in_each_stage_goes_on_and_ends_with_the_same_bytes(whole, platform, tmp_path):
    front, start, kept = on_loopback(tmp_path, platform), len(platform.asked), {}

    def kill(when, below, pattern="[!.]*"):
        "Kill the series, see that the job at work has no record, and note what it had finished."
        front.kill(front.as_far_as("diarize", *front.to_05()), lambda: when(len(front.files(below, pattern))))
        kept.update(front.files(below, pattern))
        return list(front.records())

    assert kill(lambda n: n >= 2, "harvest/info") == []
    assert kill(lambda n: n >= 2, "harvest/audio") == []
    assert kill(lambda n: n >= 2, "work/transcribe", "*.json") == FRONT[:1]
    assert kill(lambda n: n >= 2, "answers/diarize", "*.parquet") == FRONT[:4]
    finished = front.records()
    assert len(kept) < 4 * len(VIDEOS), "nothing was killed in the middle"
    assert kill(lambda n: n == 0, "harvest/audio") == FRONT[:4]  # all is done, and only the record not yet written
    now = front.run()
    assert list(now) == FRONT and {n: now[n] for n in finished} == finished, "a finished job ran again"
    assert front.tables() == whole.tables() and len(whole.tables()) > 10
    assert {p for p, t in kept.items() if p.is_file() and p.stat().st_mtime_ns != t} == set(), "finished work was done again"
    more = Counter(platform.asked[start:]) - Counter(whole.asked)
    assert sum(more.values()) <= 3 * 3, "each of three kills costs what was being asked about one video"


def test_a_harvest_without_sound_after_05_removed_it_takes_nothing_back(whole, tmp_path):
    shutil.copytree(whole.root, tmp_path / "copy", symlinks=True)
    front = Front(tmp_path / "copy")
    before, tables = front.records(), front.tables()
    front.run(harvest__audio="false")
    assert front.tables() == tables and front.ran(before) == {"01_harvest"}


@pytest.mark.slow
def test_captions_that_were_refused_are_asked_for_again_and_no_others(platform, tmp_path):
    front, asked = on_loopback(tmp_path, platform), []
    silent = {"harvest__audio": "false", "diarize__method": "none", "transcribe__method": "captions"}

    def run(**fail):
        "What is lacking after a run in which captions are refused: how many, what for; and whose were asked for."
        platform.fail = {f"/captions?v={video}": status for video, status in fail.items()}
        start = len(platform.asked)
        front.run(**silent)
        asked.append([p.rpartition("=")[2] for p in platform.asked[start:] if p.startswith("/captions")])
        return front.lacks("02_transcribe", **silent)

    first, second, third, fourth = VIDEOS
    try:
        assert run(**{second: 429}) == "3 captions_blocked" and asked.pop() == [first, second], "who is blocked asks no more"
        assert run(**{third: 503}) == "1 captions_failed" and asked.pop() == [second, third, fourth]
        assert run() == "" and asked.pop() == [third]
    finally:
        platform.fail = {}
    before, start = front.records(), len(platform.asked)
    assert front.run(**silent) == before and len(platform.asked) == start, "a third run has nothing to do"
    assert pl.read_parquet(front.data / "tables/transcripts.parquet")["status"].to_list() == ["ok"] * 4


def whole_answer(prompt, body):
    "What a model would hear in the clip that was sent: which one it is, its length says."
    sent = len(base64.b64decode(body["messages"][-1]["content"][-1]["input_audio"]["data"])) - 44
    number = min(HEARD, key=lambda n: abs(sent - 2 * len(decode_audio(CLIPS / f"youtube_{n}.ogg"))))
    return heard_answer(*((f"00:{int(start):02}", text, 1 + i % 2) for i, (start, _, text) in enumerate(said(number))))


@pytest.mark.slow
def test_clips_that_a_server_refused_are_asked_for_again_and_no_others(tmp_path):
    front, archive = Front(copy_checkout(tmp_path)), tmp_path / "data/three"
    archive.mkdir()
    for number in HEARD:
        shutil.copy(tmp_path / f"data/harvest/archive/youtube_{number}.info.json", archive)

    def run(server, name="micro"):
        over = {"run.name": name, "harvest.videos_from": "archive", "harvest.archive": "data/three", "harvest.channels": "''",
                "harvest.audio": "false", "transcribe.fetch": "false", "diarize.method": "gemini", "diarize.llm": "openai",
                "diarize.llm_model": "any", "diarize.base_url": server.openai}
        over = {k.replace(".", "__"): v for k, v in over.items()}
        start = len(server.calls)
        front.run(**over)
        return over, [str(c["media"]) for c in server.calls[start:]]

    with LLMServer(answer=whole_answer, fault=lambda prompt, nth: "503" if nth else None) as server:
        over, refused = run(server)
        assert front.lacks("05_diarize", **over) == "2 server_error"
        assert len(refused) == 1 + 2 * 4, "one answer, and four attempts for each of the others"
        server.fault = None
        _, asked = run(server)
        assert front.lacks("05_diarize", **over) == ""
        assert len(asked) == 2 and refused[0] not in asked and set(asked) < set(refused)
        before = front.records()
        assert run(server)[1] == [] and front.records() == before, "a third run has nothing to do"
        assert len(run(server, "healthy")[1]) == 3
    assert front.tables() == front.tables("healthy")
    assert pl.read_parquet(front.data / "tables/diarizations.parquet")["status"].to_list() == ["ok"] * 3
