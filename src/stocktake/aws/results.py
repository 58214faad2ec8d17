"""The results of an ended job: its run folders come to this machine, and what its MLflow run lacks is uploaded.

A job writes everything to disk first. What it could log itself is in MLflow already; the rest comes with the job's
output or, if it was killed before it could write that, with its last checkpoints. Both are a stranger's files: whatever
the job's processes ran could have written them.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from stocktake.aws.connection import Aws, AwsError, split_uri, translate_aws_errors
from stocktake.aws.jobs import COMPLETED, Job, printable
from stocktake.aws.jobs import FAILED as JOB_FAILED
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import without_credentials
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.known_stores import add_known_store
from stocktake.tracking.local_store import FAILED, FINISHED, KILLED, RUNNING, LocalRun
from stocktake.tracking.uploader import RunUploader, UploadError

LIVE, WITH_OUTPUT = "live", "job output"
RUN_STATES = {COMPLETED: FINISHED, JOB_FAILED: FAILED}
"""The state of a run by its job's; KILLED for the others."""
_RUNS = "runs"
_NAME = re.compile(r"[\w=+@,()\[\]-][\w=+@,()\[\]. -]*")
"""A part of a path: no separator, no leading dot, no control character."""


@dataclass(frozen=True)
class CollectedResults:
    """What came from a job."""

    folders: tuple[Path, ...]
    """Run folders in the workspace."""
    source: str | None
    """How the run's results came to MLflow: LIVE, WITH_OUTPUT, or None where the job left no run."""
    status: str
    """Of the MLflow run."""


def collect_results(
    aws: Aws,
    job: Job,
    workspace: Path,
    tracking: TrackingConfig,
    *,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> CollectedResults:
    """Collect an ended job's results. Doing it again changes nothing: a folder that is here already stays.

    Args:
        aws: where the job is.
        job: it has ended.
        workspace: its run folders come to runs/ in here.
        tracking: the store.
        run_id: MLflow's run of the job. Default: the one that the job was given.
        tags: further ones of the run.
        quiet: print problems only.

    Raises:
        StocktakeError: S3 refuses; the job's run in MLflow keeps what it has.
    """
    status, run_id = RUN_STATES.get(job.status, KILLED), run_id or job.run_id
    failure = {} if status == FINISHED else {"failure": _reason(job)}
    connection = Connection(resolve(tracking))
    logged = _logged_run(connection, run_id)
    runs = workspace / _RUNS
    runs.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(runs / ".collect.lock"),  # whoever stops a job follows it too, beside whoever has submitted it
        tempfile.TemporaryDirectory(dir=runs, prefix=f".{job.name}-") as temporary,
    ):
        folders = []
        download_results(aws, job, Path(temporary))
        for path in sorted(path.parent for path in Path(temporary).glob("*/run.json")):
            folders.append(runs / path.name)
            if not (runs / path.name).exists():
                path.rename(runs / path.name)
    # Whoever ended the run in MLflow before this was the job itself, which could reach it to the end
    source = None if not folders else LIVE if logged and logged.info.status != RUNNING else WITH_OUTPUT
    if logged and "results.source" in logged.data.tags:
        source = logged.data.tags["results.source"]
    all_tags = job_tags(aws, job) | dict(tags or {}) | failure | ({"results.source": source} if source else {})
    store = without_credentials(connection.stores.tracking)
    add_known_store(runs, store)
    for folder in folders:
        run = LocalRun.open(folder)
        run.state.tracking_uri = store
        if run.state.parent is None:  # whatever the job wrote there: it may log to its own run only
            run.state.attach_run_id = run_id
            run.state.uploads = {uri: copy for uri, copy in run.state.uploads.items() if copy.run_id == run_id}
        run.save()
        if run.state.parent is None:
            run.set_tags(all_tags)
            if run.state.status == RUNNING:  # killed before it could write its end
                run.finish(status, failure.get("failure"))
    if source == WITH_OUTPUT:
        _upload(folders, connection, workspace, quiet)
    if run_id is not None:
        _end_run(connection, run_id, status, all_tags)
    return CollectedResults(tuple(folders), source, status)


def job_tags(aws: Aws, job: Job) -> dict[str, str]:
    """What a run says about its job."""
    tags = {
        "job.name": job.name,
        "job.arn": job.arn,
        "job.state": job.status if job.step == job.status else f"{job.status}: {job.step}",
        "job.logs": job.log_link(aws.region),
        "job.instance": f"{job.instance_count} x {job.instance_type}",
        "job.spot": str(job.is_spot).lower(),
    }
    return tags if job.billed_seconds is None else tags | {"job.billed_seconds": str(job.billed_seconds)}


def download_results(aws: Aws, job: Job, staging: Path) -> None:
    """Write the files of the job's run folders below `staging`, and nothing outside of it.

    Names that no run folder has are left out with a warning, and so is everything in an archive that is no regular
    file: links, devices.

    Raises:
        StocktakeError: S3 refuses, or the job's output is no archive.
    """
    output = job.description["OutputDataConfig"]["S3OutputPath"].rstrip("/")
    bucket, key = split_uri(f"{output}/{job.name}/output/output.tar.gz")
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as file, _cannot_unpack(job):
        try:
            with translate_aws_errors(f"s3://{bucket}/{key}"):
                aws.s3.download_file(bucket, key, file.name)
            with tarfile.open(file.name) as archive:
                _extract(archive, staging)
        except AwsError as error:
            if error.code not in ("404", "NoSuchKey"):
                raise
    if not any(staging.glob("*/run.json")):
        with _cannot_unpack(job):
            _download_checkpoints(aws, job, staging)


def _extract(archive: tarfile.TarFile, staging: Path) -> None:
    for member in archive:
        # The job's output folder of several instances is runs/... or INSTANCE/runs/...
        parts = member.name.removeprefix("./").split("/")
        if _RUNS not in parts[:2] or member.isdir():
            continue
        content = archive.extractfile(member) if member.isreg() else None
        target = _target(staging, "/".join(parts[parts.index(_RUNS) + 1 :])) if content else None
        if content is None or target is None:
            print(f"warning: left out of the job's output: {printable(member.name)}", flush=True)
            continue
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)


def _download_checkpoints(aws: Aws, job: Job, staging: Path) -> None:
    """The run folders as SageMaker synchronised them while the job ran, without the weights."""
    place = (job.description.get("CheckpointConfig") or {}).get("S3Uri")
    if not place:
        return
    own = f"{job.name}/" if job.description.get("TuningJobArn") else ""  # trials share one place
    bucket, prefix = split_uri(f"{place.rstrip('/')}/{own}{_RUNS}/")
    with translate_aws_errors(f"the checkpoints of {job.name}"):
        for page in aws.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for key in (entry["Key"] for entry in page.get("Contents", [])):
                if key.endswith((".ckpt", "/")) or key.rpartition("/")[2].startswith("."):  # locks of a live run
                    continue
                if (target := _target(staging, key.removeprefix(prefix))) is None:
                    print(f"warning: left out of the job's checkpoints: {printable(key)}", flush=True)
                else:
                    aws.s3.download_file(bucket, key, str(target))


def _target(staging: Path, name: str) -> Path | None:
    """Where a job's file goes: RUN/FILE or deeper below staging; None for a name that no run folder has."""
    parts = name.split("/")
    if len(parts) < 2 or not all(_NAME.fullmatch(part) for part in parts):
        return None
    target = staging.joinpath(*PurePosixPath(name).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


@contextmanager
def _cannot_unpack(job: Job) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, tarfile.TarError) as error:
        raise StocktakeError(f"the results of {job.name} cannot be unpacked: {brief(error)}") from None


def _reason(job: Job) -> str:
    """Why a job did not complete."""
    if job.failure:
        return job.failure
    return "the job was stopped" if job.step in ("Stopped", "Stopping") else f"the job was stopped: {job.step}"


def _logged_run(connection: Connection, run_id: str | None) -> Any:
    """The job's run as MLflow has it; None where it does not."""
    try:
        return connection.client.get_run(run_id) if run_id else None
    except Exception:  # whatever a tracking server does, the results come to disk
        return None


def _upload(folders: Sequence[Path], connection: Connection, workspace: Path, quiet: bool) -> None:
    """Upload run folders to MLflow, parents before children."""
    runs = sorted((LocalRun.open(folder) for folder in folders), key=lambda run: run.state.parent is not None)
    for run in runs:
        try:
            RunUploader(run, connection).upload()
            if not quiet:
                print(f"{run.folder.name}: uploaded to {connection.shown}", flush=True)
        except (StocktakeError, UploadError) as error:
            hint = f"`stocktake sync --workspace {workspace}` does so"
            print(f"{run.folder.name} was not uploaded ({brief(error)}): {hint}", flush=True)


def _end_run(connection: Connection, run_id: str, status: str, tags: Mapping[str, str]) -> None:
    """Bring the MLflow run's state and tags up to date, also where the job left no run folder."""
    try:
        run = connection.client.get_run(run_id)
        for name, value in tags.items():
            if run.data.tags.get(name) != value:
                connection.client.set_tag(run_id, name, value)
        if run.info.status != status:
            connection.client.set_terminated(run_id, status)
    except Exception as error:  # whatever a tracking server does, the results are on disk
        print(f"the run {run_id} could not be brought up to date in {connection.shown}: {brief(error)}", flush=True)
