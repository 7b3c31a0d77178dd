"""A Slurm cluster of one node on loopback: munged, slurmctld and slurmd below one temporary folder, for a test.

It needs no systemd, no cgroups and nothing in /etc, and keeps no accounts; as root or not. Try it by hand:

    with slurm_node.running() as node:
        print(node.ask("sinfo"))
"""
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from getpass import getuser
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")

# What is not self-evident here:
# - a node is what its configuration says (config_overrides), so that a test may ask for more memory than there is;
# - linuxproc finds the children of a killed step, kernels in sessions of their own too, where pgid does not;
# - MinJobAge keeps finished jobs in `squeue`, which stands in for accounts;
# - the GPU is none, but is counted and handed out like one.
CONFIGURATION = """
ClusterName=deescal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
MinJobAge=36000
KillWait=2
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:1
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE
"""


def missing():
    "The programs of Slurm and munge that are not on PATH."
    return [p for p in PROGRAMS if not program(p)]


def program(name):
    "Daemons are in sbin, which is not on the PATH of every user."
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Node:
    "A cluster below `folder`. `env` is what a process needs to reach it."

    def __init__(self, folder, cpus, memory_mb):
        self.folder, self.daemons = folder, []
        (folder / "bin").mkdir()
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(
            folder=folder, host=host, ports=free_ports(2), user=getuser(), cpus=cpus, memory_mb=memory_mb))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        conf = folder / "slurm.conf"
        # Snakemake's executor takes every SLURM_* variable from the `srun` of a job, this one too.
        srun = folder / "bin/srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {program("srun")} "$@"\n')
        srun.chmod(0o755)
        self.env = {"SLURM_CONF": str(conf), "PATH": f"{folder}/bin:{os.environ.get('PATH', os.defpath)}"}

    def start(self):
        # munged wants a folder that all may enter and only its user may write; --force is for a /tmp that is not so.
        self.launch("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", "--num-threads=1",
                    f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid",
                    f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed")
        self.wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged opens its socket")
        self.launch("slurmctld", "-D")
        self.launch("slurmd", "-D")
        self.wait(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T", ok=False), 60, "the node is idle")

    def launch(self, name, *args):
        with open(self.folder / f"{name}.out", "wb") as out:
            self.daemons.append(subprocess.Popen(
                [program(name), *args], env=os.environ | self.env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True))

    def ask(self, *command, ok=True):
        "What a command of Slurm prints."
        r = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        assert not ok or r.returncode == 0, f"{' '.join(command)}: {r.stderr}"
        return r.stdout

    def jobs(self):
        "Every job so far, in the order of submission: a dict of id, rule, state, and memory and GPUs asked for."
        fields = {"id": "JobID", "rule": "Comment", "state": "State", "memory": "MinMemory", "gpus": "tres-per-job"}
        lines = self.ask("squeue", "--states=all", "--noheader", "--sort=i",
                         "--Format=" + ",".join(f"{f}:|" for f in fields.values())).splitlines()
        return [dict(zip(fields, line.split("|"))) for line in lines]

    def wait(self, when, seconds, what):
        limit = time.monotonic() + seconds
        while not when():
            dead = [d.args[0] for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > limit:
                raise RuntimeError(f"Slurm on loopback: {dead[0] + ' ended' if dead else f'no sign after {seconds} s'} "
                                   f"before {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self):
        "The last lines of every daemon's log."
        files = [p for p in sorted(self.folder.glob("*")) if p.suffix in (".log", ".out")]
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-15:]) for p in files)

    def processes(self):
        "The ids of every process that was started with this cluster's configuration: daemons, steps, jobs, callers."
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for p in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if mark in p.read_bytes().split(b"\0"):
                    found.append(int(p.parent.name))
        return found

    def stop(self):
        "Jobs first, since a step outlives its slurmd; then the daemons; then, by force, whatever is left."
        with contextlib.suppress(Exception):  # the controller may be what failed
            self.ask("scancel", "--user", getuser(), ok=False)
            limit = time.monotonic() + 15
            while self.ask("squeue", "--noheader", ok=False).strip() and time.monotonic() < limit:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for _ in range(50):
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons:
                daemon.poll()
            if not left:
                break
            time.sleep(0.1)


@contextlib.contextmanager
def running(cpus=2, memory_mb=64_000):
    "A running `Node`; whatever happens, its jobs, processes and files are gone at the end."
    # Not below pytest's folder: the path of a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    node = Node(folder, cpus, memory_mb)
    try:
        node.start()
        yield node
    finally:
        node.stop()
        shutil.rmtree(folder, ignore_errors=True)
