# The order of the stages: one rule a notebook, one job a system where systems differ. Which stages there are, and what
# each reads and writes, is what their notebooks declare (deescal.engine.series). Which jobs run again is decided by
# content hashes: `plan` takes away the stamps of stale jobs, or in a dry run names them.
import dataclasses, json, shlex, sys
from deescal.engine.errors import DeescalError, host_error
from deescal.engine.execute import job_log
from deescal.engine.files import write_text
from deescal.engine.jobs import job_after, lock, plan, resolve

request = {"profile": config.get("profile", "sample"), "overrides": config.get("overrides", {}),
           "failed": config.get("failed", {})}
try:
    jobs = resolve(**request)
    run = jobs[0].run
    def stamp(job): return str(job.stamp.relative_to(run.root))
    def log_of(job): return str(job_log(job).relative_to(run.root))
    request_file = str((run.data / "request.json").relative_to(run.root))
    if workflow.is_main_process:
        if not workflow.dryrun:
            held = lock(run, jobs)
            write_text(run.root / request_file, json.dumps(request, indent=1))
        again = plan(jobs, dry=workflow.dryrun)
        if workflow.dryrun:
            workflow.dag_settings = dataclasses.replace(
                workflow.dag_settings, forcerun={*workflow.dag_settings.forcerun, *map(stamp, again)})
except DeescalError as e:
    sys.exit(f"deescal: {e}")
except OSError as e:
    sys.exit(f"deescal: {host_error(e, 'plan the run') or e}")

rule all:
    input: [stamp(j) for j in jobs]
    localrule: True

for job in jobs:
    rule:
        name: job.name.replace("-", "_").replace(".", "_")
        input: [stamp(a) for a in job_after(job, jobs)]
        output: touch(stamp(job))
        log: log_of(job)
        threads: job.resources["threads"]
        # a job that is run again gets more; the default arguments bind this job's own numbers
        resources:
            mem_mb=lambda wildcards, attempt, mb=job.resources["mem_mb"]: mb * attempt,
            runtime=lambda wildcards, attempt, minutes=job.resources["runtime"]: minutes * attempt,
            gpu=job.resources["gpu"]
        params: python=shlex.quote(sys.executable), job=job.name, request=request_file
        shell: "exec {params.python} -m deescal.engine.cli job {params.job} --request {params.request} > {log} 2>&1"
