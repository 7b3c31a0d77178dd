"05 as a whole: kills and resumes, sound that is none, a model that listens on loopback, and what 06 reads afterwards."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
from conftest import papermill
from llm_server import LLMServer, heard_answer

from deescal.audio import SAMPLE_RATE, decode_audio, speech_probability, voice_stretches
from deescal.chunks import Chunk
from deescal.diarize import (
    answers_in_rounds, checker, diarize_here, hear, put_together, spoken_within, turns_here)
from deescal.engine.files import file_sha256
from deescal.listen import listen
from deescal.llm import PASSING_FAULTS, Door
from deescal.speakers import find_graph, load_diarizer

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "data/clips"
PATIENCE = 240  # seconds; nothing here depends on how fast it goes


# --- sound that is none -------------------------------------------------------------------------------------------

def spoilt(folder, kind):
    whole = (CLIPS / "youtube_9101.ogg").read_bytes()
    path = folder / f"{kind}.ogg"
    if kind == "cut":
        path.write_bytes(whole[:len(whole) // 3])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "prose":
        path.write_text("<html>not a video</html>" * 50)
    elif kind in ("silence", "no_length", "noise"):
        n = {"silence": 20, "no_length": 0, "noise": 20}[kind] * SAMPLE_RATE
        loud = 0.05 if kind == "noise" else 0.0
        soundfile.write(path.with_suffix(".wav"), np.random.default_rng(1).normal(0, loud + 1e-12, n) * (loud > 0), SAMPLE_RATE)
        path = path.with_suffix(".wav")
    return path


def words_every_second(seconds):
    n = int(seconds)
    return pl.DataFrame({"start_s": [float(i) for i in range(n)], "end_s": [i + 0.5 for i in range(n)],
                         "text": [f"word{i}" for i in range(n)]}, schema={
        "start_s": pl.Float64, "end_s": pl.Float64, "text": pl.String})


def diarized_here(paths, work, words):
    "What the local way makes of clips: (answers, reasons)."
    heard, reasons = hear(paths, 2700, progress=False)
    hashes = {sid: file_sha256(paths[sid]) for sid in heard}
    diarizer = load_diarizer(*(find_graph(kind, "", work=work) for kind in ("segmentation", "embedding")))

    def turns(chunk):
        return turns_here(chunk, lambda sid: decode_audio(paths[sid]), heard, diarizer, ["test"], work, hashes)

    wholes, check = [Chunk(sid, 0.0, s) for sid, (s, _) in heard.items()], checker(heard)
    done, _ = answers_in_rounds(wholes, lambda chunks: diarize_here(chunks, words, turns, heard), check, 1200, 10)
    answers = {}
    for whole in wholes:
        segments, why = put_together(whole, {c: a for c, a in done.items() if c.scenario_id == whole.scenario_id}, check)
        if why:
            reasons[whole.scenario_id] = why
        else:
            answers[whole.scenario_id] = segments
    return answers, reasons


def test_bad_sound_has_a_reason_and_the_good_clip_beside_it_is_diarized(tmp_path):
    kinds = ["cut", "empty", "prose", "silence", "no_length", "noise", "gone"]
    paths = {kind: spoilt(tmp_path, kind) for kind in kinds} | {"good": CLIPS / "youtube_9101.ogg"}
    answers, reasons = diarized_here(paths, tmp_path, lambda sid: words_every_second(18))
    assert set(answers) | set(reasons) == {*kinds, "good"} and set(answers) == {"good"}, reasons
    assert reasons["empty"] == "empty_clip" and reasons["prose"] == "unreadable_clip" and reasons["gone"] == "no_clip"
    assert reasons["cut"] in ("truncated_clip", "beyond_the_audio")  # an Ogg file does not declare its length
    assert reasons["silence"] in ("no_speaker_found", "words_without_speech")
    assert reasons["noise"] in ("no_speaker_found", "words_without_speech")
    assert " ".join(answers["good"]["text"]).split() == [f"word{i}" for i in range(18)]


def test_a_clip_longer_than_the_limit_is_skipped_and_recorded(tmp_path):
    paths = {"long": CLIPS / "youtube_9101.ogg", "short": CLIPS / "youtube_9106.ogg"}
    heard, reasons = hear(paths, 20, progress=False)
    assert reasons == {"long": "too_long"} and set(heard) == {"short"}


def test_a_long_recording_in_chunks_keeps_its_voices_and_its_words(tmp_path):
    "The same clip five times in a row, diarized in chunks of 70 seconds: two voices, every word once."
    one = decode_audio(CLIPS / "youtube_9101.ogg")
    soundfile.write(tmp_path / "long.wav", np.tile(one, 5), SAMPLE_RATE)
    paths = {"long": tmp_path / "long.wav"}
    heard, _ = hear(paths, 2700, progress=False)
    seconds = heard["long"][0]
    diarizer = load_diarizer(*(find_graph(kind, "", work=tmp_path) for kind in ("segmentation", "embedding")))
    said = words_every_second(seconds - 1)

    def turns(chunk):
        return turns_here(chunk, lambda sid: np.tile(one, 5), heard, diarizer, ["test"], tmp_path, {"long": "a" * 64})

    whole = Chunk("long", 0.0, seconds)
    done, asked = answers_in_rounds([whole], lambda cs: diarize_here(cs, lambda sid: said, turns, heard), checker(heard), 70, 15)
    segments, why = put_together(whole, done, checker(heard))
    assert why == "" and asked["long"] == 3
    assert " ".join(segments["text"]).split() == said["text"].to_list()
    assert segments["speaker_label"].n_unique() == 2


# --- a model that listens -----------------------------------------------------------------------------------------

GOOD = heard_answer(("00:01", "Good evening, I stopped you for your light.", 1), ("00:08", "Are you serious?", 2),
                    ("00:14", "License, please.", 1), ("00:25", "Fine.", 2), ("00:31", "Thank you.", 2))


@pytest.fixture(scope="module")
def clip():
    samples = decode_audio(CLIPS / "youtube_9101.ogg")
    return samples, voice_stretches(speech_probability(samples))


def listened(server, api, clip, work, longest=1200, overlap=8, **door):
    samples, voice = clip
    heard = {"youtube_9101": (len(samples) / SAMPLE_RATE, voice)}
    door = Door(api, "any", getattr(server, api), **{"attempts": 2, "wait": 0.01, "cache": str(work / "cache")} | door)

    def method(chunks):
        return listen(chunks, lambda sid: samples, lambda c: spoken_within(voice, c), door, work)[0]

    whole = Chunk("youtube_9101", 0.0, heard["youtube_9101"][0])
    done, asked = answers_in_rounds([whole], method, checker(heard), longest, overlap, shortest=8)
    return *put_together(whole, done, checker(heard)), asked["youtube_9101"]


@pytest.mark.parametrize("api", ["google", "openai"])
def test_sound_goes_out_and_segments_come_back(clip, tmp_path, api, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", "canary-key")
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    with LLMServer(answer=lambda prompt, body: GOOD) as server:
        segments, why, asked = listened(server, api, clip, tmp_path)
        assert why == "" and asked == 1 and len(server.calls) == 1
        sent = server.calls[0]
        assert len(sent["media"]) == 1 and "Write down what is said" in sent["system"] + sent["prompt"]
        again = listened(server, api, clip, tmp_path)
        assert len(server.calls) == 1 and again[0].equals(segments)  # nothing is paid for twice
    assert segments["speaker_label"].to_list() == ["[Officer]", "Speaker 2", "[Officer]", "Speaker 2", "Speaker 2"]
    assert segments["start_s"].to_list() == [1, 8, 14, 25, 31]
    assert not any("canary-key" in p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize("fault, answer, reason", [
    ("prose", None, "not_json"), ("length", None, "token_limit"), ("loop", None, "repetition"),
    ("413", None, "too_long"),
    (None, heard_answer(("00:01", "Hello there.", 1), ("00:02", "You.", 3)), "unknown_speaker"),
    (None, heard_answer(("soon", "Hello.", 1)), "unreadable_time"),
    (None, heard_answer(("00:20", "Hello.", 1), ("00:03", "You.", 2)), "times_run_backwards"),
    (None, heard_answer(("00:01", "Hello.", 1), ("09:00", "You.", 2)), "beyond_the_audio"),
    (None, heard_answer(("00:01", " ".join(f"w{k}" for k in range(400)), 1), ("00:02", "You.", 2)), "too_fast"),
    (None, heard_answer(), "no_segments")])
def test_an_answer_that_cannot_be_is_asked_again_in_halves_and_rejected_with_its_reason(
        clip, tmp_path, fault, answer, reason, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with LLMServer(answer=answer and (lambda prompt, body: answer), fault=lambda prompt, nth: fault) as server:
        segments, why, asked = listened(server, "openai", clip, tmp_path)
    assert segments is None and asked > 1
    assert why == reason


@pytest.mark.parametrize("fault", [
    "429 bare", "429 long", "quota", "500", "503", "400", "401", "404", "close", "drop", "page", "timeout"])
def test_an_outage_is_asked_about_once_and_the_next_run_gets_its_answer(clip, tmp_path, fault, monkeypatch):
    "No answer came, so no smaller piece is asked for; nothing that is kept stands in the way of a later run."
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with LLMServer(answer=lambda prompt, body: GOOD, fault=lambda prompt, nth: fault, slow=2) as server:
        segments, why, asked = listened(server, "openai", clip, tmp_path, timeout=1 if fault == "timeout" else 60)
        assert segments is None and why in PASSING_FAULTS
        assert asked == 1 and len({c["body"]["messages"][-1]["content"][-1]["input_audio"]["data"] for c in server.calls}) == 1
        server.fault = None
        segments, why, asked = listened(server, "openai", clip, tmp_path)
        assert why == "" and asked == 1 and len(segments) == 5


def test_a_loop_over_the_whole_clip_is_mended_by_halves(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")

    def answer(prompt, body):
        "A loop for more than half a minute of sound; an answer for less."
        size = len(body["messages"][-1]["content"][-1]["input_audio"]["data"])
        if size > 1_200_000:
            return heard_answer(("00:01", "hey " * 2000, 1))
        return heard_answer(("00:01", "Good evening to you.", 1), ("00:06", "Are you serious?", 2), ("00:15", "Fine, officer.", 2))

    sizes = []
    with LLMServer(answer=lambda p, b: sizes.append(len(b["messages"][-1]["content"][-1]["input_audio"]["data"])) or answer(p, b)) as server:
        segments, why, asked = listened(server, "openai", clip, tmp_path)
    assert max(sizes) > 1_200_000 > min(sizes), sizes
    assert why == "" and asked == 3 and {"[Officer]", "Speaker 2"} <= set(segments["speaker_label"])


# --- kills ----------------------------------------------------------------------------------------------------------

KILLED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_diarizing as t
work, log = Path(sys.argv[1]), Path(sys.argv[2])
real = t.turns_here
def slow(chunk, sound, *rest):
    def noted(sid):
        return sound(sid)
    import deescal.diarize as d
    make = d.speaker_turns
    def counted(*a):
        with open(log, "a") as f: f.write(f"{chunk.scenario_id}:{chunk.start_s}:{chunk.end_s}\\n")
        time.sleep(0.3)
        return make(*a)
    d.speaker_turns, kept = counted, make
    try: return real(chunk, noted, *rest)
    finally: d.speaker_turns = kept
t.turns_here = slow
paths = {p.stem: p for p in sorted(t.CLIPS.glob("youtube_*.ogg"))}
answers, reasons = t.diarized_here(paths, work, lambda sid: t.words_every_second(14))
print(json.dumps([sorted(answers), reasons]))
"""


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    "SIGKILL after three clips; the second run diarizes the others only, and its answers are those of a run in one go."
    log, env = tmp_path / "log", os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/e2e'}"}
    work = tmp_path / "work"
    command = [sys.executable, "-c", KILLED, str(work), str(log), str(ROOT / "tests/e2e")]
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + PATIENCE
    while not (log.is_file() and len(log.read_text().split()) >= 4):
        assert time.monotonic() < limit and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = log.read_text().split()
    done = {p.name: file_sha256(p) for p in work.glob("*.parquet")}
    assert 3 <= len(done) < 8
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert second.returncode == 0, second.stderr[-2000:]
    after = log.read_text().split()[len(before):]
    assert not set(before[:len(done)]) & set(after)  # what was finished is not done again
    assert all(file_sha256(work / name) == sha for name, sha in done.items())
    assert len(list(work.glob("*.parquet"))) == len(done) + len(after) and len({a.split(":")[0] for a in before + after}) == 8
    assert not list(work.glob(".*.tmp")) or len(list(work.glob(".*.tmp"))) <= 1  # what the kill left, never read


# --- the stage in a run ---------------------------------------------------------------------------------------------

def test_labelled_scenarios_are_read_by_06_as_at_their_source(new_checkout, tmp_path):
    "05 with labels alone (no video), then 06 on what it wrote: tables as from the folder itself, byte for byte."
    root = new_checkout.root
    for table in ("videos", "words", "cues", "transcripts", "decisions"):
        from deescal.engine.tables import TABLES
        for run in ("a", "b"):
            path = root / f"data/runs/{run}/tables/{table}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pl.DataFrame(schema=TABLES[table].schema).write_parquet(path)
    r = papermill(new_checkout, "05_diarize", tmp_path / "o.ipynb", run_name="a", lesson=False, labelled="data/planted")
    assert r.returncode == 0, r.stderr[-2000:]
    for run, data in (("a", ""), ("b", "data/planted")):
        r = papermill(new_checkout, "06_corpus", tmp_path / "o.ipynb", run_name=run, lesson=False, data=data)
        assert r.returncode == 0, r.stderr[-2000:]
    one, two = (root / f"data/runs/{run}/tables" for run in ("a", "b"))
    for table in ("turns", "rejects", "files", "scenarios", "platforms", "origin"):
        assert (one / f"{table}.parquet").read_bytes() == (two / f"{table}.parquet").read_bytes(), table
    assert pl.read_parquet(one / "origin.parquet")["fiction"][0]
    assert pl.read_parquet(one / "segments.parquet")["method"].unique().to_list() == ["labelled"]


def test_a_stage_that_met_an_outage_asks_its_run_to_try_again_and_the_next_run_is_done(new_checkout, tmp_path):
    from deescal.engine.tables import TABLES
    root, clip = new_checkout.root, "data/clips/youtube_9101.ogg"
    tables = root / "data/runs/a/tables"
    tables.mkdir(parents=True)
    for table in ("words", "cues", "decisions"):
        pl.DataFrame(schema=TABLES[table].schema).write_parquet(tables / f"{table}.parquet")
    known = {c.name: "" for c in TABLES["videos"].columns if not c.nullable} | {
        "video_id": "youtube_9101", "status": "ok", "clip": clip, "clip_sha256": file_sha256(root / clip)}
    pl.DataFrame([known], schema=TABLES["videos"].schema).write_parquet(tables / "videos.parquet")
    env = {"OPENAI_API_KEY": "x", "DEESCAL_JOB": "diarize"}
    again = root / "data/runs/a/jobs/diarize.again"

    def outcome():
        r = papermill(new_checkout, "05_diarize", tmp_path / "o.ipynb", env, run_name="a", lesson=False, labelled="",
                      method="gemini", llm="openai", llm_model="m", base_url=server.openai)
        assert r.returncode == 0, r.stderr[-2000:]
        return pl.read_parquet(tables / "diarizations.parquet").select("status", "reason", "asked", "segments").rows()

    with LLMServer(answer=lambda prompt, body: GOOD, fault=lambda prompt, nth: "400") as server:
        assert outcome() == [("rejected", "rejected", 1, 0)] and again.read_text() == "1 rejected"
        again.unlink()
        server.fault = None
        assert outcome() == [("ok", None, 1, 5)] and not again.exists()


def test_a_run_without_labels_or_sound_is_told_so_by_06(new_checkout, tmp_path):
    root = new_checkout.root
    from deescal.engine.tables import TABLES
    for table in ("videos", "words", "cues", "transcripts", "decisions"):
        path = root / f"data/runs/a/tables/{table}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(schema=TABLES[table].schema).write_parquet(path)
    r = papermill(new_checkout, "05_diarize", tmp_path / "o.ipynb", run_name="a", lesson=False, labelled="")
    assert r.returncode == 0, r.stderr[-2000:]
    r = papermill(new_checkout, "06_corpus", tmp_path / "o.ipynb", run_name="a", lesson=False, data="")
    assert r.returncode and "no transcript" in r.stderr
