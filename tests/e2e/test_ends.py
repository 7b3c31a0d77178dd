"How a run ends that does not end well: kills, Ctrl-C, a full disk, a folder that cannot be written, a bad corpus."
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deescal.engine.files import digest
from deescal.engine.jobs import resolve
from deescal.engine.locks import held

JOBS = len(resolve("micro"))
PATIENCE = 300  # seconds; nothing here depends on how fast it goes


def until(condition, what):
    "What `condition()` returns as soon as that is true."
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def copy_run(checkout, name, data=None):
    """The finished run once more, under another name: a copy whose records tell of that name. `data` is the folder of
    its tables, where that can be reached only by another path."""
    data = data or checkout.root / "data/runs" / name
    shutil.copytree(checkout.root / "data/runs/micro", data, dirs_exist_ok=True)
    shutil.copytree(checkout.root / "figures/micro", checkout.root / "figures" / name)
    for path in (data / "jobs").glob("*.json"):
        text = path.read_text()
        for top in ("data/runs", "figures"):
            text = text.replace(f'"{top}/micro/', f'"{top}/{name}/')
        record = json.loads(text)
        record["parameters"]["run_name"] = name
        record["fingerprint"]["parameter run_name"] = digest(name)
        path.write_text(json.dumps(record, indent=1))
    return data


def forget(checkout, run, *jobs):
    "Take away what `jobs` have made, so that they run again."
    for job in jobs:
        record = checkout.root / "data/runs" / run / "jobs" / f"{job}.json"
        if not record.is_file():
            continue
        for path in json.loads(record.read_text())["outputs"]:
            if (checkout.root / path).is_file():
                (checkout.root / path).unlink()
            else:
                shutil.rmtree(checkout.root / path)
        record.unlink()


def lives(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class Series:
    "`deescal reproduce` at work on a run, in a session of its own."

    def __init__(self, checkout, run, *args, out=None, prefix=()):
        self.root, self.run, self.out = checkout.root, run, tempfile.TemporaryFile("w+")
        command = checkout.command("reproduce", "--profile", "micro", "--run", run, *args)
        self.process = psutil.Popen([*prefix, *command], cwd=checkout.root, env=checkout.env, start_new_session=not prefix,
                                    stdin=out, stdout=out or self.out, stderr=out or subprocess.STDOUT)

    def lock_of(self, job):
        return self.root / "data/runs" / self.run / "jobs" / f"{job}.lock"

    def job(self, name):
        "The process of a job, found through its lock file; it is in its notebook."
        found = until(lambda: re.match(r"process (\d+) on ", held(self.lock_of(name)) or ""), f"the lock of {name}")
        until(self.notebook(name).is_file, f"the notebook of {name}")
        return psutil.Process(int(found[1]))

    def notebook(self, job):
        "The notebook of a job as far as it has been executed; it gets another name when the job has ended well."
        return self.root / "figures" / self.run / "notebooks" / f"{job}.failed.ipynb"

    def kernel(self, job):
        return until(lambda: next((c for c in job.children() if "ipykernel_launcher" in c.cmdline()), None), "a kernel")

    def snakemake(self):
        return next(c for c in self.process.children() if "snakemake" in c.cmdline())

    def text(self):
        self.out.seek(0)
        return self.out.read()

    def ended(self):
        "Exit status and text, when it has ended by itself."
        return self.process.wait(PATIENCE), self.text()


@contextmanager
def series(checkout, run, *args, **kw):
    "A series for a block; whatever of it lives at the end is killed."
    s = Series(checkout, run, *args, **kw)
    known = {s.process}
    try:
        yield s
    finally:
        for p in [s.process, *known]:
            if p.is_running():
                known |= set(p.children(recursive=True))
        left = [p for p in known | set(processes_of(checkout, run)) if lives(p)]
        for p in left:
            p.kill()
        s.process.wait(PATIENCE)


def processes_of(checkout, run):
    "The living processes of a run: Snakemake, its jobs (known by their arguments) and their kernels (by their variables)."
    found = []
    for p in psutil.process_iter():
        try:
            words = f"{' '.join(p.cmdline())} {p.environ().get('DEESCAL_PROGRESS', '')}"
            if p.environ().get("DEESCAL_ROOT") == str(checkout.root) and f"data/runs/{run}/" in words and lives(p):
                found.append(p)
        except psutil.Error:
            pass  # it has just ended
    return found


def sockets(checkout, run, job):
    "The folder of the sockets of a job's kernel."
    name = digest(str(checkout.root / "data/runs" / run), job, length=12)
    return Path(tempfile.gettempdir()) / f"deescal-{os.getuid()}" / name


@pytest.fixture
def ends(checkout):
    "The checkout with a finished run `ends`, which a test disturbs; it takes away first what is to run."
    copy_run(checkout, "ends")
    yield checkout
    for top in ("data/runs", "figures"):
        shutil.rmtree(checkout.root / top / "ends")


def test_a_job_or_a_kernel_that_is_killed_is_named_and_the_others_go_on(ends):
    forget(ends, "ends", "07d_datacard", "08_examples", "09e_modelcards")
    with series(ends, "ends") as s:
        job = s.job("07d_datacard")
        kernel = s.kernel(job)
        job.kill()
        until(lambda: not lives(kernel), "the end of the kernel whose job was killed")
        kernel = s.kernel(s.job("09e_modelcards"))
        until(lambda: '"status": "completed"' in s.notebook("09e_modelcards").read_text(), "a cell that is through")
        kernel.kill()
        code, text = s.ended()
    assert code == 1 and "Traceback" not in text, text
    log = ends.root / "data/runs/ends/jobs/07d_datacard.log"
    assert "07d_datacard was killed" in text and f"where:  {log}" in text and log.is_file()
    assert "09e_modelcards stopped: its kernel died" in text
    notebook = re.search(r"where:  (\S*09e_modelcards.failed.ipynb)", text)[1]
    assert (ends.root / notebook).is_file()
    assert text.count("Run the same command again") + text.count("run the same command again") >= 2
    assert re.search(r"2 jobs failed: (07d_datacard, 09e_modelcards|09e_modelcards, 07d_datacard)", text)
    assert "08_examples: done in" in text and {"08_examples", "14_report"} <= set(ends.records("ends"))
    for where in ("figures/ends/report.html", "figures/ends/summary.txt"):
        told = (ends.root / where).read_text()
        assert "07d_datacard: was killed" in told and "09e_modelcards: stopped: its kernel died" in told
    assert not processes_of(ends, "ends")
    again = ends.reproduce("--run", "ends")
    assert f"Executed 3 of {JOBS} jobs" in again.stdout
    assert ends.tables("ends") == ends.tables()
    assert not any(sockets(ends, "ends", j).exists() for j in ("07d_datacard", "08_examples", "09e_modelcards"))
    assert "killed" not in (ends.root / "figures/ends/summary.txt").read_text()


def test_a_kernel_that_is_killed_as_it_starts_is_named_too(ends):
    forget(ends, "ends", "09e_modelcards")
    command = ends.command("job", "09e_modelcards", "--profile", "micro", "--run", "ends")
    job = psutil.Popen(command, cwd=ends.root, env=ends.env, stderr=subprocess.PIPE, text=True)
    until(lambda: [k.kill() for k in job.children() if "ipykernel_launcher" in k.cmdline()], "a kernel")
    said = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode == 1 and "09e_modelcards stopped: its kernel died" in said and "remedy" in said
    assert "Traceback" not in said and "09e_modelcards" not in ends.records("ends")


def test_ctrl_c_ends_everything_with_one_sentence(ends):
    forget(ends, "ends", "07d_datacard", "08_examples")
    kept = ends.records("ends")
    with series(ends, "ends") as s:
        kernels = [s.kernel(s.job(n)) for n in ("07d_datacard", "08_examples")]
        s.process.send_signal(signal.SIGINT)
        code, text = s.ended()
        assert not any(map(lives, kernels)) and not processes_of(ends, "ends")
    assert code == 130 and "Traceback" not in text and "KeyboardInterrupt" not in text
    assert text.rstrip().endswith("deescal reproduce: stopped by Ctrl-C; what has finished is kept, and the same command "
                                  "goes on from there")
    assert ends.records("ends") == kept
    check = ends.deescal("check", "--profile", "micro", "--run", "ends").stdout
    assert re.findall(r"(\S+) +run: not run yet", check) == ["07d_datacard", "08_examples"]


def test_a_kill_that_can_be_heard_ends_everything_too(ends):
    forget(ends, "ends", "08_examples")
    with series(ends, "ends") as s:
        s.job("08_examples")
        s.process.terminate()
        code, text = s.ended()
        assert not processes_of(ends, "ends")
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in text and "Traceback" not in text


def test_snakemake_killed_is_said_and_its_jobs_are_ended(ends):
    forget(ends, "ends", "08_examples")
    with series(ends, "ends") as s:
        kernel = s.kernel(s.job("08_examples"))
        s.snakemake().kill()
        code, text = s.ended()
        assert not lives(kernel) and not processes_of(ends, "ends")
    log = ends.root / "data/runs/ends/snakemake.log"
    assert code == 1 and "Traceback" not in text and log.is_file()
    assert text.endswith(f"deescal reproduce: Snakemake was killed (SIGKILL); its jobs were ended\n  where:  {log}\n"
                         "  remedy: run the same command again: what has finished is kept\n")


def test_a_series_and_a_job_that_outlives_it_keep_the_next_one_out(ends):
    forget(ends, "ends", "08_examples")
    request = ends.root / "data/runs/ends/request.json"

    def refused():
        before = request.read_bytes()
        r = ends.reproduce("--run", "ends", "--set", "report.title=Another", ok=False)
        assert r.returncode == 1 and "Traceback" not in r.stderr
        assert request.read_bytes() == before, "a series that was refused has changed another's request"
        return r.stderr

    with series(ends, "ends") as s:
        job = s.job("08_examples")
        job.suspend()  # so that it does not end before the others look
        said = refused()
        assert "the run 'ends' is being executed by another process" in said and f"process {s.process.pid} on " in said
        s.process.suspend()  # so that it does not see what happens to Snakemake
        s.snakemake().kill()
        s.process.kill()
        said = refused()
        assert "08_examples of a series that was killed is still running" in said
        assert f"process {job.pid} on " in said and f"kill {job.pid}" in said
        job.resume()
        until(lambda: not lives(job), "the job that was left alone")
    assert "08_examples" in ends.records("ends"), "it has done its work"
    assert "Report: " in ends.reproduce("--run", "ends").stdout
    assert ends.tables("ends") == ends.tables()


def below(*folders):
    "What lies below folders: path -> when it was changed last, and its bytes."
    files = [p for f in folders for p in sorted(f.rglob("*"))]
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in files}


def test_a_dry_run_names_what_is_stale_and_changes_nothing(ends):
    forget(ends, "ends", "08_examples")
    request = ends.root / "request.json"
    request.write_text(json.dumps({"profile": "micro", "overrides": {"run.name": "ends", "audit.min_shared": 7}}))
    before = below(ends.root / "data/runs", ends.root / "figures")
    ours = ends.reproduce("--run", "ends", "--set", "audit.min_shared=7", "--", "-n")
    snakemake = [sys.executable, "-m", "snakemake", "-n", "--configfile", str(request)]
    theirs = subprocess.run(snakemake, cwd=ends.root, env=ends.env, capture_output=True, text=True)
    assert below(ends.root / "data/runs", ends.root / "figures") == before
    assert "07_audit: will run (parameter min_shared changed)" in ours.stdout
    assert "08_examples: will run (not run yet)" in ours.stdout and "06_corpus: will run" not in ours.stdout
    for said in (ours.stdout + ours.stderr, theirs.stdout + theirs.stderr):
        assert re.search(r"rule 07_audit:", said) and re.search(r"rule 08_examples:", said)
        assert "rule 06_corpus:" not in said and "Traceback" not in said
    assert theirs.returncode == 0
    new = ends.reproduce("--run", "unborn", "--", "--dry-run")
    assert "06_corpus: will run (not run yet)" in new.stdout and not (ends.root / "data/runs/unborn").exists()


@contextmanager
def mounts(script):
    """A process in a mount namespace of its own, in which a shell `script` has mounted file systems. They end with it,
    and nobody else sees them. Skips, with the reason, where that is not permitted."""
    def start(flags):
        return subprocess.Popen(["unshare", flags, "sh", "-c", f"{script} && echo ready && cat"], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or nsenter here: no file system of its own for this test")
    holder = start("-rm")
    said = holder.stdout.readline()
    try:
        if said != "ready\n":
            pytest.skip(f"no file system can be mounted here: {said.strip()}")
        yield holder
    finally:
        holder.kill()
        holder.wait()


class Inside:
    "A checkout as it is seen in the mount namespace of a process."

    def __init__(self, checkout, holder):
        self.checkout, self.holder, self.env = checkout, holder, checkout.env
        self.root = Path(f"/proc/{holder.pid}/root{checkout.root}")

    def command(self, *args):
        enter = ["nsenter", "-t", str(self.holder.pid), "-U", "-m", "--preserve-credentials"]
        return [*enter, "env", "-C", str(self.checkout.root), *self.checkout.command(*args)]

    def reproduce(self, *args):
        command = self.command("reproduce", "--profile", "micro", *args)
        return subprocess.run(command, env=self.env, capture_output=True, text=True)


def fill(path):
    "Fill the file system with a file at `path`, to the last byte."
    with open(path, "wb", buffering=0) as f:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    f.write(bytes(size))
            except OSError:
                pass


def test_on_a_full_disk_a_run_says_so_and_goes_on_when_there_is_room(checkout):
    folder = checkout.root / "data/runs/full"
    folder.mkdir(parents=True)
    with mounts(f"mount -t tmpfs -o size=24m deescal {folder}") as holder:
        inside = Inside(checkout, holder)
        data = copy_run(checkout, "full", inside.root / "data/runs/full")
        forget(inside, "full", "08_examples")
        with series(inside, "full") as s:
            s.job("08_examples")
            fill(data / "ballast")
            code, text = s.ended()
        assert code == 1 and "Traceback" not in text, text
        assert "No space left on device" in text and str(folder) in text and "make room on this disk" in text, text
        r = inside.reproduce("--run", "full")
        assert r.returncode == 1 and "Traceback" not in r.stdout + r.stderr
        assert "No space left on device" in r.stderr and str(folder) in r.stderr and "make room" in r.stderr
        (data / "ballast").unlink()
        r = inside.reproduce("--run", "full")
        assert r.returncode == 0 and "08_examples: done in" in r.stdout, r.stdout + r.stderr
        assert inside.checkout.tables("micro") == type(checkout).tables(inside, "full")


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(checkout):
    runs = checkout.root / "data/runs"
    runs.mkdir(exist_ok=True)
    with mounts(f"mount --bind {runs} {runs} && mount -o remount,bind,ro {runs}") as holder:
        r = Inside(checkout, holder).reproduce("--run", "unwritten")
    assert r.returncode == 1 and "Traceback" not in r.stdout + r.stderr
    assert "Read-only file system" in r.stderr and f"where:  {runs}/unwritten" in r.stderr
    assert "work in a copy of the project" in r.stderr


class Terminal:
    "A terminal of our own: what is written to it, and a keyboard."

    def __init__(self):
        self.ours, self.theirs = pty.openpty()
        self.text = ""

    def read(self):
        "All that has been written so far."
        while select.select([self.ours], [], [], 0.05)[0]:
            self.text += os.read(self.ours, 65536).decode()
        return self.text

    def press(self, key):
        os.write(self.ours, key)


def test_on_a_terminal_one_line_is_written_over_and_ctrl_c_is_heard(ends):
    forget(ends, "ends", "08_examples")
    screen = Terminal()
    # setsid makes it the terminal of the series, so that the key reaches the series as it does a user's
    with series(ends, "ends", out=screen.theirs, prefix=["setsid", "--ctty", "--wait"]) as s:
        status = r"\r\033\[K\[\d+:\d\d\] \d+ done, 1 running: 08_examples, \d+ left, about \d+:\d\d to go"
        until(lambda: len(re.findall(status, screen.read())) >= 2, "two looks at the run")
        screen.press(b"\x03")
        s.process.wait(PATIENCE)
        text = screen.read()
        assert not processes_of(ends, "ends")
    lines = re.findall(r"^.*08_examples, \d+ left.*$", text.replace("\r\n", "\n"), re.MULTILINE)
    assert len(lines) == 1, "one line"
    assert "stopped by Ctrl-C" in text and "Traceback" not in text


def test_without_a_terminal_there_are_plain_lines(ends):
    forget(ends, "ends", "08_examples")
    with series(ends, "ends") as s:
        until(lambda: "running" in s.text(), "a line about the job")
        s.process.send_signal(signal.SIGINT)
        text = s.ended()[1]
    assert "\r" not in text and "\033" not in text
    told = re.search(r"^\[\d+:\d\d\] (\d+) done, 1 running: 08_examples, (\d+) left, about \d+:\d\d to go$", text, re.M)
    assert int(told[1]) + 1 + int(told[2]) == JOBS and int(told[2]) == 8


def test_a_bad_corpus_ends_with_its_own_sentence_and_names_what_did_not_run(checkout):
    empty, faulty = checkout.root / "data/empty", checkout.root / "data/faulty"
    empty.mkdir(), faulty.mkdir()
    (faulty / "a.csv").write_text("x,y\n1,2\n")
    r = checkout.reproduce("--run", "empty", "--data", "data/empty", ok=False)
    assert r.returncode == 1 and "no transcript (*.csv)" in r.stderr and "Traceback" not in r.stdout + r.stderr
    r = checkout.reproduce("--run", "faulty", "--data", "data/faulty", ok=False)
    assert r.returncode == 1 and "Traceback" not in r.stdout + r.stderr
    assert "06_corpus stopped: InputError: not a single turn" in r.stderr and "a.csv" in r.stderr
    assert re.search(r"1 job failed: 06_corpus; not run because of that: 07_audit, .*08_examples, .*11_score$", r.stderr,
                     re.MULTILINE)
    assert "06_corpus: stopped" in (checkout.root / "figures/faulty/report.html").read_text()


def test_an_error_of_the_input_is_not_tried_again(checkout):
    "What a scheduler's second try (profiles/slurm has retries) does: the same sentence, at once, and no execution."
    folder = checkout.root / "data/nothing_in_it"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y\n1,2\n")
    args = ("job", "06_corpus", "--profile", "micro", "--run", "retried", "--data", "data/nothing_in_it")
    executed = checkout.root / "figures/retried/notebooks/06_corpus.failed.ipynb"
    first = checkout.deescal(*args, ok=False)
    assert first.returncode and "not a single turn" in first.stderr and executed.is_file()
    executed.unlink()
    again = checkout.deescal(*args, "--attempt", "2", ok=False)
    assert again.returncode and again.stderr == first.stderr and not executed.exists()
    shutil.copy2(checkout.root / "data/planted" / "youtube_7000.csv", folder)
    assert "done" in checkout.deescal(*args).stdout, "a first try of the next series reads the input again"


@pytest.mark.slow
def test_training_and_generation_say_how_far_they_are(ends):
    forget(ends, "ends", "08d_base-tiny", "10_generate-tiny-base")
    with series(ends, "ends") as s:
        for name, file, line in (("08d_base-tiny", r"step \d+/40 loss", r"\(\D+ step \d+/40 loss \d+\.\d+\)"),
                                 ("10_generate-tiny-base", r"replies", r"\(replies \w+ \d+/\d+\)")):
            kernel, progress = s.kernel(s.job(name)), s.lock_of(name).with_suffix(".progress")
            until(lambda: progress.is_file() and re.search(file, progress.read_text()), f"progress of {name}")
            kernel.suspend()  # a line comes at least every half minute, and on a fast machine it is over by then
            until(lambda: re.search(f"running: .*{name} {line}", s.text()), f"a line about {name}")
            kernel.resume()
        assert s.ended()[0] == 0
    assert ends.tables("ends") == ends.tables()


@pytest.mark.slow
def test_a_run_whose_first_job_is_killed_says_what_is_missing_and_is_completed(checkout):
    with series(checkout, "first") as s:
        s.job("06_corpus").kill()
        code, text = s.ended()
    assert code == 1 and "Traceback" not in text
    assert "06_corpus was killed" in text
    assert re.search(r"1 job failed: 06_corpus; not run because of that: 07_audit, .*, 11_score$", text, re.MULTILINE)
    before = {n for n in checkout.records() if n < "06_corpus"}
    assert set(checkout.records("first")) == {*before, "14_report"}
    assert "06_corpus: was killed" in (checkout.root / "figures/first/report.html").read_text()
    assert f"Executed {JOBS - len(before)} of {JOBS} jobs" in checkout.reproduce("--run", "first").stdout
    assert checkout.tables("first") == checkout.tables()


@pytest.mark.slow
def test_snakemake_runs_a_request_from_any_file_without_the_command(ends):
    forget(ends, "ends", "08_examples")
    (ends.root / "mine.json").write_text(json.dumps({"profile": "micro", "overrides": {"run.name": "ends"}}))
    (ends.root / "data/runs/ends/request.json").unlink()
    command = [sys.executable, "-m", "snakemake", "--configfile", "mine.json"]
    r = subprocess.run(command, cwd=ends.root, env=ends.env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert "nothing was run" in ends.reproduce("--run", "ends").stdout and ends.tables("ends") == ends.tables()
