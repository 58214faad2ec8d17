"""Which store a run goes to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact

_SQLITE = "sqlite:///"
_MANAGED = re.compile(r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-(tracking-server|app)/[\w.-]+")


def is_http(uri: str) -> bool:
    """Whether a server stands behind the URI."""
    return uri.startswith(("http://", "https://"))


def is_managed(uri: str) -> bool:
    """Whether the URI is an ARN: of an MLflow that SageMaker runs, asked with AWS's signature."""
    return uri.startswith("arn:")


@dataclass(frozen=True)
class Stores:
    """Where runs and registered models live: absolute URIs, credentials included."""

    tracking: str
    registry: str


def resolve(tracking: TrackingConfig) -> Stores:
    """The stores of a config: its own, else the environment's, else mlflow.db in the current folder.

    Raises StocktakeError for a URI of a form that no store can have.
    """
    uri = configured_uri(tracking) or _SQLITE + str(Path.cwd() / "mlflow.db")
    registry = tracking.registry_uri or os.environ.get("MLFLOW_REGISTRY_URI") or uri
    # Both are set explicitly even where they agree: MLflow deadlocked in evaluation otherwise.
    return Stores(tracking=absolute(uri), registry=absolute(registry))


def configured_uri(tracking: TrackingConfig) -> str | None:
    """The tracking URI that somebody asked for, as asked; None where the default applies."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None


def absolute(uri: str) -> str:
    """The URI with a relative SQLite file or folder made absolute from the current folder."""
    if uri.startswith("sqlite:"):
        path, mark, query = uri.removeprefix(_SQLITE).partition("?")
        if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
            raise StocktakeError(f"{redact(uri)} keeps nothing: give the database a file, as in sqlite:///mlflow.db")
        return _SQLITE + str(_from_here(path)) + mark + query
    if uri.startswith("file:"):
        return _from_here(re.sub("^file:(//(localhost)?)?", "", uri)).as_uri()
    if is_managed(uri) and not _MANAGED.fullmatch(uri):
        raise StocktakeError(
            f"{uri} is no managed MLflow: write arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME"
        )
    scheme = urlsplit(uri).scheme
    if not scheme and uri != "databricks":
        return _from_here(uri).as_uri()
    if is_http(uri) and not urlsplit(uri).hostname:
        raise StocktakeError(f"{redact(uri)} names no host: correct --tracking.uri, as in http://localhost:5000")
    if is_http(uri) and "@" in uri.partition("://")[2].partition("/")[2]:
        raise StocktakeError(f"{redact(uri)}: write @ and / in a user or password as %40 and %2F")
    return uri.rstrip("/") if is_http(uri) else uri


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute SQLite URI; None for any other store."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE).partition("?")[0])


def _from_here(path: str) -> Path:
    # normpath, not resolve: a link stays the path that its owner knows
    return Path(os.path.normpath(Path.cwd() / Path(path).expanduser()))
