"""Upload of the runs of a workspace that no store has in full."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact
from stocktake.tracking.addresses import Stores, configured_uri, resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.known_stores import known_stores
from stocktake.tracking.local_store import FINISHED, KILLED, RUNNING, LocalRun
from stocktake.tracking.uploader import RunUploader, UploadError


def sync_runs(runs: Path, tracking: TrackingConfig, say: Callable[[str], None]) -> dict[str, int]:
    """Upload every run folder in `runs` that no store has in full, parents before children.

    A store that `tracking` or the environment gives takes all of them; otherwise each goes to the address in its
    run.json, if this workspace started a run there. A folder whose process is alive is left alone. One sync at a time
    works on a workspace; a second one waits.

    Args:
        runs: the folder of run folders. Links in it are skipped.
        tracking: the store.
        say: takes a line about each folder that needed something.

    Returns:
        How many were `uploaded`, are still `pending`, still `running`, and were `complete` already.
    """
    counts = {"uploaded": 0, "pending": 0, "running": 0, "complete": 0}
    if not runs.is_dir():
        return counts
    with FileLock(runs / ".sync.lock"):
        connect = _Connections(runs, tracking)
        for run in _read(runs, say, counts):
            name = run.folder.name
            if run.is_uploaded():
                counts["complete"] += 1
            elif not run.try_lock():
                counts["running"] += 1
                say(f"{name}: still running (process {run.state.pid}), left alone")
            else:
                try:
                    say(f"{name}: uploaded to {_upload(run.folder, connect)}")
                    counts["uploaded"] += 1
                except (UploadError, StocktakeError, OSError, ValueError) as error:
                    counts["pending"] += 1
                    say(f"{name}: not uploaded: {brief(error)}")
                finally:
                    run.release()
    return counts


def _upload(folder: Path, connect: _Connections) -> str:
    """Upload a run as its process has left it; where to, and as what."""
    run = LocalRun.open(folder)
    if run.state.status == RUNNING:
        _write_end(run, KILLED, f"its process ({run.state.pid} on {run.state.host}) died: killed, or out of memory")
    connection = connect(run)
    RunUploader(run, connection).upload()
    run.write_result()
    return f"{connection.shown} as {run.state.status}"


def end_run(path: Path, tracking: TrackingConfig, *, status: str, reason: str) -> bool:
    """End a run whose process is gone: FAILED or KILLED with the reason, here and in the store.

    Returns:
        False where there was nothing to end: its process is alive, or it finished.
    """
    run = LocalRun.open(path)
    if run.state.status == FINISHED or not run.try_lock():
        return False
    try:
        _write_end(run, status, reason)
        if not tracking.offline:
            with suppress(UploadError, StocktakeError):  # `sync` uploads it later
                RunUploader(run, _Connections(path.parent, tracking)(run)).upload()
            run.write_result()
    finally:
        run.release()
    return True


class _Connections:
    """Opens each store once, however many runs go there."""

    def __init__(self, runs: Path, tracking: TrackingConfig) -> None:
        self._tracking = tracking
        self._known = known_stores(runs)
        self._opened: dict[Stores, Connection | StocktakeError] = {}

    def __call__(self, run: LocalRun) -> Connection:
        """The connection for a run. StocktakeError: its address is not this workspace's, or does not answer."""
        stores = self._stores(run)
        if stores not in self._opened:
            connection = Connection(stores)
            try:
                connection.open()
            except StocktakeError as error:
                self._opened[stores] = error
            else:
                self._opened[stores] = connection
        opened = self._opened[stores]
        if isinstance(opened, StocktakeError):
            raise opened
        return opened

    def _stores(self, run: LocalRun) -> Stores:
        uri = run.state.tracking_uri
        if configured_uri(self._tracking) is not None or uri is None:
            return resolve(self._tracking)
        if uri not in self._known:
            raise StocktakeError(
                f"its run.json names the store {redact(uri)}, which no run of this workspace was started with: give"
                " it as --tracking.uri if you trust it"
            )
        return resolve(replace(self._tracking, uri=uri))


def _read(runs: Path, say: Callable[[str], None], counts: dict[str, int]) -> list[LocalRun]:
    """The run folders, in the order in which they were started: a parent before its children."""
    opened = []
    for path in sorted(runs.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            try:
                opened.append(LocalRun.open(path))
            except (StocktakeError, OSError, ValueError) as error:
                counts["pending"] += 1
                say(f"{path.name}: not uploaded: {brief(error)}")
    return sorted(opened, key=lambda run: (run.state.start_ms, run.state.parent is not None))


def _write_end(run: LocalRun, status: str, reason: str) -> None:
    run.set_tags({"failure": reason})
    # What it logged last is nearer to its end than today is.
    last = max([run.state.start_ms, *(point.timestamp_ms for point in run.read_metrics()[0])])
    run.finish(status, reason, last)
