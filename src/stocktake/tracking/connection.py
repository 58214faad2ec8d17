"""MLflow's client of one store, with requests that end soon when a server does not answer."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from filelock import FileLock

from stocktake.errors import StocktakeError
from stocktake.redaction import redact
from stocktake.tracking.addresses import Stores, is_http, is_managed, sqlite_file

PROBE_SECONDS = 3
"""How long a server may take to answer a health check."""

_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow prints credentials in it
}
_QUIET = (
    "alembic",
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.tracking.request_header.registry",  # sagemaker's plugin complains in every request to a server
    "urllib3.connectionpool",
)


def request_limits() -> None:
    """Let MLflow's requests in this process end soon, and silence its chatter. What the user has set stays."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    for logger in _QUIET:
        logging.getLogger(logger).setLevel(logging.ERROR)


@contextmanager
def no_retries() -> Iterator[None]:
    """Send what the block creates once: a server that is slow to answer would otherwise create it twice."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before, os.environ[name] = os.environ.get(name, _LIMITS[name]), "0"
    try:
        yield
    finally:
        os.environ[name] = before


class Connection:
    """A tracking store and its registry."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self._client: Any = None

    @property
    def shown(self) -> str:
        """The tracking URI for messages."""
        return redact(self.stores.tracking)

    @property
    def client(self) -> Any:
        """MLflow's client. The first use imports MLflow and creates the tables of a fresh SQLite store."""
        request_limits()
        if self._client is None:
            import mlflow

            with _store_locks(self.stores):
                self.use()
                client = mlflow.MlflowClient(self.stores.tracking, self.stores.registry)
                if sqlite_file(self.stores.registry):
                    client.search_registered_models(max_results=1)  # opens it, as the client opened the other
            self._client = client
        if is_managed(self.stores.tracking):
            self.use()
        return self._client

    def use(self) -> None:
        """Make it the store of MLflow's own functions, and of the plugin that signs requests to SageMaker."""
        import mlflow

        # MLflow writes the addresses into the environment, where the next command would take them for the user's.
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_registry_uri(self.stores.registry)
        mlflow.set_tracking_uri(self.stores.tracking)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def open(self) -> None:
        """Make sure that the store is there.

        Raises StocktakeError, within about 10 seconds, naming the URI and the ways out.
        """
        if is_managed(self.stores.tracking) and importlib.util.find_spec("sagemaker_mlflow") is None:
            raise StocktakeError(f"{self.shown} needs sagemaker-mlflow: pip install 'stocktake[aws]'")
        ways_out = "correct --tracking.uri, or pass --tracking.offline true and run `stocktake sync` later"
        if (reason := self.health_check(timeout=5)) is not None:
            raise StocktakeError(f"the tracking server {self.shown} does not answer ({reason}): start it, {ways_out}")
        try:
            self.client.search_experiments(max_results=1)
        except Exception as error:
            raise StocktakeError(f"cannot use the tracking store {self.shown} ({brief(error)}): {ways_out}") from error

    def health_check(self, timeout: float = PROBE_SECONDS) -> str | None:
        """Why the server does not answer; None if it does, whatever it says, and for a store without a server."""
        if not (is_http(self.stores.tracking) or is_managed(self.stores.tracking)):
            return None
        from mlflow.utils.rest_utils import http_request

        request_limits()
        try:
            http_request(  # type: ignore[no-untyped-call]
                self._host(), "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False
            )
        except Exception as error:
            return _root_cause(error)
        return None

    def _host(self) -> Any:
        """The server's address and credentials, as MLflow's HTTP client takes them."""
        if is_managed(self.stores.tracking):
            from sagemaker_mlflow.host_creds import get_host_creds

            self.use()
            return get_host_creds(self.stores.tracking)
        from mlflow.utils.credentials import get_default_host_creds

        return get_default_host_creds(self.stores.tracking)  # type: ignore[no-untyped-call]


def brief(error: BaseException) -> str:
    """The first line of an error, without secrets, 300 characters at most."""
    lines = redact(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _root_cause(error: BaseException) -> str:
    """What went wrong underneath MLflow's and the HTTP library's wrappings."""
    cause = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return brief(cause)


@contextmanager
def _store_locks(stores: Stores) -> Iterator[None]:
    """No other process opens these SQLite files meanwhile: two that create the tables at once break each other."""
    databases = {sqlite_file(uri) for uri in (stores.tracking, stores.registry)} - {None}
    with ExitStack() as stack:
        for database in sorted(map(str, databases)):
            try:
                stack.enter_context(FileLock(f"{database}.lock"))
            except OSError as error:
                raise StocktakeError(
                    f"cannot write beside {database}: {error.strerror}; correct --tracking.uri"
                ) from error
        yield
