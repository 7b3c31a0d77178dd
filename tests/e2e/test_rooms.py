"One purpose a room: what imports what, what an import may change, and which names there are."
import ast
import json
import builtins
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from deescal.engine.closure import imported_modules
from deescal.engine.notebooks import cell_kind, lessons, module_name, notebook_cells
from deescal.engine.series import STAGES

ROOT = Path(__file__).resolve().parents[2]
UPPER = {f"engine.{m}" for m in ("profile", "jobs", "execute", "page", "drive", "forget", "cli", "export")}
PROTOCOL = {"facts", "egress"}  # what `make check` and the record of a job ask a stage's module for


def modules():
    files = [p for p in (ROOT / "deescal").rglob("*.py") if not p.name.startswith("_")]
    return {".".join(p.relative_to(ROOT / "deescal").with_suffix("").parts): p for p in files}


def imports():
    "module -> modules of this library that it imports anywhere, lazily or by a name put together at run time too."
    known, out = modules(), {}
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        found = imported_modules(tree, name.rpartition(".")[0])
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and "import_module" in ast.unparse(n.func)]
        if any(isinstance(a, ast.JoinedStr) for c in calls for a in c.args):
            found |= {s.name for s in STAGES.values()}  # import_module(f"deescal.{stage}")
        out[name] = found & set(known) - {name}
    return out


def test_no_module_imports_itself_by_any_way():
    assert len(list(TopologicalSorter(imports()).static_order())) == len(modules())


def test_no_stage_and_no_library_module_imports_the_upper_half_of_the_engine():
    lower = {n: m & UPPER for n, m in imports().items() if n not in UPPER}
    assert {n: m for n, m in lower.items() if m} == {}


def test_no_cell_of_a_lesson_imports_the_upper_half_but_the_one_that_runs_its_tests():
    for path in lessons():
        for cell in notebook_cells(path):
            if cell["cell_type"] == "code" and cell_kind(cell) != "test":
                assert not imported_modules(ast.parse(cell["source"]), "") & UPPER, (path.stem, cell["id"])


def test_stages_import_only_earlier_stages():
    order = [s.name for s in STAGES.values()]
    for name, found in imports().items():
        if name in order:
            later = {m for m in found if m in order and order.index(m) >= order.index(name)}
            assert not later, (name, later)


def test_an_import_changes_no_setting_of_another_library():
    code = """
import csv, logging, sys, warnings, matplotlib, polars as pl
def state(): return (dict(matplotlib.rcParams), csv.field_size_limit(), pl.Config.state(), sys.getrecursionlimit(),
                     logging.getLogger().level)
before = state()
import importlib
for name in sys.argv[1:]: importlib.import_module("deescal." + name)
assert state() == before, "an import changed a setting"
"""
    r = subprocess.run([sys.executable, "-c", code, *modules()], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]


def test_no_public_name_is_defined_in_two_modules():
    where = defaultdict(set)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            found = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
                t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            if not any(getattr(d, "id", "") == "patch" for d in getattr(node, "decorator_list", [])):
                for f in found:
                    where[f].add(name)
    public = {n: m for n, m in where.items() if not n.startswith("_") and len(m) > 1}
    assert {n: m for n, m in public.items() if n not in PROTOCOL} == {}


def test_the_published_length_is_written_down_once():
    found = Counter(p.name for p in modules().values() for n in ast.walk(ast.parse(p.read_text()))
                    if isinstance(n, ast.Constant) and n.value == 2048)
    assert found == {"text.py": 1}


def test_the_cells_of_a_notebook_have_ids_of_their_own():
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        ids = Counter(c["id"] for c in json.loads(path.read_text())["cells"])
        assert max(ids.values()) == 1, (path.name, ids.most_common(3))


def test_a_module_is_a_room_and_not_a_hall():
    sizes = {n: len(p.read_text().splitlines()) for n, p in modules().items()}
    assert max(sizes.values()) <= 500, max(sizes.items(), key=lambda x: x[1])


def test_every_module_has_its_notebook_and_every_stage_is_a_lesson():
    notebooks = {module_name(p) for p in [*lessons(), *(ROOT / "nbs/appendix").glob("*.ipynb")]}
    assert notebooks == set(modules())


@pytest.mark.parametrize("word", ["rcParams", "field_size_limit"])
def test_settings_are_changed_only_for_as_long_as_needed(word):
    for name, path in modules().items():
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Expr)]
        assert not any(word in ast.unparse(n) for n in top), name


def test_what_a_lesson_shows_depends_on_tables_and_never_on_what_was_only_in_memory():
    "A page is made again from its show cells alone: each name in them stands in a cell that is run then too."
    for path in lessons():
        known, used = set(dir(builtins)) | {"display", "get_ipython"}, {}
        for cell in notebook_cells(path):
            if cell["cell_type"] != "code" or cell_kind(cell) not in ("parameters", "code", "show"):
                continue
            tree = ast.parse(cell["source"])
            for n in ast.walk(tree):
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                    known.add(n.id)
                elif isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                    known.add(n.name)
                elif isinstance(n, ast.arg):
                    known.add(n.arg)
                elif isinstance(n, (ast.Import, ast.ImportFrom)):
                    known |= {(a.asname or a.name).split(".")[0] for a in n.names}
                elif isinstance(n, ast.Name) and cell_kind(cell) == "show":
                    used.setdefault(n.id, cell["id"])
        assert {n: c for n, c in used.items() if n not in known} == {}, path.stem
