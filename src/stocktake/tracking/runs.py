"""Tracked runs: written to a folder first, uploaded to MLflow whenever the store can take it.

    with start_run(config.tracking, workspace=Path("workspace"), name="majority", tags={"stage": "majority"}) as run:
        run.log_params({"seed": 0})
        run.log_metrics({"val/macro_f1": 0.08})

Importing this module does not import MLflow.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials
from stocktake.signals import TerminatedError, sigterm_raises
from stocktake.tracking.addresses import given_uri, resolve
from stocktake.tracking.attached_run import VARIABLE, take_attached_run_id
from stocktake.tracking.connection import Connection
from stocktake.tracking.known_stores import add_known_store
from stocktake.tracking.live_upload import LiveUploader
from stocktake.tracking.local_store import FAILED, FINISHED, KILLED, DatasetRecord, LocalRun
from stocktake.tracking.source_tags import source_tags

__all__ = ["DatasetRecord", "NullRun", "Run", "TrackedRun", "start_run"]


class Run(Protocol):
    """What a workflow may log. `TrackedRun` keeps it, `NullRun` drops it."""

    folder: Path
    artifacts: Path

    @property
    def name(self) -> str: ...
    @property
    def tags(self) -> Mapping[str, str]: ...
    @property
    def run_id(self) -> str | None: ...
    def log_params(self, params: Mapping[str, object]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...
    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None: ...
    def log_model(self, local_folder: Path, name: str = "model") -> None: ...
    def flush(self) -> None: ...
    def child(self, name: str, tags: Mapping[str, object]) -> AbstractContextManager[Run]: ...


class TrackedRun:
    """A run that is alive.

    `folder` is its folder, `artifacts` the part of it that becomes the MLflow artifact tree: write files there.
    Nothing here raises because of a tracking server.
    """

    def __init__(
        self, local: LocalRun, uploader: LiveUploader | None, *, system_metrics: bool, is_child: bool = False
    ) -> None:
        self.local = local
        self.folder = local.path
        self.artifacts = local.path / "artifacts"
        self._uploader = uploader
        self._system_metrics = system_metrics
        self._is_child = is_child

    @property
    def name(self) -> str:
        """The run's name."""
        return self.local.state.name

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags that were set."""
        return self.local.tags

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while it has none."""
        return self.local.run_id

    @property
    def tracking_uri(self) -> str | None:
        """The store's address without credentials; None where `sync` decides."""
        return self.local.state.tracking_uri

    def log_params(self, params: Mapping[str, object]) -> None:
        """Keep params, flat, with values as text. The first value of a param stays, as MLflow has it too."""
        self.local.add_params(params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags. `mlflow.note.content` is the run's description, Markdown."""
        self.local.set_tags(tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep the values of this moment. What counts as the run's result is the value at the largest step."""
        self.local.append_metrics(metrics, step)

    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None:
        """Keep which data was read, and what for."""
        self.local.add_input(record, context)

    def log_model(self, local_folder: Path, name: str = "model") -> None:
        """Keep a saved MLflow model folder, as the run's model of that name.

        Raises StocktakeError if there is no MLmodel in it.
        """
        if not (local_folder / "MLmodel").is_file():
            raise StocktakeError(f"{local_folder} is no MLflow model folder: it holds no MLmodel")
        target = self.folder / "models" / name
        if local_folder.resolve() != target.resolve():
            temporary = target.with_name(f".{name}")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(local_folder, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        self.local.add_model(name)

    def flush(self) -> None:
        """Upload what there is now, if the store can be reached. A failure is reported once and never raises."""
        if self._uploader is not None:
            self._uploader.flush()

    @contextmanager
    def child(self, name: str, tags: Mapping[str, object]) -> Iterator[TrackedRun]:
        """A run below this one, in the same experiment. It ends with the block."""
        local = _create_below(self.local, name)
        run = TrackedRun(local, self._uploader, system_metrics=self._system_metrics, is_child=True)
        run.set_tags({**source_tags(), **tags})
        if self._uploader is not None:
            self._uploader.add(local)
        with _alive(run):
            yield run


class NullRun:
    """No-op logger for ranks other than 0."""

    name = ""
    run_id = None

    def __init__(self, folder: Path) -> None:
        """`folder` is a place for files that nobody reads; it is not made here."""
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.tags: Mapping[str, str] = {}

    def log_params(self, params: Mapping[str, object]) -> None:
        """Drop them."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Drop them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Drop them."""

    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None:
        """Drop it."""

    def log_model(self, local_folder: Path, name: str = "model") -> None:
        """Drop it."""

    def flush(self) -> None:
        """Do nothing."""

    @contextmanager
    def child(self, name: str, tags: Mapping[str, object]) -> Iterator[NullRun]:  # noqa: ARG002
        """Yield this run."""
        yield self


def _create_below(parent: LocalRun, name: str) -> LocalRun:
    return LocalRun.create(
        parent.path.parent,
        name=name,
        experiment=parent.state.experiment,
        tracking_uri=parent.state.tracking_uri,
        parent=parent.path.name,
    )


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
        local = LocalRun.reopen(reopen)
    elif parent is not None:
        local = _create_below(LocalRun.open(parent), name)
    else:
        # Offline, the default store is left open: where the folder is uploaded from may be another machine.
        is_known = connection is not None or given_uri(tracking) is not None
        local = LocalRun.create(
            workspace / "runs",
            name=tracking.run_name or name,
            experiment=tracking.experiment,
            tracking_uri=without_credentials(stores.tracking) if is_known else None,
            attach_run_id=attach,
        )
    if local.state.tracking_uri is not None:
        add_known_store(local.path.parent, local.state.tracking_uri)
    uploader = LiveUploader(connection, local.path.parent.parent) if connection else None
    run = TrackedRun(local, uploader, system_metrics=tracking.system_metrics)
    is_attached = attach is not None and local.state.attach_run_id == attach
    run.set_tags({**source_tags(attached=is_attached), **tags})
    with sigterm_raises():
        try:
            if connection is not None and uploader is not None:
                _begin(local, connection, uploader)
        except BaseException as error:
            if run.run_id is None and reopen is None:
                local.release()
                shutil.rmtree(local.path, ignore_errors=True)
            else:
                _finish(run, *_end_of(error))
            raise
        if connection is not None and attach is not None and not is_attached:
            # `mlflow run` opened a run for what continues an earlier one: it says which
            with suppress(Exception):
                connection.client.set_tag(attach, "stocktake.continued_in", run.run_id)
        with _alive(run):
            yield run


def _begin(local: LocalRun, connection: Connection, uploader: LiveUploader) -> None:
    """Create the MLflow run. Unlike later, a failure raises, before any work is lost."""
    from stocktake.tracking.uploader import UploadError, get_run

    attach = local.state.attach_run_id
    try:
        if attach is not None and get_run(connection, attach) is None:
            raise StocktakeError(
                f"{VARIABLE} is {attach}, which {connection.shown} does not have: unset it or correct --tracking.uri"
            )
        uploader.begin(local)
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

            monitor = SystemMetrics(run.local.append_metrics)
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
    run.local.finish(status, reason)
    if run._uploader is not None:
        run._uploader.flush() if run._is_child else run._uploader.close()
    run.local.write_result()  # once more, with the run's id
    run.local.release()


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
