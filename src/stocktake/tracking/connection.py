"""The way to one MLflow store: a client whose waits are bounded, and a memory of when it last failed."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tracking.addresses import Stores, is_http, is_managed, redact, sqlite_file

PROBE_SECONDS = 3
"""How long a server may take to say that it is there, once it has failed."""
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0  # seconds between attempts while a server is away

_QUIET = (
    "alembic",
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.tracking.request_header.registry",  # sagemaker's plugin complains in every request to a server
    "urllib3.connectionpool",
)


class Connection:
    """A store and its registry.

    A run calls it between steps of training, so a store that is away may cost one request timeout, and from then
    on `PROBE_SECONDS` at doubling distances: less than a minute a day.
    """

    def __init__(self, stores: Stores, *, request_seconds: int = 10) -> None:
        self.stores = stores
        self.request_seconds = request_seconds
        self._client: Any = None
        self._pause = 0.0
        self._next_attempt = 0.0
        self._warned = False
        self._bounds: set[str] = set()

    @property
    def shown(self) -> str:
        """The tracking URI for messages."""
        return redact(self.stores.tracking)

    @property
    def client(self) -> Any:
        """MLflow's client. The first use imports MLflow and lays out a fresh SQLite store."""
        if self._client is None:
            import mlflow

            with (
                self.bounded(),
                _alone_with(self.stores),
                _addresses_kept(),
            ):
                mlflow.set_registry_uri(self.stores.registry)
                mlflow.set_tracking_uri(self.stores.tracking)
                client = mlflow.MlflowClient(self.stores.tracking, self.stores.registry)
                if sqlite_file(self.stores.registry):
                    client.search_registered_models(max_results=1)  # opens it, as the client opened the other
            self._client = client
        return self._client

    def open(self) -> None:
        """Make sure that the store is there.

        Raises StocktakeError, within about 10 seconds, naming the URI and the ways out.
        """
        if is_managed(self.stores.tracking) and importlib.util.find_spec("sagemaker_mlflow") is None:
            raise StocktakeError(f"{self.shown} needs sagemaker-mlflow: pip install 'stocktake[aws]'")
        ways_out = "correct --tracking.uri, or pass --tracking.offline true and run `stocktake sync` later"
        if (trouble := self.trouble(timeout=5)) is not None:
            raise StocktakeError(f"the tracking server {self.shown} does not answer ({trouble}): start it, {ways_out}")
        try:
            with self.bounded():
                self.client.search_experiments(max_results=1)
        except Exception as error:
            raise StocktakeError(f"cannot use the tracking store {self.shown} ({brief(error)}): {ways_out}") from error

    def trouble(self, timeout: float = PROBE_SECONDS) -> str | None:
        """Why the server does not answer; None if it does, whatever it says, and for a store without a server."""
        if not (is_http(self.stores.tracking) or is_managed(self.stores.tracking)):
            return None
        from mlflow.utils.rest_utils import http_request

        try:
            with self.bounded():
                http_request(  # type: ignore[no-untyped-call]
                    self._host(), "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False
                )
        except Exception as error:
            return _cause(error)
        return None

    def _host(self) -> Any:
        """The server's address and how to ask it, in MLflow's words."""
        if is_managed(self.stores.tracking):
            from sagemaker_mlflow.host_creds import get_host_creds

            _ = self.client
            self._be_signed_for()
            return get_host_creds(self.stores.tracking)
        from mlflow.utils.credentials import get_default_host_creds

        return get_default_host_creds(self.stores.tracking)  # type: ignore[no-untyped-call]

    def _be_signed_for(self) -> None:
        """The plugin signs requests for the address that MLflow was given last."""
        import mlflow

        with _addresses_kept():
            mlflow.set_tracking_uri(self.stores.tracking)

    def due(self) -> bool:
        """Whether to try now: the store is well, or it is time to look again and it is back."""
        if not self._pause:
            return True
        if time.monotonic() < self._next_attempt:
            return False
        if self.trouble() is not None:
            self.failed()
            return False
        return True

    def succeeded(self) -> None:
        """The store is well."""
        self._pause = 0.0

    def failed(self) -> None:
        """The store failed: leave it alone for a while, longer each time."""
        self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
        self._next_attempt = time.monotonic() + self._pause

    def warn(self, error: Exception, workspace: Path) -> None:
        """Say once, in one line, that results go on on disk."""
        if not self._warned:
            self._warned = True
            print(
                f"warning: cannot log to {self.shown} ({brief(error)}); the run goes on, its results are kept in"
                f" {workspace / 'runs'}: upload them later with `stocktake sync --workspace {workspace}`",
                file=sys.stderr,
            )

    @contextmanager
    def bounded(self, retries: int = 1) -> Iterator[None]:
        """Requests in the block end soon, and say nothing on the terminal. What the user has set stays."""
        asked = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(self.request_seconds),
            "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow prints credentials in it
        }
        if self._client is not None and is_managed(self.stores.tracking):
            self._be_signed_for()  # another store may have been used in between
        # A block inside another one has its own way; what the user has set stays.
        changed = {name: os.environ.get(name) for name in asked if name in self._bounds or name not in os.environ}
        added = set(changed) - self._bounds
        self._bounds |= added
        os.environ.update({name: asked[name] for name in changed})
        levels = {name: logging.getLogger(name).level for name in _QUIET}
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            self._bounds -= added
            for name, value in changed.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def brief(error: BaseException) -> str:
    """The first line of an error, without secrets, 300 characters at most."""
    lines = redact(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _cause(error: BaseException) -> str:
    """What went wrong underneath MLflow's and the HTTP library's wrappings."""
    inner = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    return brief(inner)


@contextmanager
def _alone_with(stores: Stores) -> Iterator[None]:
    """No other process opens these SQLite files meanwhile: two that lay out a fresh one at once break each other."""
    databases = {sqlite_file(uri) for uri in (stores.tracking, stores.registry)} - {None}
    with ExitStack() as stack:
        for database in sorted(map(str, databases)):
            name = hashlib.sha256(database.encode()).hexdigest()[:16]
            stack.enter_context(FileLock(Path(tempfile.gettempdir()) / f"stocktake-{os.getuid()}-{name}.lock"))
        yield


@contextmanager
def _addresses_kept() -> Iterator[None]:
    """MLflow puts the addresses into the environment, where the next command would take them for the user's."""
    held = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    try:
        yield
    finally:
        for name, value in held.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
