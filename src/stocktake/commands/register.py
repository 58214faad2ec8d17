"""`stocktake register`: a finished run's model becomes a version, with the alias candidate and a model card."""

from __future__ import annotations

from pathlib import Path

from stocktake.config.versions import RegisterConfig
from stocktake.errors import StocktakeError
from stocktake.registry.model_card_data import try_to_publish_card
from stocktake.registry.registration import register_run
from stocktake.registry.versions import CANDIDATE, ModelRegistry, Version


def register(config: RegisterConfig) -> Version:
    """Register a run's model; the same run is the same version again.

    Raises:
        StocktakeError: no such run, it has not finished, or has no model.
    """
    if not config.run:
        raise StocktakeError("--run is missing: give the id, the name or the folder of a finished run")
    registry, workspace = ModelRegistry(config.tracking), Path(config.workspace)
    with registry.opened():
        version = register_run(registry, config.run, workspace / "runs")
        print(f"candidate: {version.label} ({version.tags.get('stage', '?')}), models:/{registry.name}@{CANDIDATE}")
        try_to_publish_card(registry, version, workspace)
        return version
