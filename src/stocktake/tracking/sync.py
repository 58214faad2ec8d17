"""The runs of a workspace that a store does not have in full, and their upload."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tracking.addresses import Stores, given_uri, resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import FINISHED, KILLED, RUNNING, LocalRun
from stocktake.tracking.uploader import UploadError, upload

UPLOAD_SECONDS = 60
"""How long one request may take when nobody's training waits for it."""


def upload_backlog(runs: Path, tracking: TrackingConfig, say: Callable[[str], None]) -> dict[str, int]:
    """Upload every run folder in `runs` that has something pending, parents before children.

    A store that `tracking` or the environment gives takes all of them; otherwise each goes where it was meant to go.
    A folder whose process is alive is left alone. One upload at a time works on a workspace; a second one waits.

    Args:
        runs: the folder of run folders.
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
        connections: dict[Stores, Connection | StocktakeError] = {}
        wanted = _with_ancestors(folders, tracking)
        for name in _parents_first(folders):
            folder = folders[name]
            if name not in wanted:
                counts["complete"] += 1
                continue
            if not folder.lock.try_acquire():
                counts["running"] += 1
                say(f"{name}: still running (process {folder.state.pid}), left alone")
                continue
            try:
                folder = LocalRun.open(folder.path)  # as its process left it
                folder.lock = folders[name].lock
                _close(folder)
                stores = _stores_of(folder, tracking)
                if stores not in connections:
                    connections[stores] = _connect(stores)
                connection = connections[stores]
                if isinstance(connection, StocktakeError):
                    raise connection
                was_complete = not folder.pending()
                done = upload(folder, connection)
                if folder.state.end_ms is not None:
                    folder.write_result()
                if was_complete and not done:
                    counts["complete"] += 1
                    continue
                counts["uploaded"] += 1
                say(f"{name}: uploaded {', '.join(done) or 'the run'} to {connection.shown} as {folder.state.status}")
            except (UploadError, StocktakeError, OSError, ValueError) as error:
                counts["pending"] += 1
                say(f"{name}: not uploaded: {brief(error)}")
            finally:
                folder.release()
    return counts


def _read(runs: Path, say: Callable[[str], None], counts: dict[str, int]) -> dict[str, LocalRun]:
    folders = {}
    for path in sorted(runs.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            try:
                folders[path.name] = LocalRun.open(path)
            except (StocktakeError, OSError, ValueError) as error:
                counts["pending"] += 1
                say(f"{path.name}: not uploaded: {brief(error)}")
    return folders


def _with_ancestors(folders: dict[str, LocalRun], tracking: TrackingConfig) -> set[str]:
    """Folders with something pending, and what they hang below where that may have to go to another store."""
    wanted = {name for name, folder in folders.items() if folder.pending()}
    if given_uri(tracking) is None:
        return wanted
    for name in list(wanted):
        parent = folders[name].state.parent
        while parent is not None and parent in folders:
            wanted.add(parent)
            parent = folders[parent].state.parent
    return wanted


def _parents_first(folders: dict[str, LocalRun]) -> list[str]:
    def depth(name: str) -> int:
        above, parent = 0, folders[name].state.parent
        while parent is not None and parent in folders and above < len(folders):
            above, parent = above + 1, folders[parent].state.parent
        return above

    return sorted(folders, key=lambda name: (depth(name), folders[name].state.start_ms))


def end_run(path: Path, tracking: TrackingConfig, *, status: str, reason: str) -> bool:
    """End a run whose process is gone, by one who knows why: FAILED or KILLED with the reason, here and in the store.

    Returns:
        False where there was nothing to end: its process is alive, or it finished.
    """
    folder = LocalRun.open(path)
    if folder.state.status == FINISHED or not folder.lock.try_acquire():
        return False
    try:
        _write_end(folder, status, reason)
        connection = None if tracking.offline else _connect(_stores_of(folder, tracking))
        if isinstance(connection, Connection):
            with suppress(UploadError, StocktakeError):  # `sync` uploads it later
                upload(folder, connection)
            folder.write_result()
    finally:
        folder.release()
    return True


def _close(folder: LocalRun) -> None:
    """Give a run whose process died the end that it could not write itself."""
    state = folder.state
    if state.status == RUNNING:
        died = f"its process ({state.pid} on {state.host}) ended without a word, killed or out of memory"
        _write_end(folder, KILLED, died)


def _write_end(folder: LocalRun, status: str, reason: str) -> None:
    state = folder.state
    points = folder.read_metrics()[0]
    folder.set_tags({"failure": reason})
    folder.finish(status, reason)
    # What it logged last is nearer to its end than today is.
    state.end_ms = max([state.start_ms, *(point.timestamp_ms for point in points)])
    folder.save()
    folder.write_result()


def _stores_of(folder: LocalRun, tracking: TrackingConfig) -> Stores:
    if given_uri(tracking) is not None or folder.state.tracking_uri is None:
        return resolve(tracking)
    registry = tracking.registry_uri or folder.state.registry_uri
    return resolve(replace(tracking, uri=folder.state.tracking_uri, registry_uri=registry))


def _connect(stores: Stores) -> Connection | StocktakeError:
    """One look at a store, however many runs wait for it."""
    connection = Connection(stores, request_seconds=UPLOAD_SECONDS)
    try:
        connection.open()
    except StocktakeError as error:
        return error
    return connection
