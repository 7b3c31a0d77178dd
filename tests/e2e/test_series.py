"The whole series on eight scenarios: what runs, what does not run again, and what a report holds."
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import polars as pl
import pytest

from conftest import edit_cell
from deescal.engine.jobs import resolve

JOBS = {j.name for j in resolve("micro")}
BEFORE = {name for name in JOBS if name < "06_corpus"}


def test_a_fresh_checkout_executes_every_stage_and_ends_with_the_report(checkout):
    assert set(checkout.records()) == JOBS
    assert (f"Executed {len(JOBS)} of {len(JOBS)} jobs" in checkout.first_output
            and checkout.first_output.rstrip().endswith("Report: figures/micro/report.html"))
    manifest = json.loads((checkout.root / "data/runs/micro/manifest.json").read_text())
    assert set(manifest["jobs"]) == JOBS and manifest["versions"]["polars"] == pl.__version__
    assert all(j["peak_mb"] > 10 and j["seconds"] > 0 for j in manifest["jobs"].values())
    assert "files are as recorded" in checkout.deescal("verify", "--profile", "micro").stdout


def test_nothing_changed_nothing_runs(checkout):
    before = checkout.records()
    for p in (checkout.root / "data").rglob("*"):
        os.utime(p)
    assert "nothing has changed, so nothing was run" in checkout.reproduce().stdout
    assert checkout.ran(before) == set()


def test_editing_prose_reruns_nothing(checkout):
    before = checkout.records()
    for name, cell in (("06_corpus", "roles_md"), ("14_report", "title")):
        edit_cell(checkout.root, name, cell, lambda s: s + "\n\nOne more sentence.")
    module = checkout.root / "deescal/corpus.py"
    module.write_text(module.read_text() + "\n# a comment\n")
    assert "nothing was run" in checkout.reproduce().stdout and checkout.ran(before) == set()


def test_a_report_parameter_reruns_only_the_report(checkout):
    before = checkout.records()
    checkout.reproduce("--set", "report.title=Another title")
    assert checkout.ran(before) == {"14_report"}
    assert "Another title" in (checkout.root / "figures/micro/report.html").read_text()
    checkout.reproduce()


def test_an_upstream_change_without_effect_stops_there(checkout):
    before = checkout.records()
    out = checkout.reproduce("--set", "audit.min_shared=7").stdout
    assert checkout.ran(before) == {"07_audit"} and "08_examples: inputs unchanged, kept" in out
    checkout.reproduce()
    assert "nothing was run" in checkout.reproduce().stdout


def test_braces_quotes_and_semicolons_pass_through(checkout):
    before = checkout.records()
    checkout.reproduce("--set", "report.title=A {brace}; a 'quote' and a $HOME")
    assert checkout.ran(before) == {"14_report"}
    assert "A {brace}; a &#39;quote&#39; and a $HOME" in (checkout.root / "figures/micro/report.html").read_text()
    checkout.reproduce()


def test_a_page_that_is_gone_is_rendered_again(checkout):
    before, page = checkout.records(), checkout.root / "figures/micro/notebooks/07_audit.html"
    text = page.read_text()
    page.unlink()
    assert "07_audit: page rendered" in checkout.reproduce().stdout
    assert checkout.ran(before) == set() and page.read_text() == text


HEADER = "start_time,speaker_label,transcript\n"


@pytest.mark.parametrize("name, files, words", [
    ("rejected", {"a": "", "b": "x,y\n1,2\n"}, ["not a single turn", "a.csv: empty_file", "remedy"]),
    ("alone", {"a": HEADER + "0:01,[Officer],Hi.\n0:02,Dale,Yes.\n"},
     ["no point to learn from", "0 messages", "run.corpus=raw"]),
    ("onesided", {f"s{i}": HEADER + "0:01,[Officer],Hi.\n" for i in range(6)},
     ["no point to learn from", "0 of civilians", "run.corpus=raw"]),
])
def test_a_corpus_too_small_or_one_sided_is_an_error_with_a_remedy(checkout, name, files, words):
    folder = checkout.root / "data" / name
    folder.mkdir()
    for stem, text in files.items():
        (folder / f"{stem}.csv").write_text(text)
    r = checkout.reproduce("--run", name, "--data", f"data/{name}", ok=False)
    assert r.returncode and all(w in r.stdout + r.stderr for w in words), r.stdout + r.stderr
    assert "Traceback" not in r.stdout + r.stderr


def test_real_data_is_neither_called_fiction_nor_published(checkout):
    r = checkout.deescal("publish", "--profile", "micro", "--data", "data/elsewhere", ok=False)
    assert r.returncode and "not the sample's own" in r.stderr


def test_a_table_changed_on_disk_is_made_again(checkout):
    before, path = checkout.records(), checkout.root / "data/runs/micro/tables/groups.parquet"
    whole = path.read_bytes()
    pl.read_parquet(path).head(3).write_parquet(path)
    assert checkout.deescal("verify", "--profile", "micro", ok=False).returncode == 1
    checkout.reproduce()
    assert checkout.ran(before) == {"07_audit"} and path.read_bytes() == whole


def kill(checkout, run, when, *args):
    checkout.kill(checkout.command("reproduce", "--profile", "micro", "--run", run, *args), when)


def test_a_killed_run_is_completed_without_repeating_anything_and_gives_the_same_bytes(checkout):
    data, figures = checkout.root / "data/runs/killed", checkout.root / "figures/killed/notebooks"
    kill(checkout, "killed", lambda: (figures / "06_corpus.failed.ipynb").exists())
    assert set(checkout.records("killed")) == BEFORE
    kill(checkout, "killed", lambda: (figures / "07_audit.failed.ipynb").exists())
    finished = checkout.records("killed")
    assert set(finished) == BEFORE | {"06_corpus"}
    assert f"Executed {len(JOBS) - len(finished)} of {len(JOBS)} jobs" in checkout.reproduce("--run", "killed").stdout
    assert {n: r for n, r in checkout.records("killed").items() if n in finished} == finished
    one, two = checkout.tables(), checkout.tables("killed")
    assert len(one) > 40 and {n for n in one if one[n] != two.get(n)} == set() and one.keys() == two.keys()
    for name in ("loss-tiny.png", "loss-tiny.svg", "lengths.png", "lengths.svg"):
        assert (checkout.root / "figures/killed" / name).read_bytes() == (checkout.root / "figures/micro" / name).read_bytes()
    assert not [p for p in (data / "tables").rglob("*") if p.suffix == ".tmp"]


@pytest.mark.slow
def test_a_run_killed_three_times_in_training_and_in_generation_gives_the_same_adapter_and_replies(checkout):
    data, args = checkout.root / "data/runs/often", ("--set", "generate.shard=40")
    def checkpoint(stage, step):
        return lambda: list((data / "work").glob(f"{stage}-tiny/*/checkpoint-{step}/whole.json"))
    def shards(n): return lambda: len(list((data / "work/generate-tiny-tuned").glob("*/*.parquet"))) >= n
    for when in (checkpoint("base", 20), checkpoint("finetune", 35), checkpoint("finetune", 70),
                 checkpoint("finetune", 140), shards(1), shards(2), shards(3)):
        kill(checkout, "often", when, *args)
    checkout.reproduce("--run", "often", *args)
    whole = checkout.root / "data/runs/micro"
    for name in ("base/tiny/model.safetensors", "adapter/tiny/adapter_model.safetensors"):
        assert (data / name).read_bytes() == (whole / name).read_bytes(), name
    assert checkout.tables("often") == checkout.tables()
    log = pl.read_parquet(data / "tables/finetune_timings/tiny.parquet").row(0, named=True)
    assert log["resumed_from"] == 140 and [p.name for p in (data / "work").iterdir()] == ["transcribe"]


def test_a_second_process_on_the_same_run_is_told_so(checkout):
    code = (f"from deescal.engine.jobs import lock; from deescal.engine.run import Run; import time; h = lock(Run('micro', root={str(checkout.root)!r})); "
            "print('held', flush=True); time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", code], env=checkout.env, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline().strip() == "held"
        def plans():
            return {p: p.read_bytes() for d in ("params", "jobs")
                    for p in (checkout.root / "data/runs/micro" / d).iterdir()}
        before = plans()
        r = checkout.reproduce("--set", "report.title=Locked", ok=False)
        assert r.returncode and "is being executed by another process" in r.stdout + r.stderr
        assert plans() == before, "a refused command changed the run"
    finally:
        p.kill()
        p.wait()


def test_a_planted_failing_test_fails_pytest_and_the_notebook(new_checkout):
    c = new_checkout
    nb_path = c.root / "nbs/06_corpus.ipynb"
    nb = nbformat.read(nb_path, as_version=4)
    nb.cells.insert(
        -1, nbformat.v4.new_code_cell("#| test\ndef test_planted(): assert count_words() is None", id="planted"))
    nbformat.write(nb, nb_path)
    subprocess.run([sys.executable, "-c", "from deescal.engine.export import export; export()"],
                   cwd=c.root, env=c.env, check=True, capture_output=True)
    r = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_corpus.py"],
                       cwd=c.root, env=c.env, capture_output=True, text=True)
    assert "1 failed" in r.stdout and "test_planted" in r.stdout
    out = c.root / "out.ipynb"
    by_hand = ["papermill", "-k", "python3", "--cwd", "nbs", "-p", "data", "data/planted", "nbs/06_corpus.ipynb", str(out)]
    r = subprocess.run([sys.executable, "-m", *by_hand], cwd=c.root, env=c.env, capture_output=True, text=True)
    assert r.returncode and "tests of 06_corpus failed" in r.stderr, "by hand the last cell runs the tests"
    c.deescal("job", "06_corpus", "--profile", "micro", "--data", "data/planted", "--set", "run.lesson=true")
    assert set(c.records()) == {"06_corpus"}, "a job runs no tests"


DIES = "import os\nos.write(2, b'last words')\nos.abort()"


def test_a_kernel_that_dies_is_an_error_with_its_last_words_on_fiction(new_checkout):
    c = new_checkout
    c.deescal("job", "06_corpus", "--profile", "micro", "--data", "data/planted")
    edit_cell(c.root, "07_audit", "run_it", lambda s: DIES)
    r = c.deescal("job", "07_audit", "--profile", "micro", "--data", "data/planted", ok=False)
    assert (r.returncode and "07_audit stopped: its kernel died, and said" in r.stderr and "last words" in r.stderr
            and "remedy" in r.stderr)
    assert "Traceback" not in r.stderr and set(c.records()) == {"06_corpus"}


@pytest.mark.parametrize("stage", ["06_corpus", "07_audit"])
def test_last_words_that_may_be_of_real_people_are_told_by_hand_only(new_checkout, stage):
    "Before the corpus is read nobody knows whose they are; behind it they are of data that is not fiction."
    c, given = new_checkout, ["--profile", "micro", "--data", "data/real"]
    (c.root / "data/real").mkdir()
    (c.root / "data/real/youtube_1.csv").write_text(
        "start_time,speaker_label,transcript\n0:01,Officer,Step out.\n0:02,Dale,Why me?\n")
    if stage != "06_corpus":
        c.deescal("job", "06_corpus", *given)
    edit_cell(c.root, stage, "run_it", lambda s: DIES)
    r = c.deescal("job", stage, *given, ok=False)
    said = " ".join((r.stdout + r.stderr).split())
    assert r.returncode and f"{stage} stopped: its kernel died (what it said is not shown" in said
    for p in (p for f in ("data/runs", "figures") for p in (c.root / f / "micro").rglob("*") if p.is_file()):
        assert p.suffix == ".ipynb" or b"last words" not in p.read_bytes(), p  # there it stands in the cell itself
    assert "last words" not in said
    command = re.search(r"(papermill .*? nbs/\S+ \S+)", said)[1].split()
    by_hand = subprocess.run([sys.executable, "-m", *command], cwd=c.root, env=c.env, capture_output=True, text=True)
    assert by_hand.returncode and "last words" in by_hand.stderr


HOSTILE = "zebraquartz <img src=x onerror=alert(1)> & \\textbf{x} | $1"


def test_nothing_from_the_data_shows_or_runs_where_text_may_not_be_shown(checkout):
    data = checkout.root / "data/hostile"
    shutil.copytree(checkout.root / "data/sample", data)
    for p in sorted(data.glob("*.csv"))[:12]:
        p.write_text(p.read_text() + f'59:59,<script>alert(1)</script>,"{HOSTILE}"\n59:59,[Officer],"{HOSTILE}"\n'
                     f'59:59,Dale,"{HOSTILE}"\n')
    (data / "youtube_bad <b>.csv").write_text("start_time,speaker_label,transcript\n0:01,zebraquartz\n")
    checkout.reproduce("--run", "hostile", "--data", "data/hostile", "--set",
                       "run.show_text=false; corpus.scenarios=12; report.title=<script>alert(2)</script>; base.steps=4; "
                       "finetune.epochs=0.2; generate.max_new_tokens=4")
    for p in (checkout.root / "figures/hostile").rglob("*"):
        if p.is_file() and p.suffix != ".png":
            text = p.read_text()
            assert "zebraquartz" not in text, p
            assert p.suffix not in (".html", ".svg") or "<script>alert" not in text, p
            assert "Fictional sample" not in text or p.suffix == ".ipynb" or "notebooks" in p.parts, p


def test_the_report_needs_no_network(checkout):
    pages = [checkout.root / "figures/micro/report.html", *(checkout.root / "figures/micro/notebooks").glob("*.html")]
    assert len(pages) == len(JOBS) + 1
    for p in pages:
        html = re.sub(r'<a href="https://[^"]*"', "<a", p.read_text())  # a link is for the reader to follow
        assert not re.search(r"""<(?:script|link|iframe)\b|(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|"""
                             r"""url\(\s*["']?http""", html), p
        for target in re.findall(r'href="(notebooks/[^"]+)"', html):
            assert (p.parent / target).is_file(), target


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH: apt install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(checkout, tmp_path, width):
    pages = [checkout.root / "figures/micro/report.html",
             *sorted((checkout.root / "figures/micro/notebooks").glob("*.html"))]
    frames = "".join(f'<iframe src="file://{p}" width={width} height=800></iframe>' for p in pages)
    script = ("onload=()=>document.body.innerHTML='<p>'+[...document.querySelectorAll('iframe')]"
              ".map(f=>f.contentDocument.documentElement.scrollWidth).join(' ')+'</p>'")
    (tmp_path / "frame.html").write_text(f"<body>{frames}<script>{script}</script></body>")
    flags = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --allow-file-access-from-files --virtual-time-budget=5000")
    dom = subprocess.run(["chromium", *flags.split(), f"--user-data-dir={tmp_path}/profile", "--dump-dom",
                          f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120).stdout
    widths = [int(w) for w in re.search(r"<p>([\d ]+)</p>", dom)[1].split()]
    assert len(widths) == len(pages) and max(widths) <= width, dict(zip([p.name for p in pages], widths))
