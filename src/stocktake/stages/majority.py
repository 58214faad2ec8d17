"""Majority class: the most frequent quantity of the training split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stocktake.config.runs import ImageConfig
from stocktake.models.majority import MajorityModel, fit_majority
from stocktake.stages.prepare import PreparedData
from stocktake.tracking.runs import TrackedRun

if TYPE_CHECKING:
    from stocktake.training.fit import EpochVerdict  # Lightning takes seconds to import


def train(
    _run: TrackedRun, config: ImageConfig, prepared: PreparedData, _should_stop: EpochVerdict | None = None
) -> MajorityModel:
    """Count the quantities of the train split."""
    quantities = prepared.manifest.split("train")["quantity"].to_numpy()
    return fit_majority(prepared.manifest.labels, config.image_size, quantities)
