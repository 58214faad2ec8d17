"""Where studies are kept: SQLite in the run's folder, or any database by its URL."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from stocktake.errors import StocktakeError

STORAGE_VARIABLE = "STOCKTAKE_STORAGE"
"""Variable of the environment with the URL of the studies' database; the one place for a URL with a password."""
DATABASE = "study.db"
"""A study's own database, in the folder of its run."""
HEARTBEAT_SECONDS = 2
GRACE_SECONDS = 12
"""A trial whose last heartbeat is older than this has lost its process."""
_SECRET = re.compile("pass|pwd|token|secret|key|sig|auth", re.IGNORECASE)

StaleTrialCallback = Callable[[Study, FrozenTrial], None]


def external_storage(option: str | None) -> str | None:
    """The URL of a database outside of the run's folder: `--storage`, else STOCKTAKE_STORAGE; None for neither.

    Raises:
        StocktakeError: the option, which every user of the machine can read, holds a password; or it is no URL.
    """
    if option is None:
        return os.environ.get(STORAGE_VARIABLE) or None
    url = _parse(option, "--storage")
    if url.password or any(_SECRET.search(name) for name in url.query):
        raise StocktakeError(
            "--storage holds a password, which every user of this machine can read: put the URL into the environment "
            f"variable {STORAGE_VARIABLE} and leave out --storage"
        )
    return option


def sqlite_url(folder: Path) -> str:
    """The URL of a study's own database."""
    return f"sqlite:///{folder.resolve() / DATABASE}"


def open_storage(url: str, on_stale_trial: StaleTrialCallback | None = None) -> RDBStorage:
    """The studies of a database; its tables are made when they are not there. Each process opens it by itself.

    Args:
        url: that SQLAlchemy takes, such as sqlite:///study.db or postgresql://user:password@host/studies, whose
            driver must be installed.
        on_stale_trial: called by whichever process finds a trial whose process was killed, once a trial.

    Raises:
        StocktakeError: the database cannot be used. The message holds no password.
    """
    parsed = _parse(url, STORAGE_VARIABLE)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database in (None, "", ":memory:"):
        raise StocktakeError("a study in memory is lost: give the database a file, as in sqlite:///study.db")
    # A second connection to SQLite waits for a lock instead of failing; others find out when theirs is gone.
    settings: dict[str, Any] = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of heartbeats
            return RDBStorage(
                url,
                settings,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=on_stale_trial,
            )
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise StocktakeError(
            f"the study's database {_shown(parsed)} cannot be used: {_reason(error, parsed)}"
        ) from None


def _parse(url: str, origin: str) -> URL:
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        raise StocktakeError(f"{origin} is no database URL, such as postgresql://user@host/studies") from None
    if "@" in (parsed.host or "") or (parsed.password and "/" in parsed.password):
        raise StocktakeError(f"{origin}: write @ and / in a user or password as %40 and %2F")
    return parsed


def _shown(url: URL) -> str:
    """Scheme, host and database alone."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()


def _reason(error: Exception, url: URL) -> str:
    """The first line of an error; its type alone where the line would hold a secret."""
    text = next(iter(str(getattr(error, "orig", None) or error).strip().splitlines()), "")
    values = [value for name, value in url.query.items() if _SECRET.search(name)]
    secrets = [str(url.password or ""), *(value if isinstance(value, str) else " ".join(value) for value in values)]
    return type(error).__name__ if any(secret and secret in text for secret in secrets) else text
