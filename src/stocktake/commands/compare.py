"""`stocktake compare`: the leaderboard of an experiment, in the terminal, as HTML and as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.config.runs import CompareConfig
from stocktake.errors import StocktakeError
from stocktake.files import atomic_write
from stocktake.tables import show_table

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "run": "run",
    "stage": "stage",
    "backbone": "backbone",
    "val/macro_f1": "val macro-F1",
    "val/accuracy": "val accuracy",
    "test/macro_f1": "test macro-F1",
    "test/accuracy": "test accuracy",
    "test/rmse": "test RMSE",
    "n": "n",
    "duration_s": "duration",
    "task": "task",
    "data.fingerprint": "data",
    "parent": "parent",
    "status": "status",
    "run_id": "run id",
}
_NUMBERS = ("val/macro_f1", "val/accuracy", "test/macro_f1", "test/accuracy", "test/rmse", "n", "duration_s")
_IN_TERMINAL = {
    "run": "run",
    "stage": "stage",
    "backbone": "backbone",
    "val/macro_f1": "val F1",
    "test/macro_f1": "test F1",
    "test/accuracy": "test acc",
    "test/rmse": "test RMSE",
    "n": "n",
    "duration_s": "duration",
}
_UNLIKE = "≠"  # before a run that was measured on other data


def compare(config: CompareConfig) -> pd.DataFrame:
    """Print the leaderboard and write leaderboard.html and leaderboard.csv.

    Returns:
        One row a run, best val/macro_f1 first; the columns are `stocktake.tracking.leaderboard.COLUMNS`.

    Raises:
        StocktakeError: no such experiment, no run with a score in it, or a store that cannot be used.
    """
    from stocktake.tracking.leaderboard import read_leaderboard

    frame, link = read_leaderboard(config.tracking, stage=config.stage)
    if frame.empty:
        of = f" of stage {config.stage!r}" if config.stage else ""
        raise StocktakeError(f"the experiment {config.tracking.experiment!r} has no run{of} with a score yet")
    frame = frame.head(config.best)
    folder = Path(config.output) if config.output else Path(config.workspace) / "compare"
    try:
        atomic_write(folder / "leaderboard.csv", frame.to_csv(index=False))
        atomic_write(folder / "leaderboard.html", page(frame, config.tracking.experiment, link))
    except OSError as error:
        raise StocktakeError(
            f"cannot write the leaderboard into {folder}: {error.strerror}; choose --output"
        ) from error
    print_leaderboard(frame, config.tracking.experiment)
    print(f"written: {folder / 'leaderboard.html'} and leaderboard.csv" + (f"; in MLflow: {link}" if link else ""))
    return frame


def print_leaderboard(frame: pd.DataFrame, experiment: str) -> None:
    """Print the columns that fit a terminal; task and data, the same in all comparable rows, are printed below."""
    from stocktake.tracking.leaderboard import text

    headers = dict(_IN_TERMINAL)
    if (frame["run"] == frame["stage"]).all():
        del headers["stage"]
    rows: list[dict[str, Any]] = []
    for row in frame.to_dict("records"):
        mark = "" if row["comparable"] else f"{_UNLIKE} "
        rows.append({name: text(row, name) for name in headers} | {"run": f"{mark}{row['run']}"})
    show_table(rows, title=experiment, headers=headers, style=lambda row: "dim" if row["run"][0] == _UNLIKE else None)
    for row in frame[frame["comparable"]].head(1).to_dict("records"):
        print(f"task {row['task'] or '?'}, data {row['data.fingerprint'] or '?'}")
    if not frame["comparable"].all():
        print(f"{_UNLIKE} another task or other data: not comparable with the rest")


def page(frame: pd.DataFrame, experiment: str, link: str | None) -> str:
    """The leaderboard as one HTML page, whose columns can be sorted."""
    from stocktake.evaluation.pages import render
    from stocktake.tracking.leaderboard import text

    best = frame["val/macro_f1"].max()
    rows = []
    for row in frame.to_dict("records"):
        score = row["val/macro_f1"]
        cells = [{"key": row[name] if row[name] == row[name] else "", "text": text(row, str(name))} for name in _TITLES]
        cells[0]["text"] = cells[0]["text"] if row["comparable"] else f"{_UNLIKE} {cells[0]['text']}"
        cells[-1]["text"] = cells[-1]["text"][:8]
        share = f"{100 * max(score, 0) / best:.1f}" if best > 0 and score == score else None
        rows.append({"comparable": row["comparable"], "share": share, "cells": cells})
    columns = [{"name": name, "title": title, "is_number": name in _NUMBERS} for name, title in _TITLES.items()]
    return render("leaderboard.html", experiment=experiment, rows=rows, columns=columns, link=link, unlike=_UNLIKE)
