"The wheel that is built from the sdist holds the library, its data and the notebooks, and works in a project's folder."
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="build is in dev_requirements")
PYTHON = [sys.executable, "-P"]  # -P: a module in the working directory is not taken for the installed one


def run(*command, **kwargs):
    r = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def build(project, folder):
    "The sdist and the wheel made from it, of a `project` with files that must not be in either."
    for private in ("data/runs/release/turns.csv", "data/released/train/real.csv", "deescal/nbs/stale.ipynb"):
        (project / private).parent.mkdir(parents=True, exist_ok=True)
        (project / private).write_text("private")
    run(*PYTHON, "-m", "build", "--no-isolation", "--outdir", folder, project, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def packaged(project):
    "What a wheel of `project` holds: its name in the wheel -> the file that it is a copy of."
    files = [*(project / "deescal").rglob("*.py"), project / "deescal/roles.json",
             *(project / "deescal").glob("*.csv"), *(project / "deescal").glob("reviewpage.*s"),
             *filter(Path.is_file, (project / "deescal/engine/templates").rglob("*"))]
    books = [*(project / "nbs").glob("*.ipynb"), *(project / "nbs/appendix").glob("*.ipynb")]
    return {p.relative_to(project).as_posix(): p for p in files if "__pycache__" not in p.parts} | {
        f"deescal/{p.relative_to(project).as_posix()}": p for p in books}


def test_the_wheel_of_the_sdist_is_complete_and_checks_a_project(new_checkout, tmp_path_factory):
    project, folder, site = new_checkout.root, tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    sdist, wheel = build(project, folder)
    with tarfile.open(sdist) as t:
        held = {n.partition("/")[2] for n in t.getnames()}
    assert {"settings.ini", "nbs/index.ipynb", "deescal/roles.json", "data/sample/README.md"} <= held
    assert not [n for n in held if n.startswith(("data/runs", "data/released"))]

    want = packaged(project)
    with zipfile.ZipFile(wheel) as z:
        held = {n: z.read(n) for n in z.namelist() if ".dist-info/" not in n}
    assert set(held) == set(want) and all(held[n] == p.read_bytes() for n, p in want.items())
    assert {"deescal/engine/__init__.py", "deescal/engine/cli.py", "deescal/nbs/index.ipynb"} <= set(want)
    assert any(n.startswith("deescal/engine/templates/") for n in want)

    run(*PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel)
    env = os.environ | {"PYTHONPATH": str(site), "DEESCAL_ROOT": str(project)}
    where = run(*PYTHON, "-c", "import deescal.engine; print(deescal.engine.__file__)", cwd=project, env=env)
    assert where.startswith(str(site))
    assert "sample" in run(*PYTHON, "-m", "deescal.engine.cli", "check", "--profile", "sample", cwd=project, env=env)


def test_an_editable_install_copies_no_notebook():
    root = Path(__file__).resolve().parents[2]
    tracked = run("git", "-C", root, "ls-files", "deescal/nbs")
    assert tracked == "" and not (root / "deescal/nbs").exists()
