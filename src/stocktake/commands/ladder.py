"""`stocktake ladder`, the main entry point: four models on one manifest, a leaderboard, a candidate version."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd

from stocktake.commands.compare import print_leaderboard
from stocktake.config.training import LadderConfig
from stocktake.errors import StocktakeError
from stocktake.registry.registration import register_candidate
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, log_config, run_tags, train_stage
from stocktake.stages.table import STAGES
from stocktake.tracking.leaderboard import COLUMNS, as_markdown
from stocktake.tracking.runs import start_run


def ladder(config: LadderConfig) -> dict[str, float]:
    """Train the stages as children of one run and register the best by val/macro_f1.

    Returns:
        The best stage's metrics.
    """
    if not config.stages:
        raise StocktakeError("--stages is empty: name at least one of " + ", ".join(STAGES))
    prepared = prepare_data(config)
    tags = run_tags(config, prepared.manifest, "ladder")
    with start_run(config.tracking, workspace=Path(config.workspace), name="ladder", tags=tags) as run:
        log_config(run, config, LadderConfig, prepared.manifest)
        finished: list[StageResult] = []
        for stage in config.stages:
            print(f"\n--- {stage}", flush=True)
            began = time.monotonic()
            result = train_stage(stage, config, prepared, run)
            finished.append(result)
            score = result.metrics["val/macro_f1"]
            print(f"{stage}: val/macro_f1 {score:.3f} in {time.monotonic() - began:.0f} s", flush=True)
        best = max(finished, key=lambda result: result.metrics["val/macro_f1"])
        table = leaderboard(finished, config.task, prepared.manifest.fingerprint, run.name)
        run.log_metrics({name: best.metrics[name] for name in best.metrics})
        run.set_tags({"best": best.stage, "mlflow.note.content": as_markdown(table)})
        table.to_csv(run.artifacts / "leaderboard.csv", index=False)
    print()
    print_leaderboard(table, f"{config.task} in {prepared.manifest.source.root}")
    print()
    register_candidate(config.tracking, best.run.folder, Path(config.workspace))
    print(f"results on disk: {run.folder}")
    print(f"MLflow UI: {ui_command(run.state.tracking_uri)}", flush=True)
    return best.metrics


def leaderboard(results: list[StageResult], task: str, fingerprint: str, parent: str) -> pd.DataFrame:
    """The stages in the columns of `stocktake compare`, best val/macro_f1 first."""
    rows: list[dict[str, Any]] = []
    for result in results:
        metrics = result.metrics
        row: dict[str, Any] = {column: metrics.get(column, math.nan) for column in COLUMNS}
        row |= {
            "run": result.run.name,
            "stage": result.stage,
            "task": task,
            "backbone": result.backbone or "",
            "test/macro_f1 interval": f"[{metrics['test/macro_f1_low']:.2f}, {metrics['test/macro_f1_high']:.2f}]",
            "n": metrics["test/n"],
            "duration_s": result.seconds,
            "data.fingerprint": fingerprint,
            "comparable": True,
            "parent": parent,
            "status": "FINISHED",
            "run_id": result.run.run_id or "",
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("val/macro_f1", ascending=False, ignore_index=True)


def ui_command(tracking_uri: str | None) -> str:
    """How to see the runs."""
    if tracking_uri is None:
        return "stocktake sync, then mlflow ui"
    if tracking_uri.startswith(("http://", "https://")):
        return f"open {tracking_uri}"
    return f"mlflow ui --backend-store-uri {tracking_uri}"
