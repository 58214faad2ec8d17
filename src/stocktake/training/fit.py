"""One training: the Trainer with its callbacks, from a manifest to the best weights."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.plugins.environments import TorchElasticEnvironment  # type: ignore[attr-defined]
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from stocktake import distributed
from stocktake.config.training import FinetuneConfig
from stocktake.data.array_cache import ArrayCache
from stocktake.data.manifest import Manifest
from stocktake.errors import StocktakeError
from stocktake.models.network import NetworkModel
from stocktake.models.precision import Precision
from stocktake.signals import handlers_restored
from stocktake.training.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    RelocatableCheckpoint,
    ResumableEarlyStopping,
    SigtermCheckpoint,
    best_weights,
    check_resumable,
    checkpoint_on_all_nodes,
    find_checkpoint,
)
from stocktake.training.data import BinsDataModule
from stocktake.training.module import NetworkModule

MONITORED = "val/macro_f1"
EpochVerdict = Callable[[Mapping[str, float], int], bool]
"""Told the figures of an epoch and its number from 1; True ends the training there."""


@dataclass(frozen=True)
class FitResult:
    """What a training found."""

    best_epoch: int
    """Counted from 1."""
    epochs: int
    """Epochs run, a resumed run's earlier ones included."""
    best_val_macro_f1: float


def fit(
    model: NetworkModel,
    manifest: Manifest,
    photos: ArrayCache,
    config: FinetuneConfig,
    precision: Precision,
    *,
    checkpoints: Path,
    on_epoch: EpochVerdict,
) -> FitResult:
    """Train `model` in place and leave it at the weights of its best epoch on val.

    The processes of a distributed job call this together, with the same arguments; each trains on its share of every
    batch, and all end with the same weights.

    Args:
        model: with the weights to start from.
        manifest: its train and val splits are used; test is not looked at.
        photos: every photo of the two splits, prepared at the model's size.
        config: epochs, rates, early stopping, ...
        precision: what to compute in.
        checkpoints: folder of the checkpoints; the latest in it is resumed. Rank 0's: the others need not see it.
        on_epoch: called with each epoch's figures, in the first process.

    Raises:
        StocktakeError: settings with which nothing can be learnt, or a last.ckpt that is damaged or was trained with
            other settings.
        KeyboardInterrupt: Ctrl-C; what was learnt up to the checkpoint before it is in last.ckpt.
        SystemExit: SIGTERM, unless somebody handles it; all steps before it are in last.ckpt.
    """
    world = distributed.world()
    counts = manifest.counts()["train"].tolist()
    config.check_batch(world.size)
    if config.training.max_steps == 0:
        raise StocktakeError("--training.max_steps 0 trains nothing: give 1 or more, or -1 for no limit")
    if sum(counts) < 2 * world.size:
        processes = f" for each of {world.size} processes" if world.size > 1 else ""
        raise StocktakeError(f"the train split has fewer than 2 bins{processes}: add bins or change --split.fractions")
    _quieten()
    seed_everything(config.seed, workers=True, verbose=False)
    workers = config.training.workers
    if workers is None:
        cores = (os.cpu_count() or 2) // world.local_size
        workers = max(1, cores - 1) if torch.cuda.is_available() else 0
    data = BinsDataModule(
        manifest,
        photos,
        batch_size=config.batch_size,
        augment=config.training.augment,
        workers=workers,
        seed=config.seed,
        rank=world.rank,
        size=world.size,
    )
    module = NetworkModule(model, config, counts, precision)
    best = RelocatableCheckpoint(checkpoints, "best", monitor=MONITORED, mode="max", enable_version_counter=False)
    callbacks: list[Callback] = [
        MaxStepsCallback(config.training.max_steps),
        SigtermCheckpoint(checkpoints, signal.getsignal(signal.SIGTERM)),
        EpochLogger(on_epoch, config.lr),
        ResumableEarlyStopping(MONITORED, mode="max", patience=config.training.patience),
        best,
        RelocatableCheckpoint(checkpoints, Path(LAST).stem, enable_version_counter=False),
    ]
    is_shown = sys.stderr.isatty() and world.rank == 0
    if is_shown:
        callbacks.append(TQDMProgressBar(leave=False))
    trainer = Trainer(
        max_epochs=config.epochs,
        max_steps=config.training.max_steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        callbacks=callbacks,
        gradient_clip_val=config.training.gradient_clip or None,
        accumulate_grad_batches=config.training.accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=is_shown,
        use_distributed_sampler=False,  # the sampler of the data module knows its rank
        default_root_dir=checkpoints,
        **_devices(world, config),
    )
    name = distributed.run_on_rank_zero(lambda: _resumable(checkpoints, config))
    checkpoint = checkpoints / name if name else None
    with checkpoint_on_all_nodes(checkpoint, Path(config.workspace)) as resumed, _signals(world):
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    best_epoch, weights = distributed.run_on_rank_zero(lambda: best_weights(checkpoints / BEST))
    model.load_state_dict(weights)
    model.eval()
    return FitResult(
        best_epoch=best_epoch,
        epochs=int(trainer.current_epoch),
        best_val_macro_f1=float(best.best_model_score or 0.0),
    )


def _devices(world: distributed.World, config: FinetuneConfig) -> dict[str, Any]:
    """The Trainer's arguments that say where it computes, and how its files are written."""
    if world.size == 1:
        return {"accelerator": "auto", "devices": 1, "plugins": [AtomicCheckpointIO()]}
    strategy = DDPStrategy(
        process_group_backend=world.backend,
        timeout=timedelta(seconds=config.training.collective_timeout),
        # a backbone that is still frozen has no gradients to wait for
        find_unused_parameters=config.training.freeze_epochs > 0,
    )
    return {
        "accelerator": "gpu" if world.backend == "nccl" else "cpu",
        "devices": world.local_size,
        "num_nodes": world.nodes,
        "strategy": strategy,
        "plugins": [TorchElasticEnvironment(), AtomicCheckpointIO()],
        "sync_batchnorm": config.training.sync_batchnorm and world.backend == "nccl",  # torch has none for the CPU
    }


class MaxStepsCallback(Callback):
    """Ends a training of `max_steps` with a validation, wherever in an epoch that is; Lightning alone skips it."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop as early stopping would."""
        if trainer.global_step == self._max_steps:
            trainer.should_stop = True


class EpochLogger(Callback):
    """Prints an epoch's line in the first seed's form, from which a SageMaker tuner reads its objective.

    The first process prints it and asks for the verdict; all of them follow it.
    """

    def __init__(self, on_epoch: EpochVerdict, lr: float) -> None:
        self._on_epoch = on_epoch
        self._lr = lr
        self._started = time.monotonic()

    def on_train_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Start the clock: an epoch that is resumed has no start."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the line and hand the figures on."""
        if not isinstance(module, NetworkModule):
            raise TypeError(f"{type(module).__name__} does not count what it is trained on")
        train = module.train_figures()
        if not math.isfinite(train["loss"]):
            raise StocktakeError(
                f"the training loss is {train['loss']} after epoch {trainer.current_epoch + 1}: give a lower --lr "
                f"(now {self._lr:g}) or a smaller --training.gradient_clip"
            )
        figures = {"train/loss": train["loss"], "train/accuracy": train["accuracy"]}
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        figures["epoch_seconds"] = time.monotonic() - self._started
        epoch = trainer.current_epoch + 1
        if distributed.broadcast(self._tell(figures, epoch) if distributed.is_rank_zero() else False):
            trainer.should_stop = True

    def _tell(self, figures: dict[str, float], epoch: int) -> bool:
        print(
            f"epoch={epoch} train_loss={figures['train/loss']:.6f} train_acc={figures['train/accuracy']:.6f} "
            f"val_loss={figures['val/loss']:.6f} val_acc={figures['val/accuracy']:.6f} "
            f"val_macro_f1={figures['val/macro_f1']:.6f} elapsed_sec={figures['epoch_seconds']:.2f}",
            flush=True,
        )
        return self._on_epoch(figures, epoch)


def _resumable(checkpoints: Path, config: FinetuneConfig) -> str | None:
    """The name of the checkpoint to resume."""
    checkpoint = find_checkpoint(checkpoints)
    if checkpoint is None:
        return None
    check_resumable(checkpoint, config)
    return checkpoint.name


@contextmanager
def _signals(world: distributed.World) -> Iterator[None]:
    """Leave the training as its caller's handlers of SIGTERM and Ctrl-C do, which Lightning replaces.

    Lightning calls the SIGTERM handler that it finds before a step has ended: out of its sight in the meantime.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    with handlers_restored(signal.SIGINT, signal.SIGTERM):
        if world.size == 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            yield
        except SystemExit as error:
            if isinstance(error, SIGTERMException):
                signal.signal(signal.SIGTERM, sigterm_handler)
                signal.raise_signal(signal.SIGTERM)
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise


def _quieten() -> None:
    """Lightning's hints about loggers and loaders do not concern a user of the command line."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch\.jit)")
