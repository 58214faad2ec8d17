"""The versions of one registered model, found by number or alias.

Aliases: candidate, the last that was registered; challenger, on its way through the gate; champion, what is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import search_versions
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief

CANDIDATE, CHALLENGER, CHAMPION = "candidate", "challenger", "champion"


@dataclass(frozen=True)
class Version:
    """A version of a registered model, as it was when it was read."""

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str | None
    source: str
    tags: dict[str, str]
    created_ms: int

    @property
    def label(self) -> str:
        """stocktake/3"""
        return f"{self.name}/{self.number}"

    @property
    def uri(self) -> str:
        """models:/stocktake/3"""
        return f"models:/{self.label}"

    @property
    def model_id(self) -> str | None:
        """Of the logged model that it is; None for a version that was made of something else."""
        return self.source.removeprefix("models:/") if self.source.startswith("models:/m-") else None


class ModelRegistry:
    """One registered model in the store of a config. Everything happens within `opened`."""

    def __init__(self, tracking: TrackingConfig) -> None:
        self.tracking = tracking
        self.name = tracking.model_name
        self.connection = Connection(resolve(tracking))

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return self.connection.client

    @contextmanager
    def opened(self) -> Iterator[ModelRegistry]:
        """Yield itself once the store answers; an MLflow error in the block becomes a StocktakeError.

        Raises:
            StocktakeError: the store cannot be used, or refuses something.
        """
        if self.tracking.offline:
            raise StocktakeError("--tracking.offline: the registry is in the store, leave it out")
        self.connection.open()
        from mlflow.exceptions import MlflowException

        try:
            yield self
        except MlflowException as error:
            raise StocktakeError(f"{self.connection.shown}: {brief(error)}") from error

    def registered(self) -> Any:
        """Return MLflow's registered model, which has the aliases and the tags.

        Raises:
            StocktakeError: there is none of the name, naming those that exist.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            names = ", ".join(model.name for model in self.client.search_registered_models(max_results=20))
            hint = f"--model_name can be {names}" if names else "`stocktake register --run RUN` makes the first"
            raise StocktakeError(
                f"there is no registered model {self.name!r} in {self.connection.shown}: {hint}"
            ) from error

    def aliases(self) -> dict[str, int]:
        """Return the version number of each alias."""
        return {alias: int(number) for alias, number in self.registered().aliases.items()}

    def versions(self) -> list[Version]:
        """Return all versions by number."""
        aliases = self.aliases()
        versions = [_read(version, aliases) for version in search_versions(self.client, self.name)]
        return sorted(versions, key=lambda version: version.number)

    def version(self, asked: str) -> Version:
        """Return a version by its number or alias.

        Raises:
            StocktakeError: there is none, naming those that exist.
        """
        from mlflow.exceptions import MlflowException

        aliases = self.aliases()
        number = aliases.get(asked, int(asked) if asked.isdecimal() else None)
        if number is not None:
            try:
                return _read(self.client.get_model_version(self.name, str(number)), aliases)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        numbers = ", ".join(str(version.number) for version in self.versions()[-10:]) or "none"
        shown = ", ".join(f"{alias} ({version})" for alias, version in aliases.items()) or "no alias"
        raise StocktakeError(f"{self.name} has no version {asked}: --version can be {numbers}, or {shown}")

    def champion(self) -> Version | None:
        """Return what is deployed; None while nothing is."""
        return self.version(CHAMPION) if CHAMPION in self.aliases() else None

    def set_alias(self, alias: str, version: Version) -> None:
        """Move an alias onto the version."""
        self.client.set_registered_model_alias(self.name, alias, str(version.number))

    def delete_alias(self, alias: str, version: Version) -> None:
        """Delete an alias if it is on the version."""
        if self.aliases().get(alias) == version.number:
            self.client.delete_registered_model_alias(self.name, alias)


def _read(version: Any, aliases: dict[str, int]) -> Version:
    number = int(version.version)
    return Version(
        name=version.name,
        number=number,
        aliases=tuple(alias for alias, aliased in aliases.items() if aliased == number),
        run_id=version.run_id or None,
        source=version.source or "",
        tags=dict(version.tags),
        created_ms=int(version.creation_timestamp),
    )
