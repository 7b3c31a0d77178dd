"""What does a series cost? python bench/jobs.py [RUN [AFTER]] [--parts] [--rounds 5]

RUN is the name of a run in data/runs, or the folder of one (of another checkout). Prints a Markdown table of the
seconds and the peak memory of its finished jobs, from their records; with AFTER both runs side by side and their ratio,
before to after. Job-seconds are not what one waits: jobs run beside each other. --parts adds what every job pays before
it computes anything: child processes that do one thing each, in turns, median of the rounds. Ratios of one run each on
one machine.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from _shared import BENCH, script
from deescal.engine.errors import InputError, did_you_mean
from deescal.engine.files import project_root
from deescal.engine.run import job_records

KERNEL = """
import time
from jupyter_client.manager import start_new_kernel
start = time.perf_counter()
manager, client = start_new_kernel(kernel_name="python3")
middle = time.perf_counter()
client.stop_channels()
manager.shutdown_kernel()
print(middle - start, time.perf_counter() - middle)
"""
NOTEBOOK = """
import sys, nbformat, papermill
nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("pass")])
papermill.execute_notebook(nb, None, kernel_name="python3", progress_bar=False, log_output=False)
"""
BARE = "start the interpreter"
# each a process from its start to its end; the kernel's times are taken inside, without the import of its client
CHILDREN = {(BARE,): "pass"} | {
    (f"import {module}",): f"import {module}"
    for module in ("deescal.engine.cli", "polars", "papermill", "torch", "transformers")} | {
    ("start an ipykernel", "stop it"): KERNEL, ("papermill on one empty cell",): NOTEBOOK}


def read_jobs(run):
    "Job -> record of the finished jobs of a run, given by name or folder."
    runs = project_root() / "data/runs"
    folder = Path(run) if (Path(run) / "jobs").is_dir() else runs / run
    try: records = {r["job"]: r | {k: float(r[k]) for k in ("seconds", "peak_mb")}
                    for r in job_records(SimpleNamespace(data=folder))}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"a record of this run cannot be read: {type(e).__name__}: {e}", folder / "jobs",
                         f"run it again: make reproduce RUN={folder.name}") from None
    if records: return records
    known = [p.parent.name for p in runs.glob("*/jobs")]
    raise InputError("no finished job in this run", folder, did_you_mean(run, known) if known else
                     "finish one first: make reproduce PROFILE=micro, then micro is its name")


def table(head, rows):
    "A Markdown table: names in the first column, figures in the others."
    print("| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
    for row in rows: print("| " + " | ".join(row) + " |")


def total(records): return sum(r["seconds"] for r in records)


def ratio(a, b): return f"{a / b:.2f}" if b else "-"     # a record's seconds are rounded


def show_one(jobs):
    whole = total(jobs.values())
    rows = [(f"{r['job']} ({r['stage']})", f"{r['seconds']:.2f}", f"{r['seconds'] / (whole or 1):.3f}",
             f"{r['peak_mb']:.0f}") for r in jobs.values()]
    peak = max(r["peak_mb"] for r in jobs.values())
    table(("job (stage)", "seconds", "share", "peak MB"),
          [*rows, (f"all {len(jobs)}", f"{whole:.2f}", "1.000", f"{peak:.0f}")])


def show_two(before, after):
    both = [name for name in before if name in after]
    def cell(jobs, name, key, digits): return f"{jobs[name][key]:.{digits}f}" if name in jobs else "-"
    rows = [(name, cell(before, name, "seconds", 2), cell(after, name, "seconds", 2),
             ratio(before[name]["seconds"], after[name]["seconds"]) if name in both else "-",
             cell(before, name, "peak_mb", 0), cell(after, name, "peak_mb", 0))
            for name in sorted({*before, *after})]
    for what, a, b in (("all in both", *([jobs[n] for n in both] for jobs in (before, after))),
                       ("all", before.values(), after.values())):
        if not a: continue
        rows.append((f"{what}: {len(a)}, {len(b)}", f"{total(a):.2f}", f"{total(b):.2f}", ratio(total(a), total(b)),
                     *(f"{max(r['peak_mb'] for r in jobs):.0f}" for jobs in (a, b))))
    table(("job", "before s", "after s", "ratio", "before peak MB", "after peak MB"), rows)
    machines = {str(r.get("hardware")) for jobs in (before, after) for r in jobs.values()}
    if len(machines) > 1: print("\nThe jobs ran on machines that differ: the ratios compare these too.")


def measure(code):
    "Seconds of a child process that runs `code`, or those that it prints."
    start = time.perf_counter()
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if r.returncode:
        raise InputError("a part cannot be timed: " + (r.stderr.strip().splitlines() or ["no word"])[-1],
                         f"python -c {code.strip()!r}", "make env installs what it needs")
    return [float(s) for s in r.stdout.split()] or [seconds]


def show_parts(rounds):
    seconds = {name: [] for names in CHILDREN for name in names}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for names, code in CHILDREN.items():
            for name, s in zip(names, measure(code)): seconds[name].append(s)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    inside = {name for names in CHILDREN if len(names) > 1 for name in names}
    table((f"part, {rounds} rounds", "median s", "least s", "most s", "without the interpreter s"),
          [(name, f"{median[name]:.3f}", f"{min(s):.3f}", f"{max(s):.3f}",
            f"{median[name] - (0 if name in inside else median[BARE]):.3f}" if name != BARE else "-")
           for name, s in seconds.items()])


def main(runs, parts, rounds):
    if rounds < 1: raise InputError(f"{rounds} rounds", "--rounds", "give one or more")
    if not runs and not parts or len(runs) > 2:
        raise InputError(f"{len(runs)} runs given", f"{BENCH} {' '.join(runs)}".strip(),
                         f"{BENCH} RUN, or {BENCH} BEFORE AFTER, or {BENCH} --parts")
    jobs = [read_jobs(run) for run in runs]
    if len(jobs) == 1: show_one(*jobs)
    if len(jobs) == 2: show_two(*jobs)
    if jobs and parts: print()
    if parts: show_parts(rounds)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("runs", nargs="*", metavar="RUN", help="name or folder of a run; a second one to compare it with")
    args.add_argument("--parts", action="store_true", help="time what every job pays, too")
    args.add_argument("--rounds", type=int, default=5, help="of --parts (default 5)")
    script(main, **vars(args.parse_args()))
