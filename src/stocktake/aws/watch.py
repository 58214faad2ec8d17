"""Following a job to its end, whichever kind it is. Ctrl-C asks what is meant."""

from __future__ import annotations

import sys
from pathlib import Path

from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job, is_tuning_name, stop_job
from stocktake.aws.logs import follow_training_job
from stocktake.aws.results import collect_results
from stocktake.config.runs import TrackingConfig


def watch(aws: Aws, name: str, workspace: Path, tracking: TrackingConfig) -> Job | None:
    """Follow a job to its end and collect its results. Ctrl-C asks whether to stop the job or to stop watching.

    Returns:
        The ended job; None for one that is left running.
    """
    while True:
        try:
            if is_tuning_name(name):
                from stocktake.aws.tuning_watch import follow_tuning_job

                return follow_tuning_job(aws, name, workspace, tracking)
            job = follow_training_job(aws, name)
            break
        except KeyboardInterrupt:
            match _ask(name):
                case "stop":
                    print(f"stopping {name}", flush=True)
                    stop_job(aws, name)
                case "leave":
                    return None
    results = collect_results(aws, job, workspace, tracking)
    if job.billed_seconds is not None:
        print(f"billed: {job.billed_seconds} s on {job.instance_count} x {job.instance_type}")
    for folder in results.folders:
        print(f"results on disk: {folder}")
    if results.source:
        print(f"the run {job.run_id} is {results.status}; source of its results: {results.source}", flush=True)
    return job


def left_running(name: str) -> str:
    """What to say of a job that is no longer watched."""
    return f"{name} is left running; `stocktake jobs --follow {name}` collects its results"


def _ask(name: str) -> str:
    """stop, leave or wait. Where nobody can be asked, an interrupt stops the job: it costs money."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "stop"
    try:
        answer = input(f"\n{name}: [s]top the job, [l]eave it running and stop watching, or [w]ait on? [w] ")
    except (EOFError, KeyboardInterrupt):
        return "leave"
    return {"s": "stop", "l": "leave"}.get(answer.strip().lower()[:1], "wait")
