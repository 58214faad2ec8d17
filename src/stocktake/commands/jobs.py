"""`stocktake jobs`: list training and tuning jobs, follow one to its end and bring its results home, or stop it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from stocktake.aws.connection import Aws
from stocktake.aws.jobs import COMPLETED, Job, newest
from stocktake.aws.prices import Prices, read_prices, told
from stocktake.aws.results import cost_of
from stocktake.aws.tuning_jobs import TuningJob, newest_searches
from stocktake.aws.watch import stop_job, watch
from stocktake.config import JobsConfig
from stocktake.errors import StocktakeError


def jobs(config: JobsConfig) -> None:
    """Print the list, or follow or stop a job.

    Raises:
        StocktakeError: AWS refuses, there is no such job, or the one that was followed did not complete.
    """
    aws = Aws(config.region)
    prices = read_prices(Path(config.prices))
    name = config.stop or config.follow
    if name is None:
        found: list[Job | TuningJob] = [*newest(aws, config.limit), *newest_searches(aws, config.limit)]
        _show(sorted(found, key=lambda job: job.created, reverse=True)[: config.limit], prices)
        return
    if config.stop:
        stop_job(aws, name)
    job = watch(aws, name, Path(config.workspace), config.tracking, prices)
    if job is not None and job.status != COMPLETED and not config.stop:
        raise StocktakeError(f"{name} {job.status}: {job.failure or job.step}; its logs: {job.log_link(aws.region)}")


def _show(found: Sequence[Job | TuningJob], prices: Prices | None) -> None:
    if not found:
        print("no jobs; submit one with `mlflow run . -b sagemaker --backend-config deploy/sagemaker.json`")
        return
    rows = [("NAME", "STATE", "AGE", "MACHINES", "COST", "RUN"), *(_row(job, prices) for job in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _row(job: Job | TuningJob, prices: Prices | None) -> tuple[str, ...]:
    cost = cost_of(job, prices) if isinstance(job, Job) else None  # the sum over a tuning job's trials is on its run
    at_once = "" if isinstance(job, Job) else f"{job.workers} x "
    return (
        job.name,
        job.status if job.has_ended and isinstance(job, Job) else job.step,
        _age(datetime.datetime.now(datetime.UTC) - job.created),
        f"{at_once}{job.instance_count} x {job.instance_type}{' spot' if job.is_spot else ''}",
        "-" if cost is None else told(cost),
        job.run_id or "-",
    )


def _age(passed: datetime.timedelta) -> str:
    """In its largest unit: 40s, 12min, 3h, 2d."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
