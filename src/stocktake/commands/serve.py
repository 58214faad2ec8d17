"""`stocktake serve`: a registered or saved model over HTTP, in the foreground."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from stocktake.config.runs import TrackingConfig
from stocktake.config.serving import ServeConfig
from stocktake.errors import StocktakeError
from stocktake.registry.models import fetch_model
from stocktake.serving.deployment import Deployment, version_of, write_spec
from stocktake.serving.settings import ServerSettings
from stocktake.serving.supervisor import Supervisor

DEFAULT_SETTINGS = "deploy/local.yaml"


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM. SIGHUP fetches the model anew: an alias may have moved.

    Raises:
        StocktakeError: no such model, a bad setting, the port is in use, or the model did not come up.
    """
    settings = server_settings(config.settings, config.server)
    with tempfile.TemporaryDirectory(prefix="stocktake-serve-") as temporary:
        folder, generations = Path(temporary), count(1)

        def fetch() -> None:
            generation = next(generations)
            model = model_folder(config.model, folder / "model" / str(generation), config.tracking)
            write_spec(folder, Deployment(str(model.absolute()), config.model, version_of(model), settings, generation))

        fetch()
        if Supervisor(folder, fetch).serve():
            raise StocktakeError(f"{config.model} is not served: see above")


def model_folder(model: str, destination: Path, tracking: TrackingConfig) -> Path:
    """The local folder of a model: fetched to `destination` as `fetch_model` does, or an exported folder as it is."""
    if Path(model, "model.json").is_file():
        return Path(model)
    return fetch_model(model, destination, tracking)


def server_settings(file: str, single: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file, and single ones over them, checked.

    Raises:
        StocktakeError: the file cannot be read, an unknown setting, or a bad value.
    """
    import yaml

    path = Path(file)
    read: Any = {}
    if path.exists() or file != DEFAULT_SETTINGS:
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise StocktakeError(f"--settings {file} cannot be read: {error}") from None
        if not isinstance(read, dict):
            raise StocktakeError(f"--settings {file} must hold settings, such as `port: 8080`, not {read!r}")
    for source, settings in ((f"--settings {file}", read), ("--server", single)):
        try:
            ServerSettings.read({str(name): value for name, value in settings.items()})
        except StocktakeError as error:
            raise StocktakeError(f"{source}: {error}") from None
    return {**read, **single}
