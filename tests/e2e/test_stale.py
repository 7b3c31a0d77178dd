"A job is stale only for what it computes: each kind of edit, and which jobs, pages and tables it reaches."
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import Checkout, edit_cell
from deescal.engine.closure import import_closure
from deescal.engine.jobs import page_stale, resolve, stale


@pytest.fixture(scope="module")
def finished(checkout, tmp_path_factory):
    "A copy of the finished micro run: its files may be edited, and are put back after each test."
    root = tmp_path_factory.mktemp("stale") / "copy"
    shutil.copytree(checkout.root, root, symlinks=True)
    return Checkout(root)


@pytest.fixture
def copy(finished, monkeypatch):
    "The copy, as the project of this process; what a test edits is as before when it has ended."
    monkeypatch.setenv("DEESCAL_ROOT", str(finished.root))
    kept = {p: p.read_bytes() for folder in ("nbs", "deescal", "data/gold") for p in (finished.root / folder).rglob("*") if p.is_file()}
    yield finished
    for p in {p for folder in ("nbs", "deescal", "data/gold") for p in (finished.root / folder).rglob("*") if p.is_file()} - set(kept):
        p.unlink()
    for p, data in kept.items():
        if p.read_bytes() != data:
            p.write_bytes(data)
            os.utime(p, None)


def reached(root):
    "(names of the stale jobs, names of those of which only the page is)."
    jobs = resolve("micro", root=root)
    compute = {j.name for j in jobs if stale(j)}
    return compute, {j.name for j in jobs if page_stale(j)} - compute


def edit_text(path, more):
    path.write_text(path.read_text() + more)


def edit_module(root, name, old, new):
    path = root / "deescal" / f"{name}.py"
    text = path.read_text()
    assert old in text, f"{name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def add_line(line):
    return lambda s: s + "\n" + line


# what is edited, how, which jobs are stale then, and of which only the page
EDITS = {
    "one CSS number": (
        lambda r: (r / "deescal/engine/templates/style.css").write_text("h1{font-size:9rem}"), set(), set()),
    "the layout of a page": (
        lambda r: edit_module(r, "engine/page", "def layout_sha256", "LAYOUT = 2\n\ndef layout_sha256"), set(), set()),
    "a sentence of prose": (
        lambda r: edit_cell(r, "09_finetune", "lora_md", add_line("One more sentence.")), set(), set()),
    "a new table of score": (
        lambda r: edit_cell(r, "11_score", "stage", lambda s: s.replace(
            "TABLES = {", 'TABLES = {\n    "extra": """(name) a new table\n        name str: a name""",', 1)),
        {"11_score"}, set()),
    "what a column means": (
        lambda r: edit_cell(r, "06_corpus", "stage", lambda s: s.replace("position in the scenario", "place in it")),
        set(), set()),
    "a column's type in a table of the base": (
        lambda r: edit_cell(r, "08d_base", "stage", lambda s: s.replace("vocabulary int", "vocabulary float")),
        {"08d_base-tiny", "14_report"}, set()),
    "a label in loss_figure": (
        lambda r: edit_module(r, "figures", '"loss (nats a token)"', '"loss, nats a token"'),
        {"14_report"}, {"02_transcribe", "03_annotate", "05_diarize", "07d_datacard", "08d_base-tiny", "09_finetune-tiny"}),
    "a sentence of a card": (
        lambda r: edit_module(r, "cards", "transcription errors", "errors of transcription"),
        {"07d_datacard", "09e_modelcards"}, set()),
    "an assert in a test cell": (
        lambda r: edit_cell(r, "09_finetune", "recipes_test", add_line("assert True")), set(), set()),
    "a show cell": (
        lambda r: edit_cell(r, "09_finetune", "output", add_line("print(1)")), set(), {"09_finetune-tiny"}),
    "a run cell": (
        lambda r: edit_cell(r, "07_audit", "run_it", add_line("x = 1")), {"07_audit"}, set()),
    "the measured figures that a card quotes": (
        lambda r: (r / "data/gold/personal.json").write_text("{}"), {"07d_datacard"}, set()),
    "the weights of the roles": (
        lambda r: edit_text(r / "deescal/roles.json", "\n"), {"06_corpus", "07b_clean", "07d_datacard"}, set()),
    "a command": (
        lambda r: edit_module(r, "engine/drive", "def clock(seconds)", "CLOCK = 1\n\ndef clock(seconds)"), set(), set()),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_reaches_what_it_decides_and_nothing_else(copy, what):
    assert reached(copy.root) == (set(), set()), "the run is not finished to begin with"
    edit, jobs, pages = EDITS[what]
    edit(copy.root)
    assert reached(copy.root) == (jobs, pages)


def test_an_example_reaches_a_page_only_where_it_is_shown(copy):
    edit_cell(copy.root, "08_examples", "split_example", add_line("1 + 1"))
    def pages(**over): return {j.name for j in resolve("micro", over, root=copy.root) if page_stale(j)}
    assert pages() == set() and "08_examples" in pages(**{"run.lesson": True})


def test_another_version_of_a_package_reaches_the_jobs_that_import_it(copy, monkeypatch, tmp_path):
    "A newer sacrebleu is put before the one that is installed: its metadata, which is where versions are read."
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "sacrebleu-99.0.dist-info").mkdir()
    (tmp_path / "sacrebleu-99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: sacrebleu\nVersion: 99.0\n")
    jobs = {j.name: stale(j) for j in resolve("micro", root=copy.root)}
    assert "version sacrebleu changed" in jobs["11_score"] and jobs["06_corpus"] == [] and jobs["09_finetune-tiny"] == []


@pytest.mark.parametrize("module", ["finetune", "train", "chat", "base", "text", "engine/files", "engine/tables", "engine/run"])
def test_training_is_stale_for_every_module_that_it_computes_with(copy, module):
    path = copy.root / f"deescal/{module}.py"
    path.write_text(path.read_text() + "\n_PROBE = 1\n")
    assert "09_finetune-tiny" in reached(copy.root)[0]


def test_every_module_whose_code_ran_is_in_the_closure_and_each_makes_the_job_stale(copy):
    "What each kernel loads is noted by the checkout's sitecustomize."
    root = copy.root
    for job in resolve("micro", root=root):
        loaded = set((root / "loaded/micro" / f"{job.name}.txt").read_text().split())
        assert "engine.run" in loaded, job.name
        reasons = {m: None for m in loaded}
        for module in loaded - {"", "engine"}:
            path = root / "deescal" / f"{module.replace('.', '/')}.py"
            text = path.read_text()
            path.write_text(text + "\n_PROBE = 1\n")
            reasons[module] = bool(stale(job)) or page_stale(job)
            path.write_text(text)
        assert [m for m, found in reasons.items() if found is False] == [], job.name
        closure = set(json.loads(job.record.read_text())["fingerprint"])
        shown = loaded - {k.removeprefix("source ").replace("deescal", "") for k in closure if k.startswith("source ")}
        assert shown <= set(import_closure(["figures", *FIGURES], root)), f"{job.name} computes with {shown} unnoticed"


def test_a_page_is_made_again_without_computing_and_says_the_same(copy):
    root = copy.root
    def page(name): return re.sub(r'content="\w{64}"', "", (root / f"figures/micro/notebooks/{name}.html").read_text())
    before, old, tables = copy.records(), page("09_finetune-tiny"), copy.tables()
    edit_cell(root, "09_finetune", "output", add_line('print("a word that was not there")'))
    assert "09_finetune-tiny: will run (its page changed)" in copy.reproduce().stdout
    now = copy.records()
    assert {n for n in now if now[n]["started"] != before[n]["started"]} == set() and copy.tables() == tables
    assert "a word that was not there" in page("09_finetune-tiny") and "supervised_tokens" in page("09_finetune-tiny")
    edit_cell(root, "09_finetune", "output", lambda s: s.replace('\nprint("a word that was not there")', ""))
    copy.reproduce()
    assert page("09_finetune-tiny") == old, "the page by its show cells alone is not the page of the whole job"


def test_all_pages_by_their_show_cells_alone_are_those_of_the_whole_jobs(copy):
    "Every stage: what is shown depends on tables and nothing that was only in memory."
    root = copy.root
    def pages():
        return {p.name: re.sub(r'content="\w{64}"', "", p.read_text()) for p in (root / "figures/micro/notebooks").glob("*.html")}
    before = pages()
    for p in (root / "data/runs/micro/jobs").glob("*.json"):
        p.write_text(json.dumps(json.loads(p.read_text()) | {"page": "another"}))
    out = copy.reproduce().stdout
    assert out.count("its page changed") == len(copy.records())
    after = pages()
    assert {n for n in before if before[n] != after[n]} == set()
    said = copy.reproduce("--set", "run.show_text=true; run.lesson=true").stdout  # every branch of what may be shown
    assert "failed" not in said and "He is old." in (root / "figures/micro/notebooks/10_generate-baselines.html").read_text()
    copy.reproduce()


def test_css_renders_pages_anew_and_executes_nothing(copy):
    before = copy.records()
    css = copy.root / "deescal/engine/templates/style.css"
    css.write_text(css.read_text() + "\nh1{letter-spacing:.01em}\n")
    out = copy.reproduce().stdout
    assert out.count("page rendered") == len(before) + 1 and "nothing was run" in out
    assert copy.records() == before and "letter-spacing" in (copy.root / "figures/micro/report.html").read_text()


FIGURES = ("speechfigures", "turnfigures", "featurefigures")  # of the lessons of the front half: shown, and never computed with

TOY = {
    "04_toy": ('{"question": "what comes first?"}', '{"firsts": """(n) numbers\\n    n int: a number"""}',
               'run.write("firsts", pl.DataFrame({"n": [1, 2, 3]}))\n'
               'run.write("accounting", account("toy", "number", 3, 3), part="toy")'),
    "12_last": ('{"question": "what comes last?", "reads": "firsts system_scores"}',
                '{"lasts": """(n) numbers\\n    n int: a number"""}',
                'run.write("lasts", pl.DataFrame({"n": [run.read("firsts")["n"].sum() + 0 * len(run.read("system_scores"))]}))\n'
                'run.write("accounting", account("last", "number", 1, 1), part="last")'),
}


def write_stage(root, name, stage, tables, run):
    "A new stage: one notebook, nothing else."
    module = name.split("_")[1]
    code, md = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells = [
        code(f"#| default_exp {module}"), md(f"# A toy\n\n> {name}."),
        code('run_name: str = "sample"\nseed: int = 1\nlesson: bool = True\nsize: int = 3  # [1..9]', metadata={"tags": ["parameters"]}),
        code(f'#| hide\nfrom deescal.engine.lesson import begin\n\nrun = begin("{name}", globals())'),
        code(f"STAGE = {stage}\nTABLES = {tables}", metadata={"tags": ["stage"]}),
        code("#| export\nimport polars as pl\n\nfrom deescal.engine.run import account"),
        code(run, metadata={"tags": ["run"]}), code("1 + 1", metadata={"tags": ["example"]})]
    for i, c in enumerate(nb.cells):
        c.id = f"toy{i}"
    nbformat.write(nb, root / f"nbs/{name}.ipynb")


def test_a_new_stage_is_one_notebook(copy, monkeypatch):
    "One before corpus, one after score: exported, checked, run, its table verified, its page made, in the index."
    for name, parts in TOY.items():
        write_stage(copy.root, name, *parts)
    compute, pages = reached(copy.root)
    who_reads = {"14_report"}  # the accounts of all stages
    assert compute == {"04_toy", "12_last"} | who_reads and pages == set(), "a new stage makes others stale"
    before = copy.records()
    export = [sys.executable, "-c", "from deescal.engine.export import export; export()"]
    subprocess.run(export, cwd=copy.root, env=copy.env, check=True, capture_output=True)
    assert "04_toy" in copy.deescal("check", "--profile", "micro").stdout
    out = copy.reproduce("--set", "toy.size=4").stdout
    assert copy.ran(before) == {"04_toy", "12_last"} | who_reads, out
    assert "files are as recorded" in copy.deescal("verify", "--profile", "micro", "--set", "toy.size=4").stdout
    page = (copy.root / "figures/micro/report.html").read_text()
    assert "notebooks/04_toy.html" in page and "notebooks/12_last.html" in page
    assert "[04_toy](nbs/04_toy.ipynb)" in (copy.root / "README.md").read_text()
    r = copy.deescal("check", "--profile", "micro", "--set", "toy.size=99", ok=False)
    assert r.returncode and "toy.size" in r.stderr and "1..9" in r.stderr
