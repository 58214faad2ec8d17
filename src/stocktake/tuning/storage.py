"""Where studies are kept: a journal that survives a kill, or a database."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # what a lock must be; exported nowhere
from sqlalchemy.exc import SQLAlchemyError

from stocktake.errors import StocktakeError
from stocktake.locks import FileLock

_RECORD = b'{"op_code":'
"""How every line of a journal begins."""


class _JournalLock(BaseJournalFileLock):
    """Locks and mends a journal before something is appended to it.

    Optuna's own locks are files that exist: one stays behind when its process is killed, and the others wait half a
    minute for it. The kernel lets go of this one. And Optuna appends to whatever is there: after half a line, as a
    process killed in mid-write leaves it, the next record would be lost and the one after it make the journal
    unreadable for good.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        # not .lock: that is what Optuna's own locks are called, so that its other tools would wait for it
        self._lock = FileLock(journal.with_name(f"{journal.name}.flock"))

    def acquire(self) -> bool:
        self._lock.__enter__()
        try:
            _cut_torn_line(self._journal)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


def _cut_torn_line(journal: Path) -> None:
    """Cut off a last line that was not written to its end. A file that is no journal is left as it is.

    Raises:
        StocktakeError: the file is no journal.
    """
    with journal.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start and b"\n" not in tail:
            block = min(start, 4096)
            start = file.seek(start - block)
            tail = file.read(block) + tail
        torn = tail.rpartition(b"\n")[2]
        if not torn:
            return
        written = torn.rstrip(b"\0")  # a crash of the machine can leave the length without the bytes
        if not (written.startswith(_RECORD) or _RECORD.startswith(written)):
            raise StocktakeError(f"{journal} is no journal of a study; name another file")
        file.truncate(end - len(torn))


def open_storage(where: str | Path) -> BaseStorage:
    """The storage of studies: a journal in a file, or a database by its URL.

    Open it in the process that uses it. Everything written to a journal is on disk when the call returns.

    Args:
        where: path of a journal; or a URL that SQLAlchemy takes, such as sqlite:///study.db or
            postgresql://user:password@host/studies, whose driver must be installed. A journal, and SQLite's file, are
            made with their folder when they are not there.

    Raises:
        StocktakeError: the file is something else or cannot be written, the database cannot be reached. The message
            holds no password.
    """
    if isinstance(where, str) and re.match(r"[A-Za-z][\w+.-]*:", where):
        return _open_database(where)
    path = Path(where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"), path.open("rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and not first.startswith(_RECORD):
            raise StocktakeError(f"{path} is no journal of a study; name another file")
        lock = _JournalLock(path)
        lock.acquire()
        lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock))
    except OSError as error:
        raise StocktakeError(
            f"the study's journal {path} cannot be used: {error.strerror}; name another file"
        ) from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise StocktakeError(f"the study's journal {path} is damaged ({error}); name another file") from None


def _open_database(url: str) -> BaseStorage:
    sqlite = _sqlite_file(url)
    if url.startswith("sqlite") and sqlite is None:
        raise StocktakeError(
            f"{_without_credentials(url)} keeps nothing: give the database a file, as sqlite:///study.db"
        )
    # A second connection waits for a lock on the file instead of failing at once; others find out when theirs is gone.
    settings: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite is not None else {"pool_pre_ping": True}
    try:
        if sqlite is None:
            return get_storage(RDBStorage(url, settings))
        # Two processes that both find no tables would both make them, and one fail.
        with FileLock(sqlite.with_name(f"{sqlite.name}.flock")):
            return get_storage(RDBStorage(url, settings))
    except (SQLAlchemyError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise StocktakeError(
            f"the study's storage {_without_credentials(url)} cannot be used: {_reason(error, url)}; "
            "correct it, or give a file for a journal"
        ) from None


def _sqlite_file(url: str) -> Path | None:
    path = re.sub(r"^sqlite(\+\w+)?:///", "", url).partition("?")[0]
    return None if path == url.partition("?")[0] or path in ("", ":memory:") else Path(path)


def _without_credentials(url: str) -> str:
    """A URL as it may be shown: no user, password or options; the scheme alone where they cannot be told apart."""
    scheme, mark, rest = url.partition("://")
    if scheme.startswith("sqlite") or not mark:
        return url
    netloc, slash, path = rest.partition("/")
    host = netloc.rpartition("@")[2]
    if "@" in path or re.search(r"[?#]", netloc) or not re.fullmatch(r"(\[[\w:.]*\]|[\w.-]*)(:\d*)?", host):
        return f"{scheme}://..."  # a password that is not quoted, or stands where a host does
    return f"{scheme}://{host}{slash}{re.split('[?#]', path)[0]}"


def _reason(error: Exception, url: str) -> str:
    """The first line of an error, without what must stay secret; of an import, what to install."""
    if isinstance(error, ImportError):
        missing = error.__cause__ or error
        return f"its driver is not installed ({missing})"
    if _without_credentials(url).endswith("://..."):
        return type(error).__name__  # what the driver took for a host or a port may be in its message
    text = next(iter(str(getattr(error, "orig", None) or error).strip().splitlines()), type(error).__name__)
    password = url.partition("://")[2].partition("/")[0].rpartition("@")[0].partition(":")[2]
    options = parse_qsl(url.partition("?")[2])
    secrets = [value for name, value in options if re.search("pass|pwd|token|secret|key", name.lower())]
    for secret in (password, unquote(password), *secrets):
        text = text.replace(secret, "***") if secret else text
    return text
