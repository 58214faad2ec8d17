"""`stocktake jobs`: list training and tuning jobs, follow one to its end and collect its results, or stop it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from stocktake.aws.connection import Aws
from stocktake.aws.jobs import COMPLETED, Job, TuningJob, list_jobs, stop_job
from stocktake.aws.watch import left_running, watch
from stocktake.config.aws import JobsConfig
from stocktake.errors import StocktakeError
from stocktake.tables import show_table


def jobs(config: JobsConfig) -> None:
    """Print the list, or follow or stop a job.

    Raises:
        StocktakeError: AWS refuses, there is no such job, or the one that was followed did not complete.
    """
    aws = Aws(config.region, bucket_owner=config.bucket_owner)
    name = config.stop or config.follow
    if name is None:
        rows = [_row(job) for job in list_jobs(aws, config.limit)]
        if rows:
            show_table(rows)
        else:
            print("no jobs; submit one with `mlflow run . -b sagemaker --backend-config deploy/sagemaker.json`")
        return
    if config.stop:
        stop_job(aws, name)
    job = watch(aws, name, Path(config.workspace), config.tracking)
    if job is None:
        print(left_running(name))
    elif job.status != COMPLETED and not config.stop:
        raise StocktakeError(f"{name} {job.status}: {job.failure or job.step}; its logs: {job.log_link(aws.region)}")


def _row(job: Job | TuningJob) -> dict[str, Any]:
    at_once = f"{job.workers} x " if isinstance(job, TuningJob) else ""
    return {
        "name": job.name,
        "state": job.step if isinstance(job, TuningJob) or not job.has_ended else job.status,
        "age": _age(datetime.datetime.now(datetime.UTC) - job.created),
        "instances": f"{at_once}{job.instance_count} x {job.instance_type}{' spot' if job.is_spot else ''}",
        "billed s": job.billed_seconds,  # the sum over a tuning job's trials is on its run
        "run": (job.run_id or "")[:8],
    }


def _age(age: datetime.timedelta) -> str:
    """In its largest unit: 40s, 12min, 3h, 2d."""
    seconds = max(0, int(age.total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
