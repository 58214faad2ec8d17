"""One training: the Trainer with its callbacks, from a manifest to the best weights."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar

from stocktake.bins.array_cache import ArrayCache
from stocktake.bins.manifest import Manifest
from stocktake.config import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.models.network import NetworkModel
from stocktake.models.precision import Precision
from stocktake.progress import shown
from stocktake.training.data import BinsDataModule
from stocktake.training.module import SETTINGS, NetworkModule, resume_settings

MONITORED = "val/macro_f1"
BEST, LAST = "best.ckpt", "last.ckpt"
EpochVerdict = Callable[[Mapping[str, float], int], bool]
"""Told the figures of an epoch and its number from 1; True ends the training there."""


@dataclass(frozen=True)
class Fitted:
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
) -> Fitted:
    """Train `model` in place and leave it at the weights of its best epoch on val.

    Args:
        model: with the weights to start from.
        manifest: its train and val splits are used; test is not looked at.
        photos: every photo of the two splits, prepared at the model's size.
        config: epochs, rates, early stopping, ...
        precision: what to compute in.
        checkpoints: folder of best.ckpt and last.ckpt; a last.ckpt in it is gone on from.
        on_epoch: told each epoch's figures.

    Raises:
        StocktakeError: settings with which nothing can be learnt, or a last.ckpt that is damaged or was trained with
            other settings.
        KeyboardInterrupt: Ctrl-C; the epochs before it are in last.ckpt.
    """
    counts = manifest.counts()["train"].tolist()
    if config.batch_size < 2:
        raise StocktakeError(f"--batch_size {config.batch_size}: batch normalisation needs at least 2 photos")
    if config.training.max_steps == 0:
        raise StocktakeError("--training.max_steps 0 trains nothing: give 1 or more, or -1 for no limit")
    if sum(counts) < 2:
        raise StocktakeError("the train split has fewer than 2 bins: add bins or change --split.fractions")
    _quieten()
    seed_everything(config.seed, workers=True, verbose=False)
    workers = config.training.workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 2) - 1) if torch.cuda.is_available() else 0
    data = BinsDataModule(
        manifest,
        photos,
        batch_size=config.batch_size,
        augment=config.training.augment,
        workers=workers,
        seed=config.seed,
    )
    module = NetworkModule(model.lay_out(precision.channels_last), config, counts)
    best = Checkpoint(checkpoints, "best", monitor=MONITORED, mode="max", enable_version_counter=False)
    last = Checkpoint(checkpoints, "last", enable_version_counter=False)
    early = EarlyStopping(MONITORED, mode="max", patience=config.training.patience)
    callbacks: list[Callback] = [LastStep(config.training.max_steps), EpochLine(on_epoch, config.lr), early, best, last]
    if shown():
        callbacks.append(TQDMProgressBar(leave=False))
    trainer = Trainer(
        max_epochs=config.epochs,
        max_steps=config.training.max_steps,
        precision="bf16-mixed" if precision.dtype == "bf16" else "32-true",
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        gradient_clip_val=config.training.gradient_clip or None,
        accumulate_grad_batches=config.training.accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=shown(),
        use_distributed_sampler=False,  # the sampler of the data module knows its rank
        default_root_dir=checkpoints,
    )
    resumed = checkpoints / LAST if (checkpoints / LAST).exists() else None
    if resumed:
        check_resumable(resumed, config)
    with _interruptible():
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    state = torch.load(checkpoints / BEST, weights_only=True, map_location="cpu")
    weights = {key: value for key, value in state["state_dict"].items() if key.startswith("model.")}
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    model.lay_out(True).eval()
    return Fitted(
        best_epoch=int(state["epoch"]) + 1,
        epochs=int(trainer.current_epoch),
        best_val_macro_f1=float(best.best_model_score or 0.0),
    )


def check_resumable(last: Path, config: FinetuneConfig) -> None:
    """Raises StocktakeError unless going on from this checkpoint gives what never stopping would have given.

    Rates, schedule and optimizer come out of the checkpoint: changed settings would be ignored without a word.
    """
    try:
        then: dict[str, object] = torch.load(last, weights_only=True, map_location="cpu")[SETTINGS]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StocktakeError(f"{last} is no checkpoint to go on from ({reason}): train anew without --resume") from None
    now = resume_settings(config)
    differing = [f"--{name} {then.get(name)} (now {value})" for name, value in now.items() if then.get(name) != value]
    if differing:
        raise StocktakeError(f"{last} was trained with {', '.join(differing)}: give the same, or train anew")


class Checkpoint(ModelCheckpoint):
    """Still knows its best epoch when the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Its files are where the folder is now."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        ranked = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": ranked, "dirpath": self.dirpath})


class LastStep(Callback):
    """Ends a training of `max_steps` with a validation, wherever in an epoch that is; Lightning alone skips it."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop as early stopping would."""
        if trainer.global_step == self._max_steps:
            trainer.should_stop = True


class EpochLine(Callback):
    """Prints an epoch's line in the first seed's form, from which a SageMaker tuner reads its objective."""

    def __init__(self, on_epoch: EpochVerdict, lr: float) -> None:
        self._on_epoch = on_epoch
        self._lr = lr
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
        print(
            f"epoch={epoch} train_loss={figures['train/loss']:.6f} train_acc={figures['train/accuracy']:.6f} "
            f"val_loss={figures['val/loss']:.6f} val_acc={figures['val/accuracy']:.6f} "
            f"val_macro_f1={figures['val/macro_f1']:.6f} elapsed_sec={figures['epoch_seconds']:.2f}",
            flush=True,
        )
        if self._on_epoch(figures, epoch):
            trainer.should_stop = True


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays KeyboardInterrupt, and is heard afterwards: Lightning exits with 1 and turns the signal off."""
    heard = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, heard)


def _quieten() -> None:
    """Lightning's hints about loggers and loaders do not concern a user of the command line."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch\.jit)")
