"""What earlier runs were trained with, and how well they did."""

from __future__ import annotations

from stocktake.config import TrackingConfig
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection

_STAGES = {"finetune": ("finetune", "ddp")}
"""Stages that are trained alike, by the first of them."""


def best_settings(
    tracking: TrackingConfig, task: str, stage: str, most: int = 200
) -> list[tuple[str, float, dict[str, str]]]:
    """Name, val/macro_f1 and params (texts) of the finished runs and trials of a stage on a task, the best first.

    They come from the experiment of `tracking` alone; offline, there are none.

    Raises:
        StocktakeError: the store cannot be used.
    """
    if tracking.offline:
        return []
    connection = Connection(resolve(tracking), request_seconds=60)
    connection.open()
    with connection.bounded():
        client = connection.client
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            return []
        quoted = task.replace("'", "")
        found: list[tuple[str, float, dict[str, str]]] = []
        kinds = [f"tags.stage = '{one}'" for one in _STAGES.get(stage, (stage,))]
        for kind in (*kinds, f"tags.`trial.stage` = '{stage}'"):
            runs = client.search_runs(
                [experiment.experiment_id],
                f"{kind} AND tags.task = '{quoted}' AND attributes.status = 'FINISHED'",
                order_by=["metrics.`val/macro_f1` DESC"],
                max_results=most,
            )
            for run in runs:
                settings = dict(run.data.params)
                if "head.chosen_c" in settings:  # of those that were tried, the one that the figure is for
                    settings["head.c"] = settings["head.chosen_c"]
                if "val/macro_f1" in run.data.metrics and run.data.tags.get("trial.state") != "pruned":
                    found.append((run.info.run_name, run.data.metrics["val/macro_f1"], settings))
    return sorted(found, key=lambda one: -one[1])
