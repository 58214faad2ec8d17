"""Defaults of a search."""

from __future__ import annotations

from stocktake.config.training import TuneConfig

TRIALS = 20
"""Of a search that is given no number."""


def choose_pruner(config: TuneConfig) -> str:
    """The pruner of a study: asha, hyperband, median or none."""
    if config.pruner != "auto":
        return config.pruner
    return "asha" if config.stage == "finetune" and len(config.objectives) == 1 else "none"
