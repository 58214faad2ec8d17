"""`stocktake majority`: benchmark A, the most frequent quantity of the training split."""

from __future__ import annotations

import time

from stocktake.commands.stage_runs import PreparedData, StageResult, evaluate_and_log, prepare_data, stage_run
from stocktake.config import MajorityConfig
from stocktake.models.majority import fit_majority
from stocktake.tracking.runs import TrackedRun


def majority(
    config: MajorityConfig, prepared: PreparedData | None = None, parent: TrackedRun | None = None
) -> StageResult:
    """Fit, evaluate and log; alone or as a rung of a ladder."""
    prepared = prepared or prepare_data(config)
    with stage_run(config, MajorityConfig, prepared, "majority", parent) as (run, began):
        train = prepared.manifest.split("train")
        model = fit_majority(prepared.manifest.labels, config.image_size, train["quantity"].to_numpy())
        metrics = evaluate_and_log(run, model, config, prepared)
    return StageResult("majority", metrics, run, time.monotonic() - began, None)
