"Clips as the internet has them: cut, silent, empty, ten hours long; and a transcription that is killed in the middle."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from deescal.audio import find_ffmpeg
from deescal.engine.tables import check_table
from deescal.speechmodel import load_speech_model, whisper_cues
from deescal.transcribe import Hearing, transcribe_accounting, transcribe_videos, transcript_tables

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "data/clips"
NAMES = [f"youtube_{n}" for n in range(9101, 9109)]


def ffmpeg(*arguments):
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", *map(str, arguments)], check=True)


def videos_of(*names, clips=None):
    rows = [(n, "youtube", n, None, "ok", None, clip, None, None) for n, clip in zip(names, clips or [f"{n}.ogg" for n in names])]
    return pl.DataFrame(rows, orient="row", schema={
        "video_id": pl.String, "platform": pl.String, "platform_id": pl.String, "duration_s": pl.Float64,
        "status": pl.String, "caption": pl.String, "clip": pl.String, "clip_sha256": pl.String,
        "captions_sha256": pl.String})


@pytest.fixture(scope="module")
def bad_clips(tmp_path_factory):
    "A good clip, and one of each fault."
    folder = tmp_path_factory.mktemp("clips")
    source = CLIPS / "youtube_9107.ogg"
    ffmpeg("-i", source, "-c:a", "aac", folder / "good.mp4")
    ffmpeg("-i", source, "-c:a", "aac", "-movflags", "+faststart", folder / "whole.mp4")
    (folder / "no_index.mp4").write_bytes((folder / "good.mp4").read_bytes()[:20_000])
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "no_bytes.mp4").touch()
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", 20, folder / "silence.ogg")
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono", "-t", 60, "-c:a", "aac", "-b:a", "8k", folder / "minute.m4a")
    ffmpeg("-stream_loop", 599, "-i", folder / "minute.m4a", "-c", "copy", folder / "ten_hours.m4a")
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", 0.001, folder / "no_length.wav")
    return folder


def test_each_bad_clip_is_a_row_with_its_reason_and_the_good_one_is_transcribed(bad_clips, tmp_path):
    heard = []

    def hear(samples, voice):
        heard.append(len(samples))
        return whisper_cues(model, samples, voice, sample_len=16, word_times=True)

    model = load_speech_model("noise", tmp_path, device="cpu")
    names = ["good.mp4", "no_index.mp4", "half.mp4", "no_bytes.mp4", "silence.ogg", "ten_hours.m4a", "no_length.wav"]
    videos = videos_of(*(n.split(".")[0] for n in names), clips=names)
    results = transcribe_videos(videos, Hearing("whisper", "noise", sample_len=16), tmp_path / "work", bad_clips, hear)
    reasons = {r["transcript"]["video_id"]: r["transcript"]["reason"] for r in results}
    assert reasons.pop("no_length") in ("empty_clip", "no_voice")
    assert reasons == {
        "good": "no_speech_left", "no_index": "unreadable_clip", "half": "truncated_clip", "no_bytes": "empty_clip",
        "silence": "no_voice", "ten_hours": "too_long"}
    assert len(heard) == 1, "the model saw what it should not have seen"
    (good,) = (r for r in results if r["cues"])
    assert all(c["reason"] and not c["kept"] and c["avg_logprob"] < 0 for c in good["cues"])
    tables = transcript_tables(results)
    for name, table in tables.items():
        check_table(table, name)
    transcribe_accounting(len(videos), tables["transcripts"], tables["cues"])


def test_captions_of_200_megabytes_cost_neither_time_nor_the_other_videos(tmp_path):
    for name in ("youtube_9107", "youtube_9108"):
        for suffix in (".ogg", ".en.vtt"):
            (tmp_path / f"{name}{suffix}").write_bytes((CLIPS / f"{name}{suffix}").read_bytes())
    with open(tmp_path / "youtube_9107.en.vtt", "wb") as file:
        file.truncate(200_000_000)
    results = transcribe_videos(videos_of("youtube_9107", "youtube_9108"), Hearing("captions"), tmp_path / "w", tmp_path)
    assert [(r["transcript"]["status"], r["transcript"]["reason"]) for r in results] == [
        ("rejected", "captions_too_large"), ("ok", None)]


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "tests/e2e"))
from test_clips import CLIPS, NAMES, Hearing, transcribe_videos, videos_of
transcribe_videos(videos_of(*NAMES), Hearing(), Path(sys.argv[2]), CLIPS)
"""


@pytest.mark.parametrize("finished", [1, 4])
def test_a_transcription_that_is_killed_goes_on_where_it_was(tmp_path, finished):
    work = tmp_path / "work"
    env = os.environ | {"PYTHONPATH": str(ROOT), "DEESCAL_ROOT": str(ROOT)}
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT), str(work)], env=env, stderr=subprocess.DEVNULL)
    while worker.poll() is None and len(list(work.glob("[!.]*.json")) if work.is_dir() else []) < finished:
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    done = {p: (p.stat().st_mtime_ns, json.loads(p.read_text())) for p in work.glob("[!.]*.json")}
    assert len(done) >= finished
    resumed = transcribe_videos(videos_of(*NAMES), Hearing(), work, CLIPS)
    whole = transcribe_videos(videos_of(*NAMES), Hearing(), tmp_path / "alone", CLIPS)
    assert {p: p.stat().st_mtime_ns for p in done} == {p: t for p, (t, _) in done.items()}, "what was done is kept"
    for name, table in transcript_tables(whole).items():
        assert transcript_tables(resumed)[name].equals(table), name
