"""The runs of an experiment side by side."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact
from stocktake.tracking.addresses import is_http, resolve
from stocktake.tracking.connection import Connection
from stocktake.tracking.mlflow_view import SCORES, show_in_mlflow, view_path

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
    connection = Connection(resolve(tracking))
    connection.open()
    client = connection.client
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        names = ", ".join(repr(experiment.name) for experiment in client.search_experiments(max_results=30))
        raise StocktakeError(
            f"there is no experiment {tracking.experiment!r} in {connection.shown}:"
            f" --tracking.experiment can be {names}"
        )
    show_in_mlflow(client, experiment.experiment_id)
    frame = leaderboard(search_runs(connection, [experiment.experiment_id]), stage)
    uri = connection.stores.tracking
    return frame, redact(uri) + view_path(experiment.experiment_id) if is_http(uri) else None


def search_runs(connection: Connection, experiment_ids: list[str], filter_string: str = "") -> pd.DataFrame:
    """`mlflow.search_runs` in the connection's store."""
    import mlflow

    connection.use()
    return mlflow.search_runs(experiment_ids, filter_string, max_results=50_000)


def leaderboard(runs: pd.DataFrame, stage: str | None = None) -> pd.DataFrame:
    """The columns `COLUMNS` of those rows of `mlflow.search_runs` that have a score."""

    def column(name: str, missing: object) -> pd.Series[Any]:
        values = runs[name] if name in runs else pd.Series(missing, index=runs.index, dtype=object)
        return values.where(values.notna(), missing)

    def number(name: str) -> pd.Series[Any]:
        return pd.to_numeric(column(f"metrics.{name}", math.nan))

    names = dict(zip(runs["run_id"], column("tags.mlflow.runName", ""), strict=True))
    low, high = number("test/macro_f1_low"), number("test/macro_f1_high")
    start, end = (pd.to_datetime(column(name, pd.NaT), utc=True) for name in ("start_time", "end_time"))
    frame = pd.DataFrame(
        {
            "run": column("tags.mlflow.runName", ""),
            "stage": column("tags.stage", ""),
            "task": column("tags.task", ""),
            "backbone": column("params.backbone", "").where(lambda text: text != "", column("tags.backbone", "")),
            **{name: number(name) for name in SCORES},
            "test/macro_f1 interval": [
                "" if math.isnan(a + b) else f"[{a:.2f}, {b:.2f}]" for a, b in zip(low, high, strict=True)
            ],
            "n": number("test/n"),
            "duration_s": (end - start).dt.total_seconds(),
            "data.fingerprint": column("tags.data.fingerprint", ""),
            "comparable": True,
            "parent": [names.get(run_id, run_id[:8]) for run_id in column("tags.mlflow.parentRunId", "")],
            "status": column("status", ""),
            "run_id": column("run_id", ""),
        },
        columns=list(COLUMNS),
    )
    frame = frame[frame[list(SCORES)].notna().any(axis=1)]
    if stage is not None:
        frame = frame[frame["stage"] == stage]
    data = frame["task"] + " " + frame["data.fingerprint"]
    frame = frame.assign(comparable=data == (data.mode().iloc[0] if len(data) else ""))
    order = ["val/macro_f1", "test/macro_f1"]
    return frame.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def as_markdown(frame: pd.DataFrame) -> str:
    """The table as Markdown, for `mlflow.note.content` of the run above the runs in it."""
    names = ["run", "val/macro_f1", "test/macro_f1", "test/accuracy", "test/rmse", "n"]
    rows = [[text(row, name).replace("|", "\\|") for name in names] for row in frame.to_dict("records")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows])


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


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
