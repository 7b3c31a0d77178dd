"The series on Slurm: a cluster of one node is started on loopback, a job is killed, and the results are the same."
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import slurm_node

LACKS = slurm_node.missing()
needs_slurm = pytest.mark.skipif(
    bool(LACKS), reason=f"no {', '.join(LACKS)} on PATH: apt-get install slurm-wlm munge")
ON_SLURM = ("--", "--workflow-profile", "profiles/slurm")
KILLED = "09_finetune-tiny"  # the longest job


def listed(*folders):
    return {f: sorted(os.listdir(f)) for f in folders if Path(f).is_dir()}


@needs_slurm
def test_the_node_runs_a_job_and_leaves_nothing_behind():
    system = ("/etc", "/etc/slurm", "/etc/munge", "/run", "/var/spool", "/var/log")
    before = listed(*system)
    with pytest.raises(ZeroDivisionError), slurm_node.running() as node:
        assert node.ask("srun", "--ntasks=1", "--gpus=1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").strip() == "0"
        # a step, a process that it leaves in a session of its own, and a batch script
        node.ask("sbatch", "--output=/dev/null", "--comment=x", "--wrap=srun sh -c 'setsid sleep 600 & sleep 600'")
        node.wait(lambda: len(node.processes()) > 7, 30, "the step runs")
        assert [j["state"] for j in node.jobs()] == ["COMPLETED", "RUNNING"]
        1 / 0
    assert node.processes() == [] and not node.folder.exists() and listed(*system) == before


def test_only_a_model_of_its_own_asks_for_a_gpu(checkout):
    "What would be submitted; this needs no cluster."
    profile, model = checkout.root / "profiles/own.yml", checkout.root / "data/own"
    model.mkdir()
    (model / "config.json").write_text("{}")
    text = (checkout.root / "profiles/micro.yml").read_text().replace("name: micro", "name: own")
    profile.write_text(re.sub(r"^models:.*", "models: {tiny: [base], ./data/own: [base]}", text, flags=re.M))
    out = checkout.deescal("reproduce", "--profile", "own", *ON_SLURM, "--dry-run")
    asked = dict(re.findall(r"rule (\w+):\n(?:    .*\n)*?    resources: (.*)", out.stdout + out.stderr))
    assert {name for name, r in asked.items() if "gpu=1" in r} == {"10_generate_own_base"}
    assert asked.pop("all") == "tmpdir=/tmp", "the last rule runs on the host that submits"
    assert all(re.search(rf"\b{name}=[1-9]", r) for r in asked.values() for name in ("mem_mb", "runtime"))


@pytest.mark.slow
@needs_slurm
def test_a_killed_slurm_job_is_run_again_and_the_tables_are_those_of_a_local_run(checkout, tmp_path):
    log, rule = tmp_path / "log", "rule_" + KILLED.replace("-", "_")
    begun = checkout.root / f"figures/slurm/notebooks/{KILLED}.failed.ipynb"  # so called until it has run
    command = checkout.command("reproduce", "--profile", "micro", "--run", "slurm", *ON_SLURM,
                               "--slurm-init-seconds-before-status-checks", "2")
    with slurm_node.running() as node, open(log, "wb") as out:
        run = subprocess.Popen(command, cwd=checkout.root, env=checkout.env | node.env, stdout=out, stderr=out)
        limit = time.monotonic() + 900
        while not begun.exists() and run.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        assert begun.exists(), log.read_text() + node.logs()
        victim = next(j["id"] for j in node.jobs() if j["rule"] == rule)
        node.ask("scancel", "--signal=KILL", victim)
        assert run.wait(900) == 0, log.read_text() + node.logs()
        jobs = node.jobs()
        submitted = node.ask("scontrol", "write", "batch_script", victim, "-")
    assert f"Executed {len(checkout.records())} of {len(checkout.records())} jobs" in log.read_text()
    tries = [j for j in jobs if j["rule"] == rule]
    assert [j["state"] for j in tries] == ["CANCELLED", "COMPLETED"] and tries[0]["id"] == victim
    first, second = (int(j["memory"].removesuffix("M")) for j in tries)
    assert second > first, "a job that is run again asks for more memory"
    assert {j["state"] for j in jobs if j["rule"] != rule} == {"COMPLETED"} and len(jobs) == len(checkout.records()) + 1
    # A job on another host does not see this host's /tmp: what it is told to read lies in the project's folder.
    assert Path(re.search(r"--configfiles (\S+)", submitted)[1]).is_relative_to(checkout.root)
    local = checkout.tables()
    assert len(local) > 40 and checkout.tables("slurm") == local
    assert "nothing was run" in checkout.reproduce("--run", "slurm").stdout
