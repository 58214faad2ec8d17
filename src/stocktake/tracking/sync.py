"""Upload of the runs of a workspace that no store has in full."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials
from stocktake.tracking.addresses import Stores, given_uri, resolve
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
        folders = _read(runs, say, counts)
        incomplete = _with_ancestors(folders)
        connect = _Connections(runs, tracking)
        for name in _parents_first(folders):
            if name not in incomplete:
                counts["complete"] += 1
                continue
            locked = folders[name]
            if not locked.try_lock():
                counts["running"] += 1
                say(f"{name}: still running (process {locked.state.pid}), left alone")
                continue
            try:
                run = LocalRun.open(locked.path)  # as its process left it
                _kill_if_dead(run)
                connection = connect(run)
                was_complete = run.is_uploaded(without_credentials(connection.stores.tracking))
                RunUploader(run, connection).upload()
                run.write_result()
            except (UploadError, StocktakeError, OSError, ValueError) as error:
                counts["pending"] += 1
                say(f"{name}: not uploaded: {brief(error)}")
            else:
                counts["complete" if was_complete else "uploaded"] += 1
                if not was_complete:
                    say(f"{name}: uploaded to {connection.shown} as {run.state.status}")
            finally:
                locked.release()
    return counts


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
        if given_uri(self._tracking) is not None or uri is None:
            return resolve(self._tracking)
        if uri not in self._known:
            raise StocktakeError(
                f"its run.json names the store {redact(uri)}, which no run of this workspace was started with: give"
                " it as --tracking.uri if you trust it"
            )
        return resolve(replace(self._tracking, uri=uri))


def _read(runs: Path, say: Callable[[str], None], counts: dict[str, int]) -> dict[str, LocalRun]:
    folders = {}
    for path in sorted(runs.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            try:
                folders[path.name] = LocalRun.open(path)
            except (StocktakeError, OSError, ValueError) as error:
                counts["pending"] += 1
                say(f"{path.name}: not uploaded: {brief(error)}")
    return folders


def _with_ancestors(folders: dict[str, LocalRun]) -> set[str]:
    """Runs that no store has in full, and the runs above them, which have to be in the same store."""
    names = {name for name, run in folders.items() if not run.is_uploaded()}
    for name in list(names):
        parent = folders[name].state.parent
        while parent is not None and parent in folders and parent not in names:
            names.add(parent)
            parent = folders[parent].state.parent
    return names


def _parents_first(folders: dict[str, LocalRun]) -> list[str]:
    def depth(name: str) -> int:
        above, parent = 0, folders[name].state.parent
        while parent is not None and parent in folders and above < len(folders):
            above, parent = above + 1, folders[parent].state.parent
        return above

    return sorted(folders, key=lambda name: (depth(name), folders[name].state.start_ms))


def _kill_if_dead(run: LocalRun) -> None:
    """Mark a run whose process died without ending it as KILLED."""
    state = run.state
    if state.status == RUNNING:
        _write_end(run, KILLED, f"its process ({state.pid} on {state.host}) died: killed, or out of memory")


def _write_end(run: LocalRun, status: str, reason: str) -> None:
    run.set_tags({"failure": reason})
    # What it logged last is nearer to its end than today is.
    last = max([run.state.start_ms, *(point.timestamp_ms for point in run.read_metrics()[0])])
    run.finish(status, reason, last)
