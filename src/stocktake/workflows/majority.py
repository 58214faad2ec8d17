"""`stocktake majority`: benchmark A, the most frequent quantity of the training split."""

from __future__ import annotations

import time

from stocktake.config import MajorityConfig
from stocktake.models.majority import fit_majority
from stocktake.tracking.runs import TrackedRun
from stocktake.workflows.rung import Bench, Rung, record_model, rung_run, set_up


def majority(config: MajorityConfig, bench: Bench | None = None, parent: TrackedRun | None = None) -> Rung:
    """Fit, evaluate and log; alone or as a rung of a ladder."""
    bench = bench or set_up(config)
    with rung_run(config, MajorityConfig, bench, "majority", parent) as (run, began):
        train = bench.manifest.split("train")
        model = fit_majority(bench.manifest.labels, config.image_size, train["quantity"].to_numpy())
        metrics = record_model(run, model, config, bench)
    return Rung("majority", metrics, run, time.monotonic() - began, None)
