"""Fine-tuning: train the whole network, stop early, keep the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from stocktake import distributed
from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.evaluation.figures import plot_curves
from stocktake.models.inference import pick_device
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import Precision, choose_precision
from stocktake.stages.prepare import PreparedData
from stocktake.tracking.runs import TrackedRun
from stocktake.training.checkpoints import find_checkpoint, stored_precision
from stocktake.training.fit import EpochVerdict, fit

LR_RULE = "lr belongs to the global batch: it is the same for any number of processes"


def train(
    run: TrackedRun, config: FinetuneConfig, prepared: PreparedData, should_stop: EpochVerdict | None = None
) -> NetworkModel:
    """Train on the train split and leave the network at its best epoch on val.

    A checkpoint in the run's folder is resumed. `should_stop` gets each epoch's figures and its number from 1,
    and may end the training. The processes of a distributed job call this together; the first one's `run` and
    `should_stop` count.
    """
    manifest = prepared.manifest
    world = distributed.world()
    if world.size > 1:
        _log_world(run, config, world)
    checkpoints = distributed.run_on_rank_zero(lambda: _checkpoints(run, config, manifest.fingerprint))
    model = create_network(manifest.labels, config.image_size, config.backbone, config.weights, seed=config.seed)
    precision = distributed.run_on_rank_zero(lambda: _precision(model, config, checkpoints))
    run.set_tags({"precision": precision})
    epochs: list[dict[str, float]] = []

    def on_epoch(figures: Mapping[str, float], epoch: int) -> bool:
        run.log_metrics(figures, step=epoch)
        epochs.append({"epoch": float(epoch), **figures})
        return should_stop is not None and should_stop(figures, epoch)

    fitted = fit(model, manifest, prepared.photos, config, precision, checkpoints=checkpoints, on_epoch=on_epoch)
    run.log_metrics({"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}, step=fitted.epochs)
    if epochs:
        plot_curves(pd.DataFrame(epochs), run.artifacts / "curves.png")
    return model


def _precision(model: NetworkModel, config: FinetuneConfig, checkpoints: Path) -> Precision:
    """Of the checkpoint that is resumed, which may come from another machine; else by the rule."""
    checkpoint = find_checkpoint(checkpoints)
    if checkpoint is not None and config.precision == "auto":
        return stored_precision(checkpoint)
    return choose_precision(model, config.precision, pick_device())


def _log_world(run: TrackedRun, config: FinetuneConfig, world: distributed.World) -> None:
    run.set_tags({"world_size": world.size, "backend": world.backend, "nodes": world.nodes})
    run.log_params(
        {
            "global_batch": config.batch_size,
            "batch_per_process": config.batch_size // world.size,
            "threads_per_process": torch.get_num_threads(),
            "lr_rule": LR_RULE,
        }
    )


def _checkpoints(run: TrackedRun, config: FinetuneConfig, fingerprint: str) -> Path:
    """Where the checkpoints of this training lie."""
    checkpoints = run.folder / "checkpoints"
    if config.resume:
        checkpoints = resumed_checkpoints(Path(config.resume), fingerprint)
        run.set_tags({"resumed_from": config.resume})
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / DATA).write_text(fingerprint)
    return checkpoints


DATA = "data-fingerprint"


def resumed_checkpoints(folder: Path, fingerprint: str) -> Path:
    """The checkpoints of an earlier run's folder.

    Raises:
        StocktakeError: there are none, or they were made from other bins or splits.
    """
    checkpoints = folder / "checkpoints"
    if find_checkpoint(checkpoints) is None:
        raise StocktakeError(f"--resume {folder}: there is no checkpoint in checkpoints/; give the folder of a run")
    data = (checkpoints / DATA).read_text() if (checkpoints / DATA).exists() else ""
    if data != fingerprint:
        raise StocktakeError(
            f"--resume {folder}: it was trained on other data (fingerprint {data or 'unknown'}, now {fingerprint}): "
            "give the same --root, --task, --list and --split"
        )
    return checkpoints
