"A checkout of its own, and one finished micro run in it, shared by all end-to-end tests."
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def copy_checkout(target):
    """The files of this checkout, as git sees them (tracked, and new ones that are not ignored); no environment and
    no run."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"],
                           check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def papermill(checkout, notebook, out, env=None, **parameters):
    "A notebook of the checkout run by hand, as somebody would who knows papermill and not `make`."
    given = [a for k, v in parameters.items() for a in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--cwd", "nbs", *given, f"nbs/{notebook}.ipynb", str(out)]
    return subprocess.run(command, cwd=checkout.root, env=checkout.env | (env or {}), capture_output=True, text=True)


def edit_cell(root, notebook, cell_id, change):
    "Put `change(source)` in the place of a cell's source in a notebook of the checkout at `root`."
    path = root / f"nbs/{notebook}.ipynb"
    nb = nbformat.read(path, as_version=4)
    cell = next(c for c in nb.cells if c.id == cell_id)
    changed = change(cell.source)
    assert changed != cell.source, f"{notebook}: the edit of {cell_id} changes nothing"
    cell.source = changed
    nbformat.write(nb, path)


NOTE_LOADED = """
import os, sys
from importlib.machinery import PathFinder
from pathlib import Path

class Note:
    "Notes each module of ours that a job's kernel loads, as it loads it: a kernel that is killed has noted its own too."
    path = None

    def find_spec(self, name, path=None, target=None):
        progress, root = os.environ.get("DEESCAL_PROGRESS"), os.environ.get("DEESCAL_ROOT")
        if name.split(".")[0] != "deescal" or not progress or "ipykernel_launcher" not in "".join(sys.argv[:1]):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and root:
            job = Path(progress)     # data/runs/<run>/jobs/<job>.progress
            file = Path(root) / "loaded" / job.parts[-3] / f"{job.stem}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w" if self.path is None else "a") as f:
                f.write(name.removeprefix("deescal").lstrip(".") + "\\n")
            self.path = file
        return spec

sys.meta_path.insert(0, Note())
"""


AS_FAR_AS = """
import sys
from deescal.engine import cli
stage, *args = sys.argv[1:]
jobs, failed = cli.bring_up(cli.parser().parse_args(["reproduce", *args]), [stage])
cli.tell(failed)
sys.exit(bool(failed))
"""


class Checkout:
    "A copy of the project in which commands run in processes of their own."

    def __init__(self, root):
        self.root = root
        hooks = root / ".hooks"
        hooks.mkdir(exist_ok=True)
        (hooks / "sitecustomize.py").write_text(NOTE_LOADED)
        self.env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{hooks}", "DEESCAL_ROOT": str(root)}

    def command(self, *args):
        return [sys.executable, "-m", "deescal.engine.cli", *args]

    def deescal(self, *args, ok=True):
        r = subprocess.run(self.command(*args), cwd=self.root, env=self.env, capture_output=True, text=True)
        assert not ok or r.returncode == 0, r.stdout + r.stderr
        return r

    def reproduce(self, *args, ok=True):
        return self.deescal("reproduce", "--profile", "micro", *args, ok=ok)

    def as_far_as(self, stage, *args):
        "The command that runs the series on the profile micro, as `reproduce` does, but only what `stage` needs."
        return [sys.executable, "-c", AS_FAR_AS, stage, "--profile", "micro", *args]

    def kill(self, command, when):
        "Start a run and SIGKILL all of its processes (Snakemake, jobs, kernels: sessions of their own) once `when()` holds."
        p = subprocess.Popen(command, cwd=self.root, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        limit = time.monotonic() + 120
        while not (there := when()) and time.monotonic() < limit and p.poll() is None:
            time.sleep(0.02)
        assert p.poll() is None, "the run ended before it could be killed"
        everything = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything, 30)
        p.wait()
        assert there, "what the kill was to come after did not come"

    def records(self, run="micro"):
        found = sorted((self.root / "data/runs" / run / "jobs").glob("*.json"))
        return {p.stem: json.loads(p.read_text()) for p in found if not p.name.endswith(".failed.json")}

    def ran(self, before, run="micro"):
        "The jobs that were executed since `before`, a result of `records`."
        return {n for n, r in self.records(run).items() if n not in before or before[n] != r}

    def tables(self, run="micro"):
        "Every result of a run but its timings: relative name -> bytes."
        data, figures = self.root / "data/runs" / run / "tables", self.root / "figures" / run / "tables"
        files = [(p, p.relative_to(d).as_posix()) for d in (data, figures) for p in sorted(d.rglob("*")) if p.is_file()]
        return {name: p.read_bytes() for p, name in files if "timings" not in name}


@pytest.fixture
def new_checkout(tmp_path):
    return Checkout(copy_checkout(tmp_path))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, request):
    """A checkout with a finished micro run, one for each worker of pytest-xdist. The run is made once: the first worker
    that needs it makes it, the others wait and take a copy."""
    workers = hasattr(request.config, "workerinput")
    shared = (tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.getbasetemp()) / "finished"
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "first_output").is_file():
            c = Checkout(copy_checkout(shared))
            (shared / "first_output").write_text(c.reproduce().stdout)
    root = tmp_path_factory.mktemp("checkout") / "deescal"
    shutil.copytree(shared, root, symlinks=True)
    c = Checkout(root)
    c.first_output = (root / "first_output").read_text()
    return c
