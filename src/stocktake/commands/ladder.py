"""`stocktake ladder`, the main entry point: four models on one manifest, a leaderboard, a candidate version."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd

from stocktake.commands.classical import classical
from stocktake.commands.compare import print_leaderboard
from stocktake.commands.finetune import finetune
from stocktake.commands.frozen import frozen
from stocktake.commands.majority import majority
from stocktake.commands.stage_runs import StageResult, log_config, prepare_data, run_tags
from stocktake.config import LadderConfig
from stocktake.errors import StocktakeError
from stocktake.registry.registration import register_candidate
from stocktake.tracking.leaderboard import COLUMNS, as_markdown
from stocktake.tracking.runs import start_run

_RUNGS = {"majority": majority, "classical": classical, "frozen": frozen, "finetune": finetune}


def ladder(config: LadderConfig) -> dict[str, float]:
    """Run the rungs as children of one run and register the best by val/macro_f1.

    Returns:
        The best rung's metrics.
    """
    if not config.rungs:
        raise StocktakeError("--rungs is empty: name at least one of " + ", ".join(_RUNGS))
    prepared = prepare_data(config)
    tags = run_tags(config, prepared.manifest, "ladder")
    with start_run(config.tracking, workspace=Path(config.workspace), name="ladder", tags=tags) as run:
        log_config(run, config, LadderConfig, prepared.manifest)
        finished: list[StageResult] = []
        for stage in config.rungs:
            print(f"\n--- {stage}", flush=True)
            began = time.monotonic()
            rung = _RUNGS[stage](config, prepared, run)  # type: ignore[operator]
            finished.append(rung)
            score = rung.metrics["val/macro_f1"]
            print(f"{stage}: val/macro_f1 {score:.3f} in {time.monotonic() - began:.0f} s", flush=True)
        best = max(finished, key=lambda rung: rung.metrics["val/macro_f1"])
        table = leaderboard(finished, config.task, prepared.manifest.fingerprint, run.name)
        run.log_metrics({name: best.metrics[name] for name in best.metrics})
        run.set_tags({"best": best.stage, "mlflow.note.content": as_markdown(table)})
        table.to_csv(run.artifacts / "leaderboard.csv", index=False)
    print()
    print_leaderboard(table, f"{config.task} in {prepared.manifest.source.root}")
    print()
    register_candidate(config.tracking, best.run.folder, Path(config.workspace))
    print(f"results on disk: {run.folder}")
    print(f"MLflow UI: {ui_command(run.tracking_uri)}", flush=True)
    return best.metrics


def leaderboard(rungs: list[StageResult], task: str, fingerprint: str, parent: str) -> pd.DataFrame:
    """The rungs in the columns of `stocktake compare`, best val/macro_f1 first."""
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        metrics = rung.metrics
        row: dict[str, Any] = {column: metrics.get(column, math.nan) for column in COLUMNS}
        row |= {
            "run": rung.run.name,
            "stage": rung.stage,
            "task": task,
            "backbone": rung.backbone or "",
            "test/macro_f1 interval": f"[{metrics['test/macro_f1_low']:.2f}, {metrics['test/macro_f1_high']:.2f}]",
            "n": metrics["test/n"],
            "duration_s": rung.seconds,
            "data.fingerprint": fingerprint,
            "comparable": True,
            "parent": parent,
            "status": "FINISHED",
            "run_id": rung.run.run_id or "",
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
