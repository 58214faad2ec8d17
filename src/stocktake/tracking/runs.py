"""Tracked runs: written to a folder first, mirrored to MLflow whenever the store can take it.

    with start_run(config.tracking, workspace=Path("workspace"), name="majority", tags={"stage": "majority"}) as run:
        run.log_params({"seed": 0})
        run.log_metrics({"val/macro_f1": 0.08})

Importing this module does not import MLflow.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

import stocktake
from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import given_uri, redact, resolve, without_credentials
from stocktake.tracking.connection import Connection
from stocktake.tracking.local_store import FAILED, FINISHED, KILLED, DatasetRecord, LocalRun

__all__ = ["DatasetRecord", "NullRun", "Run", "TrackedRun", "start_run"]

_FLUSH_SECONDS = 5.0
_LAST_ATTEMPTS = 3


class _TerminatedError(SystemExit):
    """SIGTERM, as an exception, so that the run is closed on the way out."""


class Run(Protocol):
    """What a workflow may say about its run. `NullRun` is deaf to all of it."""

    folder: Path
    artifacts: Path

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

    def __init__(self, run_folder: LocalRun, connection: Connection | None, *, system_metrics: bool) -> None:
        self.run_folder = run_folder
        self.folder = run_folder.path
        self.artifacts = run_folder.path / "artifacts"
        self._connection = connection
        self._system_metrics = system_metrics
        self._flushed = time.monotonic()
        self._ended_children: list[LocalRun] = []

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while it has none."""
        return self.run_folder.state.upload.run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        """Keep params, flat, with values as text. The first value of a param stays, as MLflow has it too."""
        self.run_folder.add_params(params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags. `mlflow.note.content` is the run's description, Markdown."""
        self.run_folder.set_tags(tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep the values of this moment. What counts as the run's result is the value at the largest step."""
        self.run_folder.append_metrics(metrics, step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None:
        """Keep which data was read, and what for."""
        self.run_folder.add_input(record, context)

    def log_model(self, local_folder: Path, name: str = "model") -> None:
        """Keep a saved MLflow model folder, as the run's model of that name.

        Raises StocktakeError if there is no MLmodel in it.
        """
        if not (local_folder / "MLmodel").is_file():
            raise StocktakeError(f"{local_folder} is no MLflow model folder: it holds no MLmodel")
        inside = self.folder / "models" / name
        if local_folder.resolve() == inside.resolve():
            return
        beside = inside.with_name(f".{name}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(local_folder, beside)
        shutil.rmtree(inside, ignore_errors=True)
        beside.rename(inside)

    def flush(self) -> None:
        """Upload what is pending, if the store is in reach. Says once when it is not, and never raises for it."""
        self._flush(last=False)

    @contextmanager
    def child(self, name: str, tags: Mapping[str, object]) -> Iterator[TrackedRun]:
        """A run below this one, in the same experiment. It ends with the block."""
        folder = _create_below(self.run_folder, name)
        run = TrackedRun(folder, self._connection, system_metrics=self._system_metrics)
        run.set_tags({**_context_tags(), **tags})
        try:
            with _alive(run):
                yield run
        finally:
            self._ended_children.append(folder)

    def _flush(self, *, last: bool) -> None:
        connection = self._connection
        if connection is None:
            return
        if not last and not connection.due():
            return
        from stocktake.tracking.uploader import UploadError, upload

        for attempt in range(_LAST_ATTEMPTS if last else 1):
            try:
                for folder in (self.run_folder, *self._ended_children):
                    if folder.pending():
                        upload(folder, connection)
                self._ended_children = []
                connection.succeeded()
            except (UploadError, StocktakeError) as error:
                connection.failed()
                connection.warn(error, self.folder.parent.parent)
                if last and attempt + 1 < _LAST_ATTEMPTS and connection.trouble() is None:
                    time.sleep(1 + attempt)  # a busy SQLite file, or a hiccup
                    continue
            break
        self._flushed = time.monotonic()


class NullRun:
    """Takes everything and keeps nothing: for the processes of a distributed job that are not the first."""

    def __init__(self, folder: Path) -> None:
        """`folder` is a place for files that nobody will read; it is not made here."""
        self.folder = folder
        self.artifacts = folder / "artifacts"

    @property
    def run_id(self) -> str | None:
        """None."""
        return None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Nothing."""

    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None:
        """Nothing."""

    def log_model(self, local_folder: Path, name: str = "model") -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    @contextmanager
    def child(self, name: str, tags: Mapping[str, object]) -> Iterator[NullRun]:  # noqa: ARG002
        """Itself."""
        yield self


def _create_below(parent: LocalRun, name: str) -> LocalRun:
    state = parent.state
    return LocalRun.create(
        parent.path.parent,
        name=name,
        experiment=state.experiment,
        tracking_uri=state.tracking_uri,
        registry_uri=state.registry_uri,
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
        reopen: folder of an earlier run whose process has ended: go on in it, in the same MLflow run.

    Raises:
        StocktakeError: the store cannot be used, before anything is written; or `reopen` is alive.
    """
    attach = os.environ.pop("MLFLOW_RUN_ID", None) or None
    with ExitStack() as stack:
        stores = resolve(tracking)
        connection = None
        if not tracking.offline:
            connection = Connection(stores)
            connection.open()
        # Offline, the default store is left open: where the folder is uploaded from may be another machine.
        is_known = connection is not None or given_uri(tracking) is not None
        if reopen is not None:
            folder = LocalRun.reopen(reopen)
        elif parent is not None:
            folder = _create_below(LocalRun.open(parent), name)
        else:
            folder = LocalRun.create(
                workspace / "runs",
                name=tracking.run_name or name,
                experiment=tracking.experiment,
                tracking_uri=without_credentials(stores.tracking) if is_known else None,
                registry_uri=without_credentials(stores.registry) if is_known else None,
                attach_run_id=attach,
            )
        run = TrackedRun(folder, connection, system_metrics=tracking.system_metrics)
        attached = attach is not None and folder.state.attach_run_id == attach
        run.set_tags({**_context_tags(attached=attached), **tags})
        stack.enter_context(sigterm_raises())
        try:
            _begin(run, connection)
        except BaseException as error:
            if run.run_id is None and reopen is None:
                folder.release()
                shutil.rmtree(folder.path, ignore_errors=True)
            else:
                _finish(run, *_end_of(error))
            raise
        if connection is not None and attach is not None and not attached:
            # `mlflow run` opened a run for what goes on in an earlier one: it says where
            with suppress(Exception):
                connection.client.set_tag(attach, "stocktake.goes_on_in", run.run_id)
        stack.enter_context(_alive(run))
        yield run


def _begin(run: TrackedRun, connection: Connection | None) -> None:
    """Create the MLflow run. Unlike later, trouble is said here, before any work is lost."""
    if connection is None:
        return
    from stocktake.tracking.uploader import UploadError, holds_run, upload

    attach = run.run_folder.state.attach_run_id
    try:
        if attach is not None and not holds_run(connection, attach):
            raise StocktakeError(
                f"MLFLOW_RUN_ID is {attach}, which {connection.shown} does not have: unset it or correct --tracking.uri"
            )
        upload(run.run_folder, connection)
    except UploadError as error:
        raise StocktakeError(
            f"cannot start a run in {connection.shown} ({error}): correct --tracking.uri, or pass --tracking.offline"
            " true and run `stocktake sync` later"
        ) from error


@contextmanager
def _alive(run: TrackedRun) -> Iterator[None]:
    """From the first flush to the last, whatever ends the block."""
    folder = run.run_folder
    monitor = None
    try:
        run.flush()
        if run._system_metrics:
            from stocktake.tracking.system_metrics import FolderMonitor

            monitor = FolderMonitor(folder.append_metrics)
            monitor.start()
        yield
    except BaseException as error:
        status, reason = _end_of(error)
        if reason is not None:
            folder.set_tags({"failure": reason})
        raise
    else:
        status, reason = FINISHED, None
    finally:
        if monitor is not None:
            monitor.finish()
        _finish(run, status, reason)


def _finish(run: TrackedRun, status: str, reason: str | None) -> None:
    run.run_folder.finish(status, reason)
    run._flush(last=True)
    run.run_folder.write_result()  # once more, with the run's id
    run.run_folder.release()


def _end_of(error: BaseException) -> tuple[str, str | None]:
    lines = redact(str(error)).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:500].rstrip(": ")
    if isinstance(error, _TerminatedError):
        return KILLED, "SIGTERM"
    if isinstance(error, KeyboardInterrupt):
        return KILLED, reason
    if isinstance(error, SystemExit) and not error.code:
        return FINISHED, None
    return FAILED, reason


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, unless somebody else handles it already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _TerminatedError(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _context_tags(*, attached: bool = False) -> dict[str, str]:
    """What every run says about where it comes from. An attached run has its source from `mlflow run`."""
    tags = {"stocktake.version": stocktake.__version__}
    if not attached:
        tags |= {"mlflow.source.name": Path(sys.argv[0]).name or "stocktake", "mlflow.source.type": "LOCAL"}
        with suppress(OSError, KeyError, ImportError):  # a container may have no user name
            tags["mlflow.user"] = getpass.getuser()
    package = Path(stocktake.__file__).parent
    # An installed package says nothing about the checkout that its environment happens to lie in.
    where = Path.cwd() if "site-packages" in package.parts else package
    if commit := _git(where, "rev-parse", "HEAD"):
        tags |= {"git.commit": commit, "mlflow.source.git.commit": commit}
        if _git(where, "status", "--porcelain", "--untracked-files=no"):
            tags["git.dirty"] = "true"
    return tags


def _git(where: Path, *arguments: str) -> str | None:
    """What git says, None outside of a checkout or without git."""
    try:
        done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
