"""Checkpoints: of the best epoch and the latest, and of where within an epoch a training is.

A training goes on within an epoch as if it had never stopped. Lightning restores weights, optimizer, schedule and its
own counters; the data module says which batch is next, the module what it has counted; all else that is random is
drawn by (seed, epoch, batch or row).
"""

from __future__ import annotations

import hashlib
import io
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from stocktake import distributed
from stocktake.config import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.training.module import SETTINGS, mean_over_ranks, resume_settings

BEST, LAST = "best.ckpt", "last.ckpt"


class Renamed(TorchCheckpointIO):
    """Written beside and renamed: Lightning's own way is by the system's temporary folder, on another disk a copy."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ARG002
    ) -> None:
        """Who reads `path` at any time finds a whole checkpoint, or none yet."""
        beside = Path(path).with_name(f".{Path(path).name}.part")
        content = io.BytesIO()  # torch's own errors hide those of a file: a full disk, Ctrl-C
        torch.save(checkpoint, content)
        beside.write_bytes(content.getbuffer())
        beside.replace(path)


class Checkpoint(ModelCheckpoint):
    """Still knows its best epoch when the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Its files are where the folder is now."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        ranked = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": ranked, "dirpath": self.dirpath})


class WithinEpoch(Callback):
    """Writes last.ckpt within an epoch too: every `minutes`, and when the process is told to end.

    SIGTERM ends the training after the step, or the end of an epoch, that is under way; in a validation, or when it
    comes again, at once. All processes write and end after the same step, as soon as one of them is told to.
    """

    def __init__(self, last: Path, minutes: float) -> None:
        """minutes: 0 for SIGTERM only."""
        self._last = last
        self._seconds = 60 * minutes
        self._written = time.monotonic()
        self._is_amid = False
        """Whether what is under way ends with a checkpoint, for which SIGTERM waits."""
        self._is_told = False
        self._heard = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Listen, in Lightning's place: it would end at once, or wait in a broadcast for processes that are gone."""
        self._written = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._heed)

    def on_train_batch_start(self, *_: Any) -> None:
        """A step can be kept."""
        self._is_amid = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, _o: Any, _b: Any, index: int) -> None:
        """Write between two steps; what a validation follows Lightning could not go on with."""
        if trainer.is_last_batch or trainer.should_stop:
            self._pause()
            return
        if (index + 1) % trainer.accumulate_grad_batches:
            return  # gradients are not in a checkpoint
        is_due = distributed.is_rank_zero() and 0 < self._seconds <= time.monotonic() - self._written
        device = module.device if distributed.world().size > 1 else "cpu"  # alone, no step waits for the GPU
        wishes = torch.tensor([self._is_told, is_due], dtype=torch.float32, device=device)
        error_recorded, is_due = (mean_over_ranks(wishes) > 0).tolist()
        if error_recorded or is_due:
            trainer.save_checkpoint(self._last)
            self._written = time.monotonic()
        if error_recorded:
            self._end()

    def on_validation_end(self, _trainer: Trainer, _module: LightningModule) -> None:
        """The epoch's own checkpoint is about to be written."""
        self._is_amid = True

    def on_train_epoch_start(self, _trainer: Trainer, _module: LightningModule) -> None:
        """The last epoch's checkpoint counts."""
        self._written = time.monotonic()
        self._pause()

    def on_train_end(self, _trainer: Trainer, _module: LightningModule) -> None:
        """All is written."""
        self._pause()

    def _pause(self) -> None:
        self._is_amid = False
        if self._is_told:
            self._end()

    def _heed(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_amid and not self._is_told:
            self._is_told = True
        else:
            self._end()

    def _end(self) -> None:
        """End as the process would have ended without a training."""
        if not callable(self._heard):
            raise SystemExit(128 + signal.SIGTERM)
        self._heard(signal.SIGTERM, None)


@contextmanager
def everywhere(file: Path, exists: bool, workspace: Path) -> Iterator[Path | None]:
    """The first process's file, on every machine; None where it does not exist there."""
    if not exists:
        yield None
        return
    digest = distributed.run_on_rank_zero(lambda: _digest(file))
    has_it = file.is_file() and _digest(file) == digest
    if all(distributed.gather(has_it)):
        yield file
        return
    content = distributed.run_on_rank_zero(file.read_bytes)
    if has_it:
        yield file
        return
    workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace, prefix="resumed-") as folder:
        here = Path(folder) / file.name
        here.write_bytes(content)
        yield here


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def best_weights(checkpoint: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The epoch, from 1, and the model's weights."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    prefix = "model."
    weights = {key.removeprefix(prefix): value for key, value in state["state_dict"].items() if key.startswith(prefix)}
    return int(state["epoch"]) + 1, weights


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
    # a setting that the checkpoint does not know is younger than it
    differing = [f"--{name} {then[name]} (now {now[name]})" for name in now if then.get(name, now[name]) != now[name]]
    if differing:
        raise StocktakeError(f"{last} was trained with {', '.join(differing)}: give the same, or train anew")


def is_resumable(last: Path, config: FinetuneConfig) -> bool:
    """Whether there is a checkpoint; StocktakeError where there is one that cannot be gone on from."""
    if not last.exists():
        return False
    check_resumable(last, config)
    return True
