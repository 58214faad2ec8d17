"""The runs of an experiment side by side: as a table here, and as a saved view in MLflow's own pages."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pandas as pd

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import is_http, redact, resolve
from stocktake.tracking.connection import Connection

COLUMNS = (
    "run",
    "stage",
    "task",
    "backbone",
    "val/macro_f1",
    "val/accuracy",
    "test/macro_f1",
    "test/macro_f1 interval",
    "test/accuracy",
    "test/rmse",
    "n",
    "duration_s",
    "data.fingerprint",
    "comparable",
    "parent",
    "status",
    "run_id",
)
"""Of the table: numbers are numbers (NaN where a run has none), intervals are text."""

_SCORES = ("val/macro_f1", "val/accuracy", "test/macro_f1", "test/accuracy", "test/rmse")
_VIEW = "leaderboard"
_DISPLAY = {
    # The view for training runs, and the metric that they are judged by
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "val/macro_f1",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    # What the page's "share" button would keep: ?viewStateShareKey=leaderboard opens it
    f"mlflow.sharedViewState.{_VIEW}": json.dumps(
        {
            "orderByKey": "metrics.`val/macro_f1`",
            "orderByAsc": False,
            "selectedColumns": [
                "tags.`stage`",
                "tags.`task`",
                "params.`backbone`",
                *(f"metrics.`{name}`" for name in _SCORES),
                *(f"metrics.`test/{name}`" for name in ("macro_f1_low", "macro_f1_high", "n")),
                "tags.`data.fingerprint`",
            ],
        }
    ),
}


def show_in_mlflow(client: Any, experiment_id: str) -> None:
    """Make MLflow's page of the experiment show the leaderboard's columns. What the user wrote there stays."""
    held = client.get_experiment(experiment_id).tags
    note = (
        "Runs of `stocktake`. "
        f"[Leaderboard](#/experiments/{experiment_id}/runs?viewStateShareKey={_VIEW}): best `val/macro_f1` first."
    )
    for key, value in {**_DISPLAY, "mlflow.note.content": note}.items():
        if key not in held or (key.startswith("mlflow.sharedViewState.") and held[key] != value):
            client.set_experiment_tag(experiment_id, key, value)


def read_leaderboard(tracking: TrackingConfig, *, stage: str | None = None) -> tuple[pd.DataFrame, str | None]:
    """One row a run that has a score, best val/macro_f1 first, and where MLflow shows the same.

    `comparable` is False for a run on another task or other data than most of the runs are on.

    Args:
        tracking: the store and the experiment.
        stage: only runs of this stage.

    Returns:
        A frame with `COLUMNS`, and a link if the store is a server.

    Raises:
        StocktakeError: there is no such experiment, naming those that there are; or the store cannot be used.
    """
    stores = resolve(tracking)
    connection = Connection(stores, request_seconds=60)
    connection.open()
    with connection.bounded():
        client = connection.client
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            names = ", ".join(repr(one.name) for one in client.search_experiments(max_results=30))
            raise StocktakeError(
                f"there is no experiment {tracking.experiment!r} in {connection.shown}:"
                f" --tracking.experiment can be {names}"
            )
        show_in_mlflow(client, experiment.experiment_id)
        runs = _all_runs(client, experiment.experiment_id)
    names_by_id = {run.info.run_id: run.info.run_name for run in runs}
    rows = [_row(run, names_by_id) for run in runs if any(name in run.data.metrics for name in _SCORES)]
    frame = pd.DataFrame(rows, columns=[name for name in COLUMNS if name != "comparable"])
    if stage is not None:
        frame = frame[frame["stage"] == stage]
    frame.insert(COLUMNS.index("comparable"), "comparable", _comparable(frame))
    frame = frame.sort_values(["val/macro_f1", "test/macro_f1"], ascending=False, na_position="last", kind="stable")
    link = None
    if is_http(stores.tracking):
        link = f"{stores.tracking}/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={_VIEW}"
    return frame.reset_index(drop=True), redact(link) if link else None


def as_markdown(frame: pd.DataFrame) -> str:
    """The table as Markdown, for `mlflow.note.content` of the run above the runs in it."""
    names = ["run", "val/macro_f1", "test/macro_f1", "test/accuracy", "test/rmse", "n"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in frame.to_dict("records"):
        cells = [text(row, str(name)).replace("|", "\\|") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(row: dict[Any, Any], name: str) -> str:
    """A cell as people read it: 0.512 [0.470, 0.550], 12 min 5 s."""
    value = row[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if name == "test/macro_f1" and row.get("test/macro_f1 interval"):
        return f"{value:.3f} {row['test/macro_f1 interval']}"
    if name == "duration_s":
        return _duration(float(value))
    if name == "n":
        return f"{int(value):,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _all_runs(client: Any, experiment_id: str) -> list[Any]:
    runs, token = [], None
    while True:
        page = client.search_runs([experiment_id], max_results=500, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _row(run: Any, names_by_id: dict[str, str]) -> dict[str, object]:
    metrics, tags, params = run.data.metrics, run.data.tags, run.data.params
    low, high = metrics.get("test/macro_f1_low"), metrics.get("test/macro_f1_high")
    parent = tags.get("mlflow.parentRunId")
    ended = run.info.end_time
    return {
        "run": run.info.run_name,
        "stage": tags.get("stage", ""),
        "task": tags.get("task") or params.get("task", ""),
        "backbone": params.get("backbone") or tags.get("backbone", ""),
        **{name: metrics.get(name, math.nan) for name in _SCORES},
        "test/macro_f1 interval": "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]",
        "n": metrics.get("test/n", math.nan),
        "duration_s": (ended - run.info.start_time) / 1000 if ended else math.nan,
        "data.fingerprint": tags.get("data.fingerprint", ""),
        "parent": names_by_id.get(parent, parent[:8]) if parent else "",
        "status": run.info.status,
        "run_id": run.info.run_id,
    }


def _comparable(frame: pd.DataFrame) -> list[bool]:
    data = list(zip(frame["task"], frame["data.fingerprint"], strict=True))
    if not data:
        return []
    most = Counter(data).most_common(1)[0][0]
    return [one == most for one in data]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
