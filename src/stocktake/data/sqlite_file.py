"""SQLite files that can be filled anew: a damaged one is an error that says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError

_BUSY_SECONDS = 120
_PAGE_BYTES = 32768


class DamagedFileError(StocktakeError):
    """The file is no SQLite file, is truncated, or its content is not as it was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}): delete it, the next run fills it anew")


@contextmanager
def transaction(path: Path, table: str) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are committed at the end of the block, or rolled back when it raises.

    Opened for the block alone (0.06 ms), so that threads and forked processes share none.

    Args:
        path: the file, made if there is none.
        table: a CREATE TABLE IF NOT EXISTS statement.

    Raises:
        DamagedFileError: the file is damaged.
        StocktakeError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection, connection:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute(table)
            yield connection
    except OSError as error:
        raise StocktakeError(f"{path} cannot be written: {error.strerror}") from None
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "") in ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR"):
            raise DamagedFileError(path, str(error)) from None  # SQLITE_ERROR: the table has other columns
        raise StocktakeError(f"{path} cannot be written: {error}") from None


def rows_or_new(path: Path, table: str, query: str) -> list[Any]:
    """The rows of a query; a damaged file is replaced by an empty one. Errors as `transaction`."""
    try:
        with transaction(path, table) as connection:
            return connection.execute(query).fetchall()
    except DamagedFileError:
        for suffix in ("", "-journal"):  # a killed process may have left its journal
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        with transaction(path, table):
            return []
