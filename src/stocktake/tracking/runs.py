"""Tracked runs: written to a folder first, uploaded to MLflow whenever the store can take it.

    with start_run(config.tracking, workspace=Path("workspace"), name="majority", tags={"stage": "majority"}) as run:
        run.log_params({"seed": 0})
        run.log_metrics({"val/macro_f1": 0.08})

Importing this module does not import MLflow.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials
from stocktake.signals import TerminatedError, sigterm_raises
from stocktake.tracking.addresses import configured_uri, resolve
from stocktake.tracking.attached_run import VARIABLE, take_attached_run_id
from stocktake.tracking.connection import Connection
from stocktake.tracking.known_stores import add_known_store
from stocktake.tracking.live_upload import LiveUploader
from stocktake.tracking.local_store import FAILED, FINISHED, KILLED, DatasetRecord, LocalRun
from stocktake.tracking.source_tags import source_tags

__all__ = ["DatasetRecord", "TrackedRun", "start_run"]


class TrackedRun(LocalRun):
    """A run that is alive, uploaded while it lasts. Nothing here raises because of a tracking server.

    One that was made by `create` has no uploader: it is on disk only.
    """

    _uploader: LiveUploader | None = None
    _system_metrics = False
    _is_child = False

    def flush(self) -> None:
        """Upload what there is now, if the store can be reached. A failure is reported once and never raises."""
        if self._uploader is not None:
            self._uploader.flush()

    @contextmanager
    def child(self, name: str, tags: Mapping[str, object]) -> Iterator[TrackedRun]:
        """A run below this one, in the same experiment. It ends with the block."""
        run = TrackedRun.create_child(self, name)
        run._uploader, run._system_metrics, run._is_child = self._uploader, self._system_metrics, True
        run.set_tags({**source_tags(), **tags})
        if self._uploader is not None:
            self._uploader.add(run)
        with _alive(run):
            yield run


@contextmanager
def start_run(
    tracking: TrackingConfig,
    *,
    workspace: Path,
    name: str,
    tags: Mapping[str, object],
    parent: Path | None = None,
    reopen: Path | None = None,
) -> Iterator[TrackedRun]:
    """A run that lasts as long as the block: FINISHED, FAILED on an exception, KILLED on Ctrl-C and SIGTERM.

    Where `mlflow run` has opened a run (MLFLOW_RUN_ID), it is that run, in its experiment; a run started later, or by
    a child process, is its own.

    Args:
        tracking: the store, the experiment, and whether to go there at all. Its run_name beats `name`.
        workspace: the run folder is made in runs/ below it.
        name: of the run.
        tags: of the run, besides those it always has.
        parent: folder of the run of another process, below which this one is; its experiment is taken, `run_name`
            is not.
        reopen: folder of an earlier run whose process has ended: continue it, in the same MLflow run.

    Raises:
        StocktakeError: the store cannot be used, before anything is written; or `reopen` is alive.
    """
    attach = take_attached_run_id()
    stores = resolve(tracking)
    connection = None
    if not tracking.offline:
        connection = Connection(stores)
        connection.open()
    if reopen is not None:
        run = TrackedRun.reopen(reopen)
    elif parent is not None:
        run = TrackedRun.create_child(LocalRun.open(parent), name)
    else:
        # Offline, the default store is left open: where the folder is uploaded from may be another machine.
        is_known = connection is not None or configured_uri(tracking) is not None
        run = TrackedRun.create(
            workspace / "runs",
            name=tracking.run_name or name,
            experiment=tracking.experiment,
            tracking_uri=without_credentials(stores.tracking) if is_known else None,
            attach_run_id=attach,
        )
    if run.state.tracking_uri is not None:
        add_known_store(run.folder.parent, run.state.tracking_uri)
    is_attached = attach is not None and run.state.attach_run_id == attach
    run._system_metrics = tracking.system_metrics
    run.set_tags({**source_tags(attached=is_attached), **tags})
    with sigterm_raises():
        if connection is not None:
            try:
                _begin(run, connection)
            except BaseException as error:
                if run.run_id is None and reopen is None:
                    run.release()
                    shutil.rmtree(run.folder, ignore_errors=True)
                else:
                    _finish(run, *_end_of(error))
                raise
            if attach is not None and not is_attached:
                # `mlflow run` opened a run for what continues an earlier one: it says which
                with suppress(Exception):
                    connection.client.set_tag(attach, "stocktake.continued_in", run.run_id)
        with _alive(run):
            yield run


def _begin(run: TrackedRun, connection: Connection) -> None:
    """Create the MLflow run. Unlike later, a failure raises, before any work is lost."""
    from stocktake.tracking.uploader import UploadError, get_run

    run._uploader = LiveUploader(connection, run.folder.parent.parent)
    attach = run.state.attach_run_id
    try:
        if attach is not None and get_run(connection, attach) is None:
            raise StocktakeError(
                f"{VARIABLE} is {attach}, which {connection.shown} does not have: unset it or correct --tracking.uri"
            )
        run._uploader.begin(run)
    except UploadError as error:
        raise StocktakeError(
            f"cannot start a run in {connection.shown} ({error}): correct --tracking.uri, or pass --tracking.offline"
            " true and run `stocktake sync` later"
        ) from error


@contextmanager
def _alive(run: TrackedRun) -> Iterator[None]:
    """From the first flush to the last, whatever ends the block."""
    monitor = None
    status, reason = FINISHED, None
    try:
        run.flush()
        if run._system_metrics:
            from stocktake.tracking.system_metrics import SystemMetrics

            monitor = SystemMetrics(run.log_metrics)
            monitor.start()
        yield
    except BaseException as error:
        status, reason = _end_of(error)
        if reason is not None:
            run.set_tags({"failure": reason})
        raise
    finally:
        if monitor is not None:
            monitor.finish()
        _finish(run, status, reason)


def _finish(run: TrackedRun, status: str, reason: str | None) -> None:
    run.finish(status, reason)
    if run._uploader is not None:
        run._uploader.flush() if run._is_child else run._uploader.close()
    run.write_result()  # once more, with the run's id
    run.release()


def _end_of(error: BaseException) -> tuple[str, str | None]:
    lines = redact(str(error)).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:500].rstrip(": ")
    if isinstance(error, TerminatedError):
        return KILLED, "SIGTERM"
    if isinstance(error, KeyboardInterrupt):
        return KILLED, reason
    if isinstance(error, SystemExit) and not error.code:
        return FINISHED, None
    return FAILED, reason
