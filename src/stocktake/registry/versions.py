"""The versions of one registered model: found by number or alias; what is missing is said with what there is.

candidate: the last that a ladder or `register` proposed. challenger: on its way through the gate. champion: what is
deployed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import CANDIDATE, pinned
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief

CHALLENGER, CHAMPION = "challenger", "champion"
ALIASES = (CANDIDATE, CHALLENGER, CHAMPION)


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
        self.connection = Connection(resolve(tracking), request_seconds=60)

    @property
    def client(self) -> Any:
        """MLflow's."""
        return self.connection.client

    @contextmanager
    def opened(self) -> Iterator[ModelRegistry]:
        """Itself, where the store answers; what it refuses later is one line as well.

        Raises:
            StocktakeError: the store cannot be used, or refuses something.
        """
        if self.tracking.offline:
            raise StocktakeError("--tracking.offline: the registry is in the store, leave it out")
        self.connection.open()
        from mlflow.exceptions import MlflowException

        with self.connection.bounded():
            try:
                yield self
            except MlflowException as error:
                raise StocktakeError(f"{self.connection.shown}: {brief(error)}") from error

    def versions(self) -> list[Version]:
        """All of them, by number.

        Raises:
            StocktakeError: there is no such registered model.
        """
        aliases = self.aliases()
        quoted = self.name.replace("'", "''")
        found = [_read(one, aliases) for one in self.client.search_model_versions(f"name = '{quoted}'")]
        return sorted(found, key=lambda version: version.number)

    def version(self, asked: str) -> Version:
        """By number or alias.

        Raises:
            StocktakeError: there is none, naming those that there are.
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
        numbers = ", ".join(str(one.number) for one in self.versions()[-10:]) or "none"
        held = ", ".join(f"{alias} ({version})" for alias, version in aliases.items()) or "no alias"
        raise StocktakeError(f"{self.name} has no version {asked}: --version can be {numbers}, or {held}")

    def champion(self) -> Version | None:
        """What is deployed; None while nothing is."""
        return self.version(CHAMPION) if CHAMPION in self.aliases() else None

    def aliases(self) -> dict[str, int]:
        """The number of the version that each alias is on.

        Raises:
            StocktakeError: there is no such registered model, naming those that there are.
        """
        from mlflow.exceptions import MlflowException

        try:
            registered = self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            names = ", ".join(one.name for one in self.client.search_registered_models(max_results=20))
            there = f"--model_name can be {names}" if names else "`stocktake register --run RUN` makes the first"
            raise StocktakeError(
                f"there is no registered model {self.name!r} in {self.connection.shown}: {there}"
            ) from error
        return {alias: int(number) for alias, number in registered.aliases.items()}

    def set_alias(self, alias: str, version: Version) -> None:
        """Move an alias onto the version."""
        self.client.set_registered_model_alias(self.name, alias, str(version.number))

    def drop_alias(self, alias: str, version: Version) -> None:
        """Take an alias away, if it is on the version."""
        if self.aliases().get(alias) == version.number:
            self.client.delete_registered_model_alias(self.name, alias)

    def set_tag(self, version: Version, key: str, value: str) -> None:
        """Set a tag of the version."""
        self.client.set_model_version_tag(self.name, str(version.number), key, value)


def version_label(uri: str, tracking: TrackingConfig) -> str | None:
    """`stocktake/3` for a models:/ address of a registered version, whatever alias it goes by; None for any other.

    Raises:
        StocktakeError: the store cannot be used.
    """
    name, _, number = pinned(uri, tracking).removeprefix("models:/").rpartition("/")
    return f"{name}/{number}" if uri.startswith("models:/") and name and number.isdecimal() else None


def _read(version: Any, aliases: dict[str, int]) -> Version:
    number = int(version.version)
    return Version(
        name=version.name,
        number=number,
        aliases=tuple(alias for alias, held in aliases.items() if held == number),
        run_id=version.run_id or None,
        source=version.source or "",
        tags=dict(version.tags),
        created_ms=int(version.creation_timestamp),
    )
