# The order of the stages: one rule a notebook, one job a system where systems differ. Which stages there are, and what
# each reads and writes, is what their notebooks declare (deescal.engine.series). Which jobs run again is decided by
# content hashes: `plan` takes away the stamps of stale jobs, or in a dry run, which changes nothing, names them.
import json, shlex, sys
from deescal.engine.errors import DeescalError, host_error
from deescal.engine.execute import job_log
from deescal.engine.files import write_text
from deescal.engine.jobs import job_after, lock, plan, resolve

request = {"profile": config.get("profile", "sample"), "overrides": config.get("overrides", {}),
           "failed": config.get("failed", {})}
try:
    jobs = resolve(**request)
    run = jobs[0].run
    dry = workflow.output_settings.dryrun
    if workflow.is_main_process and not dry:
        held = lock(run, jobs)
        write_text(run.data / "request.json", json.dumps(request, indent=1))
    again = {j.name for j in plan(jobs, dry)} if workflow.is_main_process else {}
except DeescalError as e:
    sys.exit(f"deescal: {e}")
except OSError as e:
    sys.exit(f"deescal: {host_error(e, 'plan the run') or e}")

def below_root(path): return str(path.relative_to(run.root))

def stamp(job):
    "The file that tells Snakemake of a job's end; in a dry run, one that is not there takes the place of a stale one's."
    return below_root(job.stamp) + (".stale" if dry and job.name in again else "")

rule all:
    input: [stamp(j) for j in jobs]
    localrule: True

for job in jobs:
    rule:
        name: job.name.replace("-", "_").replace(".", "_")
        input: [stamp(a) for a in job_after(job, jobs)]
        output: touch(stamp(job))
        log: below_root(job_log(job))
        threads: job.resources["threads"]
        # a job that is run again gets more; the default arguments bind this job's own numbers
        resources:
            mem_mb=lambda wildcards, attempt, mb=job.resources["mem_mb"]: mb * attempt,
            runtime=lambda wildcards, attempt, minutes=job.resources["runtime"]: minutes * attempt,
            gpu=job.resources["gpu"],
            try_number=lambda wildcards, attempt: attempt
        params: python=shlex.quote(sys.executable), job=job.name, request=below_root(run.data / "request.json")
        shell:
            "exec {params.python} -m deescal.engine.cli job {params.job} --request {params.request}"
            " --attempt {resources.try_number} > {log} 2>&1"
