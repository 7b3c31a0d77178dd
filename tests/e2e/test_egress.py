"What leaves the host: nothing, where nothing is switched on; and each way out is declared, told and recorded."
import importlib
import json
import shutil
import subprocess
import sys

import pytest

from conftest import edit_cell
from deescal.engine.closure import import_closure, packages_named
from deescal.engine.execute import could_send
from deescal.engine.files import project_root
from deescal.engine.jobs import resolve
from deescal.engine.series import STAGES

ASKING = {"bert_score", "datasets", "evaluate", "huggingface_hub", "nltk", "peft", "pooch", "pydantic_ai", "requests",
          "transformers", "urllib3", "httpx", "whisper", "youtube_transcript_api", "yt_dlp"}  # packages that can
KEYS = ("GOOGLE_API_KEY", "GEMINI_API_KEY", "OPENAI_API_KEY", "HF_TOKEN")
CANARY = "-".join(["canary", "5f1d0c9e7ab34"])  # not in one piece, since this file is in the checkout too
NOTE_ASKED = """
import os
def note_asked(event, args):
    "Notes each host that this process looks up or connects to, whether it gets there or not."
    if event not in ("socket.getaddrinfo", "socket.connect"): return
    where = args[0] if event == "socket.getaddrinfo" else args[1]
    if event == "socket.connect" and not isinstance(where, tuple): return   # a socket in a folder
    host = where[0] if isinstance(where, tuple) else where
    if str(host) in ("None", "", "localhost", "::1") or str(host).startswith("127."): return
    with open(os.environ["DEESCAL_ROOT"] + "/asked.txt", "a") as f: f.write(f"{host} {sys.argv[:3]}\\n")
sys.addaudithook(note_asked)
"""


@pytest.fixture
def island(new_checkout):
    "A checkout whose commands run without any network, with keys in the environment, and tell which hosts they ask for."
    if not shutil.which("unshare") or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here: that needs Linux, unshare and the right to do so")
    with open(new_checkout.root / ".hooks/sitecustomize.py", "a") as f:
        f.write(NOTE_ASKED)
    new_checkout.env = new_checkout.env | dict.fromkeys(KEYS, CANARY)
    new_checkout.env.pop("HF_HUB_OFFLINE", None)   # nothing but the profile keeps the run at home
    outside = new_checkout.command
    new_checkout.command = lambda *args: ["unshare", "-n", *outside(*args)]
    return new_checkout


def stayed_at_home(checkout):
    "Asserts that the run's jobs could not send, did not try, and kept no key; returns their records."
    records = checkout.records()
    assert {n: r["could_send"] for n, r in records.items() if r["could_send"]} == {}
    asked = checkout.root / "asked.txt"
    assert not asked.exists(), asked.read_text()
    found = [p for p in checkout.root.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert found == []
    return records


def test_the_jobs_that_meet_the_world_run_without_a_network_and_keep_no_key(island):
    front = ("01_harvest", "02_transcribe", "03_annotate", "04_select", "05_diarize")
    for name in front:
        island.deescal("job", name, "--profile", "micro")
    assert set(stayed_at_home(island)) == set(front)


@pytest.mark.slow
def test_the_whole_series_runs_without_a_network_and_keeps_no_key(island):
    said = island.reproduce()
    assert CANARY not in said.stdout + said.stderr
    records = stayed_at_home(island)
    assert {n.split("-")[0] for n in records} == {s.notebook for s in STAGES.values()}
    manifest = json.loads((island.root / "data/runs/micro/manifest.json").read_text())
    assert all(j["could_send"] == [] for j in manifest["jobs"].values())


def test_a_process_that_asks_for_a_host_is_noticed(island):
    "What the tests above rest on: a look-up is noted, and does not get out."
    code = "import socket; socket.create_connection(('example.org', 80), 5)"
    program = ["unshare", "-n", sys.executable, "-c", code]
    r = subprocess.run(program, cwd=island.root, env=island.env, capture_output=True, text=True)
    assert r.returncode and "gaierror" in r.stderr
    with pytest.raises(AssertionError, match="example.org"):
        stayed_at_home(island)


ONE_JOB = """
import os
from deescal.engine.execute import run_job
from deescal.engine.jobs import resolve
before = dict(os.environ)
assert [run_job(j) for j in resolve("micro")[:1]] == ["done"]
assert dict(os.environ) == before, set(os.environ) ^ set(before)
"""


def test_what_a_kernel_is_told_stays_out_of_the_process_that_started_it(new_checkout):
    "Or the next job of that process, which may ask the network, would be told that it must not."
    root, env = new_checkout.root, {k: v for k, v in new_checkout.env.items() if k != "HF_HUB_OFFLINE"}
    edit_cell(root, "01_harvest", "run_it", lambda s: f"{s}\nimport os\nrun.path('told').write_text(os.environ['HF_HUB_OFFLINE'])")
    r = subprocess.run([sys.executable, "-c", ONE_JOB], cwd=root, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert (root / "told").read_text() == "1"


def test_a_stage_that_imports_what_can_send_declares_its_way_out():
    root = project_root()
    quiet = {"errorrates"}  # takes Whisper's table of spellings, and no model
    can = {s.name for s in STAGES.values() if ASKING & packages_named(set(import_closure([s.name], root)) - quiet, root)}
    assert can == {s.name for s in STAGES.values() if s.egress}
    assert all(callable(importlib.import_module(f"deescal.{s.egress}").egress) for s in STAGES.values() if s.egress)


def test_what_is_switched_on_is_named_with_its_stage():
    from deescal.engine.cli import told_hosts
    from deescal.engine.provenance import hub_host
    on = {"harvest.videos_from": "network", "harvest.youtube": True, "transcribe.fetch": True, "transcribe.method": "auto",
          "diarize.method": "gemini", "diarize.llm": "google",
          "score.encoder": "roberta-large"}
    jobs = resolve("micro", on)
    assert {j.name: could_send(j) for j in jobs if could_send(j)} == {
        "01_harvest": ["youtube.com"], "02_transcribe": ["youtube.com"],
        "05_diarize": ["generativelanguage.googleapis.com"]} | ({"11_score": [hub_host()]} if hub_host() else {})
    told = told_hosts(jobs)
    assert told.startswith("youtube.com (01_harvest, 02_transcribe); generativelanguage.googleapis.com (05_diarize)")
    assert told_hosts(resolve("micro")) == told_hosts(resolve("sample")) == "nobody"
