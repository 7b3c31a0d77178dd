# The order of the stages: one rule a notebook, one job a system where systems differ (deescal.core: STAGES).
# Which jobs run again is decided by content hashes: `plan` takes away the stamps of stale jobs.
import json, shlex, sys
from deescal.core import DeescalError, job_after, lock, plan, resolve

overrides = config.get("overrides", {})
profile = config.get("profile", "sample")
try:
    jobs = resolve(profile, overrides)
    if workflow.is_main_process:
        held = lock(jobs[0].run)
        plan(jobs)
except DeescalError as e:
    sys.exit(f"deescal: {e}")
arguments = " ".join(shlex.quote(a) for a in ["--profile", profile, *(x for k, v in overrides.items() for x in ("--set", f"{k}={json.dumps(v)}"))])

def stamp(job): return str(job.stamp.relative_to(job.run.root))

rule all:
    input: [stamp(j) for j in jobs]
    localrule: True

for job in jobs:
    rule:
        name: job.name.replace("-", "_")
        input: [stamp(a) for a in job_after(job, jobs)]
        output: touch(stamp(job))
        params: command=f"{shlex.quote(sys.executable)} -c 'from deescal.core import main; main()' job {job.name} {arguments}"
        shell: "{params.command}"
