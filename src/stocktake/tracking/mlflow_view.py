"""The leaderboard inside MLflow's own pages: a saved view of the experiment's runs.

It is written as the "share" button of MLflow 3 would write it; tests/tracking/test_mlflow_view.py opens it in a
browser.
"""

from __future__ import annotations

import json
from typing import Any

VIEW = "leaderboard"
SCORES = ("val/macro_f1", "val/accuracy", "test/macro_f1", "test/accuracy", "test/rmse")

_COLUMNS = [
    "tags.`stage`",
    "tags.`task`",
    "params.`backbone`",
    *(f"metrics.`{name}`" for name in SCORES),
    *(f"metrics.`test/{name}`" for name in ("macro_f1_low", "macro_f1_high", "n")),
    "tags.`data.fingerprint`",
]
_STATE = {"orderByKey": "metrics.`val/macro_f1`", "orderByAsc": False, "selectedColumns": _COLUMNS}
_TAGS = {
    # The view for training runs, and the metric that they are judged by
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "val/macro_f1",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(_STATE),
}


def view_path(experiment_id: str) -> str:
    """Path of the view, to be appended to a server's address."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"


def show_in_mlflow(client: Any, experiment_id: str) -> None:
    """Make MLflow's page of the experiment show the leaderboard's columns. What the user wrote there stays."""
    tags = client.get_experiment(experiment_id).tags
    link = view_path(experiment_id).removeprefix("/")
    note = f"Runs of `stocktake`. [Leaderboard]({link}): best `val/macro_f1` first."
    for key, value in {**_TAGS, "mlflow.note.content": note}.items():
        if key not in tags or (key.startswith("mlflow.sharedViewState.") and tags[key] != value):
            client.set_experiment_tag(experiment_id, key, value)
