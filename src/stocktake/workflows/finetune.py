"""`stocktake finetune`: train the whole network, stop early, keep the best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from stocktake.config import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.evaluation.figures import plot_curves
from stocktake.models.inference import pick_device
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import choose_precision
from stocktake.tracking.runs import TrackedRun
from stocktake.training.fit import LAST, EpochVerdict, Fitted, fit
from stocktake.workflows.rung import Bench, Rung, record_model, rung_run, set_up


def finetune(config: FinetuneConfig, bench: Bench | None = None, parent: TrackedRun | None = None) -> Rung:
    """Train, evaluate and log; alone or as a rung of a ladder."""
    bench = bench or set_up(config)
    with rung_run(config, FinetuneConfig, bench, "finetune", parent) as (run, began):
        model, fitted = train_network(run, config, bench)
        metrics = record_model(run, model, config, bench, step=fitted.epochs + 1, batch_size=config.batch_size)
    return Rung("finetune", metrics, run, time.monotonic() - began, config.backbone)


def train_network(
    run: TrackedRun, config: FinetuneConfig, bench: Bench, should_stop: EpochVerdict | None = None
) -> tuple[NetworkModel, Fitted]:
    """Train on the train split and leave the network at its best epoch on val.

    A last.ckpt in the run's folder is gone on from. `should_stop` is told each epoch's figures and its number from 1,
    and may end the training.
    """
    manifest = bench.manifest
    checkpoints = run.folder / "checkpoints"
    if config.resume:
        checkpoints = resumed_checkpoints(Path(config.resume), manifest.fingerprint)
        run.set_tags({"resumed_from": config.resume})
    model = create_network(manifest.labels, config.image_size, config.backbone, config.weights, seed=config.seed)
    precision = choose_precision(model, "train", config.precision, pick_device(), Path(config.workspace))
    run.set_tags({"precision": str(precision)})
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / DATA).write_text(manifest.fingerprint)
    epochs: list[dict[str, float]] = []

    def on_epoch(figures: Mapping[str, float], epoch: int) -> bool:
        run.log_metrics(figures, step=epoch)
        epochs.append({"epoch": float(epoch), **figures})
        return should_stop is not None and should_stop(figures, epoch)

    fitted = fit(model, manifest, bench.photos, config, precision, checkpoints=checkpoints, on_epoch=on_epoch)
    run.log_metrics({"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}, step=fitted.epochs)
    if epochs:
        plot_curves(pd.DataFrame(epochs), run.artifacts / "curves.png")
    return model, fitted


DATA = "data-fingerprint"


def resumed_checkpoints(folder: Path, fingerprint: str) -> Path:
    """The checkpoints of an earlier run's folder.

    Raises:
        StocktakeError: there are none, or they were made from other bins or splits.
    """
    checkpoints = folder / "checkpoints"
    if not (checkpoints / LAST).exists():
        raise StocktakeError(f"--resume {folder}: there is no checkpoints/{LAST} in it; give the folder of a run")
    data = (checkpoints / DATA).read_text() if (checkpoints / DATA).exists() else ""
    if data != fingerprint:
        raise StocktakeError(
            f"--resume {folder}: it was trained on other data (fingerprint {data or 'unknown'}, now {fingerprint}): "
            "give the same --root, --task, --list and --split"
        )
    return checkpoints
