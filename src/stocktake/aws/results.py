"""After a job: its run folders come to this machine, and whatever its MLflow run does not have yet goes there.

A job writes everything to disk first. What it could log itself is in MLflow already; the rest arrives with the job's
output, or, where it was killed before it could write that, with its last checkpoints.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stocktake.aws.connection import Aws, translate_aws_errors
from stocktake.aws.jobs import COMPLETED, Job
from stocktake.aws.jobs import FAILED as JOB_FAILED
from stocktake.aws.packaging import split_uri
from stocktake.aws.prices import Prices, told
from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.redaction import without_credentials
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.known_stores import add_known_store
from stocktake.tracking.local_store import FAILED, FINISHED, KILLED, RUNNING, LocalRun
from stocktake.tracking.sync import sync_runs

LIVE, WITH_OUTPUT = "live", "with the job's output"
RUNS = "runs"
RUN_STATES = {COMPLETED: FINISHED, JOB_FAILED: FAILED}


@dataclass(frozen=True)
class CollectedResults:
    """How a job's results came home."""

    folders: tuple[Path, ...]
    """Run folders in the workspace."""
    how: str | None
    """LIVE, WITH_OUTPUT, or None where the job left no run."""
    status: str
    """Of the MLflow run."""


def collect_results(
    aws: Aws,
    job: Job,
    workspace: Path,
    tracking: TrackingConfig,
    prices: Prices | None,
    say: Callable[[str], None],
    *,
    run_id: str | None = None,
    more_tags: Mapping[str, str] | None = None,
) -> CollectedResults:
    """Bring an ended job's results home. To be repeated at will: what is here already stays.

    Args:
        aws: where the job is.
        job: it has ended.
        workspace: its run folders come to runs/ in here.
        tracking: the store.
        prices: for the tags.
        say: takes a line about what needs to be known.
        run_id: MLflow's run that a job's folder goes to which was given none: a trial's.
        more_tags: of the run.

    Raises:
        StocktakeError: S3 refuses; the job's run in MLflow keeps what it has.
    """
    status = RUN_STATES.get(job.status, KILLED)
    tags = job_tags(aws, job, prices) | dict(more_tags or {})
    run_id = run_id or job.run_id
    runs = workspace / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    folders, how = [], None
    with (
        FileLock(runs / ".arrivals.lock"),  # whoever stops a job follows it too, beside whoever has submitted it
        tempfile.TemporaryDirectory(dir=runs, prefix=f".{job.name}-") as temporary,
    ):
        staging = Path(temporary)
        for name in _fetch(aws, job, staging):
            folder = LocalRun.open(staging / name)
            folder.state.tracking_uri = without_credentials(resolve(tracking).tracking)
            folder.save()
            if folder.state.attach_run_id is None and folder.state.parent is None:
                folder.state.attach_run_id = run_id
                folder.save()
            if folder.state.attach_run_id == run_id:
                how = WITH_OUTPUT if not folder.is_uploaded() else how or LIVE
                if folder.state.status == RUNNING and status != FINISHED:  # killed before it could write its end
                    folder.finish(status, _why(job))
                folder.set_tags(tags | {"arrived": how} | ({} if status == FINISHED else {"failure": _why(job)}))
        for name in sorted(path.name for path in staging.iterdir()):
            if (runs / name).exists():  # brought home before
                shutil.rmtree(staging / name)
            folders.append(runs / name)
        add_known_store(staging, without_credentials(resolve(tracking).tracking))
        counts = sync_runs(staging, tracking, say)
        for path in sorted(staging.iterdir()):
            if not path.name.startswith("."):
                path.rename(runs / path.name)
        if counts["pending"]:
            say(f"some of it could not be uploaded: `stocktake sync --workspace {workspace}` does so later")
    _end_run(job, run_id, tracking, status, tags, how, say)
    return CollectedResults(tuple(folders), how, status)


def job_tags(aws: Aws, job: Job, prices: Prices | None) -> dict[str, str]:
    """What the run says about its job."""
    tags = {
        "job.name": job.name,
        "job.arn": job.arn,
        "job.state": job.status if job.step == job.status else f"{job.status}: {job.step}",
        "job.logs": job.log_link(aws.region),
        "job.instance": f"{job.instance_count} x {job.instance_type}",
        "job.spot": str(job.is_spot).lower(),
    }
    if job.has_ended and job.billed_seconds is not None:
        tags["job.billed_seconds"] = f"{job.billed_seconds * job.instance_count:.0f}"
        if (cost := cost_of(job, prices)) is not None:
            tags["job.cost"] = told(cost)
    return tags


def cost_of(job: Job, prices: Prices | None) -> float | None:
    """Dollars for what the job is billed; None where that or the price is not known."""
    if prices is None or job.billed_seconds is None:
        return None
    return prices.billed(job.instance_type, job.instance_count, job.billed_seconds)


def _why(job: Job) -> str:
    """Why a job did not complete."""
    if job.failure:
        return job.failure
    return "the job was stopped" if job.step in ("Stopped", "Stopping") else f"the job was stopped: {job.step}"


def _fetch(aws: Aws, job: Job, staging: Path) -> list[str]:
    """Unpack the job's run folders; their names."""
    output = job.description["OutputDataConfig"]["S3OutputPath"].rstrip("/")
    bucket, key = split_uri(f"{output}/{job.name}/output/output.tar.gz")
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as file:
        if _download(aws, bucket, key, Path(file.name)):
            with tarfile.open(file.name) as archive:
                for member in archive.getmembers():
                    parts = Path(member.name).parts
                    if RUNS in parts[:2]:
                        member.name = str(Path(*parts[parts.index(RUNS) + 1 :])) if parts[-1] != RUNS else "."
                        archive.extract(member, staging, filter="data")
    if not _run_folders(staging):
        _fetch_checkpoints(aws, job, staging)
    return _run_folders(staging)


def _fetch_checkpoints(aws: Aws, job: Job, staging: Path) -> None:
    """The run folders as they were synchronised while the job ran, without the weights."""
    place = (job.description.get("CheckpointConfig") or {}).get("S3Uri")
    if not place:
        return
    own = f"{job.name}/" if job.description.get("TuningJobArn") else ""  # trials share one place
    bucket, prefix = split_uri(f"{place.rstrip('/')}/{own}{RUNS}/")
    with translate_aws_errors(f"the checkpoints of {job.name}"):
        for page in aws.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                inside = Path(entry["Key"].removeprefix(prefix))
                if inside.suffix == ".ckpt" or ".." in inside.parts or entry["Key"].endswith("/"):
                    continue
                (staging / inside).parent.mkdir(parents=True, exist_ok=True)
                aws.s3.download_file(bucket, entry["Key"], str(staging / inside))


def _run_folders(staging: Path) -> list[str]:
    return sorted(path.parent.name for path in staging.glob("*/run.json"))


def _download(aws: Aws, bucket: str, key: str, path: Path) -> bool:
    """Whether there was such an object."""
    from botocore.exceptions import ClientError

    with translate_aws_errors(f"s3://{bucket}/{key}"):
        try:
            aws.s3.download_file(bucket, key, str(path))
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return False
            raise
    return True


def _end_run(
    job: Job,
    run_id: str | None,
    tracking: TrackingConfig,
    status: str,
    tags: dict[str, str],
    how: str | None,
    say: Callable[[str], None],
) -> None:
    """The MLflow run's state follows the job's, also where no folder came home."""
    if run_id is None:
        return
    connection = Connection(resolve(tracking))
    try:
        with connection.bounded():
            client = connection.client
            info = client.get_run(run_id).info
            if how is None:
                for name, value in (tags | ({} if status == FINISHED else {"failure": _why(job)})).items():
                    client.set_tag(run_id, name, value)
            if info.status != status:
                client.set_terminated(run_id, status)
    except (Exception, StocktakeError) as error:
        say(f"the run {run_id} could not be brought up to date in {connection.shown}: {brief(error)}")
