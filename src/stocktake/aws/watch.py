"""Watching a job to its end, whichever kind it is. Ctrl-C asks what is meant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job, describe, follow, stop
from stocktake.aws.prices import Prices, told
from stocktake.aws.results import CollectedResults, collect_results, cost_of
from stocktake.aws.tuning_jobs import TuningJob, describe_search, stop_search
from stocktake.aws.tuning_request import is_tuning_name
from stocktake.aws.tuning_watch import follow_search
from stocktake.config import TrackingConfig


def say(line: str) -> None:
    """On stdout, at once."""
    print(line, flush=True)


def find_job(aws: Aws, name: str) -> Job | TuningJob:
    """The training or tuning job of a name; StocktakeError if there is none."""
    return describe_search(aws, name) if is_tuning_name(name) else describe(aws, name)


def stop_job(aws: Aws, name: str) -> Job | TuningJob:
    """Ask it to end."""
    return stop_search(aws, name) if is_tuning_name(name) else stop(aws, name)


def watch(
    aws: Aws, name: str, workspace: Path, tracking: TrackingConfig, prices: Prices | None
) -> Job | TuningJob | None:
    """Follow a job to its end and bring its results home. Ctrl-C asks whether to stop the job or to stop watching.

    Returns:
        The ended job; None for one that is no longer watched.
    """
    while True:
        try:
            if is_tuning_name(name):
                return follow_search(aws, name, workspace, tracking, prices, say)
            job = follow(aws, name, say)
            break
        except KeyboardInterrupt:
            match _ask(name):
                case "stop":
                    say(f"stopping {name}")
                    stop_job(aws, name)
                case "leave":
                    say(f"{name} goes on; `stocktake jobs --follow {name}` brings its results home")
                    return None
    _tell(job, collect_results(aws, job, workspace, tracking, prices, say), prices)
    return job


def _tell(job: Job, arrival: CollectedResults, prices: Prices | None) -> None:
    if job.billed_seconds is not None:
        machines = f"{job.instance_count} x {job.instance_type}"
        say(f"billed: {job.billed_seconds:.0f} s of {machines}, {told(cost_of(job, prices))}")
    for folder in arrival.folders:
        say(f"results on disk: {folder}")
    if arrival.how:
        say(f"the run {job.run_id} is {arrival.status}; its results arrived {arrival.how}")


def _ask(name: str) -> str:
    """stop, leave or wait. Where nobody can be asked, an interrupt stops the job: it costs money."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "stop"
    ask: Callable[[str], str] = input
    try:
        answer = ask(f"\n{name}: [s]top the job, [l]eave it running and stop watching, or [w]ait on? [w] ")
    except (EOFError, KeyboardInterrupt):
        return "leave"
    return {"s": "stop", "l": "leave"}.get(answer.strip().lower()[:1], "wait")
