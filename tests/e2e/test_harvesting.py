"A harvest that is killed, one that is attacked, lists of any size, and the released list itself."
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import polars as pl
import pytest
from platform_server import Loopback, Platform

from deescal.engine.files import path_sha256
from deescal.harvest import find_clips, from_network, from_released, harvest_accounting, harvest_tables
from deescal.platforms import RateLimited
from deescal.videolist import CHANNELS, read_channels, read_info_folder, read_video_list

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DEESCAL_DATA") or ROOT.parent / "shared" / "data" / "deescalwild")
RELEASED = SHARED / "sources" / "youtube_videos.csv"
needs_list = pytest.mark.skipif(not RELEASED.is_file(), reason=f"no sources/{RELEASED.name} in DEESCAL_DATA=<folder>")

CODE = """
import json, sys
from pathlib import Path
{before}
from deescal.harvest import from_network
from deescal.videolist import read_channels
found = from_network(read_channels(Path(sys.argv[1]).read_bytes()), sys.argv[2], ["youtube"], per_hour=10**9, sleep_s=0,
                     loopback=sys.argv[3], **json.loads(sys.argv[4]))
{after}
print(json.dumps([found.count, len(found.rows), sorted(found.rows["status"].to_list())]))
"""


def harvest(server, folder, before="", after="", **more):
    "A harvest in a process of its own."
    lines = "".join(f"{c[2:].split('/')[0]},https://www.youtube.com{c.rsplit('/', 1)[0]}\n" for c in server.channels)
    (folder / "channels.csv").write_text("channel,url\n" + lines)
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(before=before, after=after), folder / "channels.csv", folder / "kept",
         server.base, json.dumps(more)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def test_a_harvest_that_is_killed_again_and_again_loses_no_row_and_asks_at_most_once_more(tmp_path):
    oak, elm = [f"a{i}" for i in range(40)], [f"b{i}" for i in range(20)] + ["a0"]
    gone = {"/watch?v=a7": 404, "/watch?v=b3": 403}
    with Platform({"/@oak/videos": oak, "/@elm/videos": elm}, slow=0.01, fail=gone) as server:
        kills = 0
        for wanted in (5, 12, 25, 45):
            process = harvest(server, tmp_path)
            while process.poll() is None and len(list((tmp_path / "kept" / "info").glob("*.info.json"))) < wanted:
                time.sleep(0.005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.communicate()
            for path in (tmp_path / "kept" / "info").glob("*.info.json"):
                json.loads(path.read_text())  # whatever is under its name is whole
        count, rows, statuses = result(harvest(server, tmp_path))
        assert kills >= 3 and count == rows == 61 and statuses == ["deleted"] + ["ok"] * 59 + ["restricted"]
        asked = [server.asked.count(f"/watch?v={v}") for v in {*oak, *elm}]
        assert min(asked) == 1 and sum(asked) - 60 <= kills  # a kill costs the video that was being asked for
        before = len(server.asked)
        assert result(harvest(server, tmp_path))[:2] == [61, 61] and len(server.asked) == before
    archive = (tmp_path / "kept" / "archive.txt").read_text().splitlines()
    assert sorted(archive) == sorted(f"youtube {v}" for v in {*oak, *elm})


def test_a_rate_limit_is_an_error_that_says_how_to_go_on_and_partial_goes_on(tmp_path):
    with Platform({"/@oak/videos": ["a1", "a2", "a3"]}, fail={"/watch?v=a2": 429}) as server:
        process = harvest(server, tmp_path)
        assert process.wait(300) != 0
        assert "RateLimited" in (err := process.stderr.read()) and "goes on from there" in err
        assert result(harvest(server, tmp_path, partial=True)) == [3, 3, ["not_checked", "not_checked", "ok"]]
        server.fail.clear()
        assert result(harvest(server, tmp_path)) == [3, 3, ["ok"] * 3]


GUARD = """
import sys
seen = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"): seen.append([event, repr(args)[:300]])
    if event == "socket.connect": seen.append([event, repr(args[1])])
    if event == "open" and set(str(args[1])) & set("wax+"): seen.append(["write", str(args[0])])
sys.addaudithook(hook)
"""
KEEP = "Path(sys.argv[2], 'seen.json').write_text(json.dumps(seen))"


def test_addresses_from_outside_reach_no_shell_no_file_and_no_other_host(tmp_path):
    bad = ["file:///etc/passwd", "https://127.0.0.1:1/watch?v=x", "https://www.youtube.com/watch?v=../../x",
           "ytsearch9:police", "https://www.youtube.com/watch?v=$(touch pwned)",
           "https://www.youtube.com/watch?v=--exec",
           "https://user:pw@www.youtube.com/watch?v=x", "https://vimeo.com/1", "http://www.youtube.com/watch?v=x"]
    with Platform({"/@oak/videos": [*bad, "a1"]}) as server:
        assert result(harvest(server, tmp_path, GUARD, KEEP))[0] == 2, "the odd, harmless identifier --exec, and a1"
        assert {p.split("=")[-1] for p in server.asked if "watch" in p} <= {"--exec", "a1"}
    seen = json.loads((tmp_path / "kept" / "seen.json").read_text())
    port = server.base.rpartition(":")[2]
    assert {a for e, a in seen if e == "socket.connect"} == {f"('127.0.0.1', {port})"}
    assert not any(word in a for e, a in seen if e != "write" for word in ("pwned", "exec'", "passwd", "police"))
    written = [Path(a) for e, a in seen if e == "write" and not a.isdigit()]
    assert all(p.is_relative_to(tmp_path) or p.is_relative_to("/dev") for p in written if p.is_absolute()), written


def test_audio_is_fetched_under_the_name_of_its_video(tmp_path):
    with Platform({"/@oak/videos": ["a1", "a2"]}, fail={"/watch?v=a2": 404}) as server:
        assert result(harvest(server, tmp_path, audio=True)) == [2, 2, ["deleted", "ok"]]
        clips = find_clips([tmp_path / "kept" / "audio"], tmp_path)
        assert clips.select("video_id", "clip").rows() == [("youtube_a1", "kept/audio/youtube_a1.mp4")]
        asked = server.asked.count("/clip.mp4")
        assert result(harvest(server, tmp_path, audio=True))[0] == 2 and server.asked.count("/clip.mp4") == asked


def asked_here(server, folder, **more):
    listed = read_channels(b"channel,url\nOak,https://www.youtube.com/@oak\n")
    found = from_network(listed, folder / "kept", ["youtube"], audio=True, per_hour=10**9, sleep_s=0,
                         loopback=server.base, **more)
    return harvest_tables(found, "network", find_clips([folder / "kept" / "audio"], folder))["videos"]


def test_audio_that_did_not_come_has_its_reason_and_a_rate_limit_stops_unless_partial(tmp_path):
    with Platform({"/@oak/videos": ["a1", "a2", "a3"]}) as server:
        assert result(harvest(server, tmp_path)) == [3, 3, ["ok"] * 3], "their facts, no audio"
        asked_here(server, tmp_path, forgotten=lambda ids: set(ids) & {"youtube_a2", "youtube_a3"})
        server.fail["/clip.mp4"] = 429
        with pytest.raises(RateLimited):
            asked_here(server, tmp_path)
        videos = asked_here(server, tmp_path, partial=True)
        assert videos.select("platform_id", "clip", "clip_reason").rows() == [
            ("a1", "kept/audio/youtube_a1.mp4", None), ("a2", None, "rate_limited"), ("a3", None, "rate_limited")]
        asked = len(server.asked)
        videos = asked_here(server, tmp_path, forgotten=lambda ids: set(ids) & {"youtube_a2", "youtube_a3"})
        assert videos["clip_reason"].null_count() == 3 and len(server.asked) == asked, "nobody asks for the forgotten"
        server.fail["/clip.mp4"] = 404
        assert asked_here(server, tmp_path)["clip_reason"].to_list() == [None, "http_404", "http_404"]


HEAD = "id,Index,Title,URL,Uploader,Views,Upload Date,Duration (sec),Description,Transcript,channel_name\n"


def test_a_caption_of_200_megabytes_costs_its_own_cell():
    huge = "said so, " * 22_000_000
    data = (HEAD + f'1,1,t,https://youtu.be/a,,,,,,"{huge}",c\n2,2,u,https://youtu.be/b,,,,,,Stop.,c\n').encode()
    assert len(data) > 198_000_000
    frame, rejects, count = read_video_list(data)
    assert frame.select("caption", "caption_reason").rows() == [(None, "too_long"), ("Stop.", None)]
    assert (count, len(rejects)) == (2, 0)


def test_an_info_file_of_any_size_is_not_read_whole(tmp_path):
    with open(tmp_path / "big.info.json", "wb") as f:
        f.truncate(5_000_000_000)  # a file of holes: reading it whole would take five gigabytes
    rows, rejects, count = read_info_folder(tmp_path)
    assert (len(rows), rejects["reason"].to_list(), count) == (0, ["too_large"], 1)


@needs_list
def test_the_released_list_is_read_whole():
    before = path_sha256(RELEASED)
    found = from_released(RELEASED, pl.DataFrame(schema=CHANNELS))
    tables = harvest_tables(found, "released", find_clips([], ROOT))
    videos = tables["videos"]
    assert len(videos) == found.count == 2103 and len(tables["harvest_rejects"]) == 0
    assert dict(videos.group_by("caption_reason").len().rows()) == {None: 12, "captions_blocked": 166, "empty": 1925}
    assert not videos["caption"].drop_nulls().str.contains("Could not retrieve a transcript|Error fetching").any()
    assert videos.select("duration_s", "views", "uploaded", "title").null_count().sum_horizontal()[0] == 0
    accounting = harvest_accounting(found.count, tables)
    assert accounting.filter(unit="record", measure="out")["count"][0] == 2103 and path_sha256(RELEASED) == before


@needs_list
def test_what_the_published_filter_broke_in_the_released_list_comes_back():
    data = RELEASED.read_bytes()
    whole, _, _ = read_video_list(data)
    broken, _, _ = read_video_list(data.decode("utf-8-sig").encode().decode("sloppy-windows-1252").encode())
    assert broken["repairs"].str.contains("encoding").sum() > 200
    assert broken.select("title", "channel", "caption").equals(whole.select("title", "channel", "caption"))


def test_fetching_that_is_killed_goes_on_and_ends_with_the_same_files(tmp_path):
    head = "start_time,speaker_label,transcript\n"
    files = {f"youtube_{i}.csv": f"{head}0:01,A,{i}{'x' * 400_000}\n".encode() for i in range(30)}
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *a):
            pass

        def do_GET(self):
            entries = [{"directoryLabel": "train", "dataFile": {
                "id": i, "filename": n, "filesize": len(b), "md5": hashlib.md5(b).hexdigest()}}
                for i, (n, b) in enumerate(files.items())]
            body, start = json.dumps({"data": {"latestVersion": {"files": entries}}}).encode(), 0
            if "/api/access/" in self.path:
                asked.append(self.path)
                whole = list(files.values())[int(self.path.rpartition("/")[2])]
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                body = whole[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                for i in range(0, len(body), 40_000):
                    self.wfile.write(body[i:i + 40_000])
                    time.sleep(0.002)
            except ConnectionError:
                pass

    with Loopback(Answer) as server:
        command = [sys.executable, "-m", "deescal.fetch", "--to", str(tmp_path), "--server", server.base]
        kills = 0
        for wanted in (3, 10, 20):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(tmp_path.glob("train/*.csv"))) < wanted:
                time.sleep(0.005)
            if process.poll() is None:
                process.kill()
                kills += 1
            process.wait()
            assert all(p.read_bytes() == files[p.name] for p in tmp_path.glob("train/*.csv"))
        last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert last.returncode == 0, last.stderr[-2000:]
    assert {p.name: p.read_bytes() for p in tmp_path.glob("train/*.csv")} == files
    assert kills >= 2 and len(asked) <= len(files) + 4 * kills  # a kill costs no more than what was under way

