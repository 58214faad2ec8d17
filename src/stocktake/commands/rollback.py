"""`stocktake rollback`: the champion before this one is the champion again."""

from __future__ import annotations

from pathlib import Path

from stocktake.config.versions import RollbackConfig
from stocktake.registry.model_card_data import try_to_publish_card
from stocktake.registry.promotion import Event, roll_back
from stocktake.registry.versions import CHAMPION, ModelRegistry


def rollback(config: RollbackConfig) -> Event:
    """Make the previous champion the champion again: once more goes further back.

    Returns:
        The event that the history keeps.

    Raises:
        StocktakeError: there is no champion, or none before it.
        ChampionMovedError: somebody else promotes or rolls back.
    """
    registry = ModelRegistry(config.tracking)
    with registry.opened():
        before, champion, event = roll_back(registry, config.reason)
        print(f"champion: {champion.label}, it was {before.label}; models:/{registry.name}@{CHAMPION}", flush=True)
        for version in (before, champion):
            try_to_publish_card(registry, version, Path(config.workspace))
        return event
