"""SQLite files that can be filled anew: opened once a thread, and removed when they are damaged."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stocktake.errors import StocktakeError

_BUSY_SECONDS = 120
_PAGE_BYTES = 32768
_local = threading.local()


class DamagedFileError(StocktakeError):
    """The file is no SQLite file, is truncated, or its content is not as it was written."""


def damaged(path: Path, reason: str) -> DamagedFileError:
    """The error that names the file and the way out."""
    return DamagedFileError(f"{path} is damaged ({reason}): delete it, the next run fills it anew")


def remove(path: Path) -> None:
    """Delete the file, and the journal that a killed process may have left beside it."""
    for suffix in ("", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@contextmanager
def transaction(path: Path, table: str) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are committed at the end of the block, or rolled back when it raises.

    Args:
        path: the file, made if there is none.
        table: a CREATE TABLE IF NOT EXISTS statement.

    Raises:
        DamagedFileError: the file is damaged.
        StocktakeError: it cannot be written.
    """
    try:
        with _opened(path, table) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        # SQLITE_ERROR: the file lost its table while it was open
        if getattr(error, "sqlite_errorname", "") in ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR"):
            raise damaged(path, str(error)) from None
        raise StocktakeError(f"{path} cannot be written: {error}") from None


def _opened(path: Path, table: str) -> sqlite3.Connection:
    """This thread's connection to the file that the path names now; never one from before a fork."""
    opened: dict[tuple[str, int, int], sqlite3.Connection] = _local.__dict__.setdefault("opened", {})
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        key = (str(path), os.getpid(), path.stat().st_ino)
    except OSError as error:
        raise StocktakeError(f"{path} cannot be written: {error.strerror}") from None
    if key not in opened:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute(table)
        opened[key] = connection
    return opened[key]
