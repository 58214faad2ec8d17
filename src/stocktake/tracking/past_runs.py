"""What earlier runs were trained with, and how well they did."""

from __future__ import annotations

import pandas as pd

from stocktake.config.runs import TrackingConfig
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection
from stocktake.tracking.leaderboard import search_runs

_SCORE = "metrics.val/macro_f1"


def best_settings(
    tracking: TrackingConfig, task: str, stage: str, *, is_distributed: bool = False, limit: int = 200
) -> list[tuple[str, float, dict[str, str]]]:
    """Name, val/macro_f1 and params (texts) of the finished runs and trials of a stage on a task, the best first.

    They come from the experiment of `tracking` alone; offline, there are none. Of a stage that may be distributed,
    `ddp` runs count too.

    Raises:
        StocktakeError: the store cannot be used.
    """
    if tracking.offline:
        return []
    connection = Connection(resolve(tracking))
    connection.open()
    experiment = connection.client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        return []
    quoted = task.replace("'", "")
    filter_string = f"tags.task = '{quoted}' AND attributes.status = 'FINISHED'"
    runs = search_runs(connection, [experiment.experiment_id], filter_string).convert_dtypes()
    runs = runs.reindex(columns=[*runs.columns.union([_SCORE, "tags.stage", "tags.trial.stage", "tags.trial.state"])])
    of_stage = runs["tags.stage"].isin([stage, "ddp"] if is_distributed else [stage]) | (
        runs["tags.trial.stage"] == stage
    )
    is_pruned = runs["tags.trial.state"] == "pruned"
    runs = runs[of_stage.fillna(False) & ~is_pruned.fillna(False) & runs[_SCORE].notna()]
    runs = runs.sort_values(_SCORE, ascending=False, kind="stable").head(limit)
    return [(row["tags.mlflow.runName"], float(row[_SCORE]), _params(row)) for _, row in runs.iterrows()]


def _params(run: pd.Series) -> dict[str, str]:
    names = [name for name in run.index if name.startswith("params.") and pd.notna(run[name])]
    params = {name.removeprefix("params."): str(run[name]) for name in names}
    if "head.chosen_c" in params:  # of those that were tried, the one that the score is for
        params["head.c"] = params["head.chosen_c"]
    return params
