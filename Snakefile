# The order of the stages: one rule a notebook, one job a system where systems differ (deescal.core: STAGES).
# Which jobs run again is decided by content hashes: `plan` takes away the stamps of stale jobs.
import shlex, sys
from deescal.core import DeescalError, job_after, lock, plan, resolve

request = {"profile": config.get("profile", "sample"), "overrides": config.get("overrides", {})}
try:
    jobs = resolve(**request)
    if workflow.is_main_process:
        held = lock(jobs[0].run)
        plan(jobs, request)
except DeescalError as e:
    sys.exit(f"deescal: {e}")
run = jobs[0].run

def stamp(job): return str(job.stamp.relative_to(run.root))

rule all:
    input: [stamp(j) for j in jobs]
    localrule: True

for job in jobs:
    rule:
        name: job.name.replace("-", "_")
        input: [stamp(a) for a in job_after(job, jobs)]
        output: touch(stamp(job))
        # a model of the hub wants the machine, or its GPU, for itself
        threads: workflow.cores if job.params.get("source", "tiny") not in ("", "tiny") else 1
        params: python=shlex.quote(sys.executable), job=job.name, request=str((run.data / "request.json").relative_to(run.root))
        shell: "{params.python} -c 'from deescal.core import main; main()' job {params.job} --request {params.request}"
