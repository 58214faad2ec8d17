"""Checkpoints, by Lightning: of the best epoch, of the latest, and of where SIGTERM came."""

from __future__ import annotations

import hashlib
import io
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from stocktake import distributed
from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.files import atomic_write
from stocktake.models.precision import Precision
from stocktake.training.module import SETTINGS, resume_settings

BEST, LAST, SIGTERM = "best.ckpt", "last.ckpt", "sigterm.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own writes through the system's temporary folder, which on another disk is a copy."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ARG002
    ) -> None:
        """Write a whole checkpoint, or none."""
        content = io.BytesIO()  # torch's own errors hide those of a file: a full disk, Ctrl-C
        torch.save(checkpoint, content)
        atomic_write(Path(path), content.getvalue())


class RelocatableCheckpoint(ModelCheckpoint):
    """Still knows its best epoch when the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Its files are where the folder is now."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        ranked = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": ranked, "dirpath": self.dirpath})


class SigtermCheckpoint(OnExceptionCheckpoint):
    """On SIGTERM a process on its own ends after the step under way, with a checkpoint within the epoch.

    In a distributed job Lightning would answer the signal with a broadcast, which waits for processes that are gone:
    there the handler of before is put back, and the last epoch's checkpoint is the one to resume.
    """

    def __init__(self, checkpoints: Path, handler: Any) -> None:
        """handler: of SIGTERM in a distributed job."""
        super().__init__(checkpoints, Path(SIGTERM).stem)
        self._handler = handler

    def on_train_start(self, trainer: Trainer, _module: LightningModule) -> None:
        """Put the handler back."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Save between two steps only: gradients that are added up, and a validation, are in no checkpoint."""
        loop = trainer.fit_loop.epoch_loop
        has_stepped = (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and has_stepped and not loop.batch_progress.is_last_batch:
            super().on_exception(trainer, module, exception)


class ResumableEarlyStopping(EarlyStopping):
    """Takes the count of bad epochs from a checkpoint, and the patience from the settings."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning alone takes the patience of the checkpoint."""
        super().load_state_dict({**state_dict, "patience": self.patience})


@contextmanager
def checkpoint_on_all_nodes(file: Path | None, workspace: Path) -> Iterator[Path | None]:
    """Rank 0's file, on every machine; a copy lasts as long as the block."""
    if file is None:
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


def find_checkpoint(checkpoints: Path) -> Path | None:
    """The latest checkpoint of a folder: of an epoch's end, or of a SIGTERM after it. None: there is none.

    Raises:
        StocktakeError: one is damaged.
    """
    files = [checkpoints / name for name in (LAST, SIGTERM) if (checkpoints / name).is_file()]
    return max(files, key=lambda path: int(_load(path)["global_step"]), default=None)


def stored_precision(checkpoint: Path) -> Precision:
    """The number format that a training began with."""
    precision: Precision = _load(checkpoint)[SETTINGS]["precision"]
    return precision


def check_resumable(checkpoint: Path, config: FinetuneConfig) -> None:
    """Raises StocktakeError unless resuming gives what never stopping would have given.

    Rates, schedule and optimizer come out of the checkpoint: changed settings would be ignored silently.
    """
    then: dict[str, object] = _load(checkpoint)[SETTINGS]
    now = resume_settings(config)
    if config.precision != "auto":
        now["precision"] = config.precision
    # a setting that the checkpoint does not know is younger than it
    differing = [f"--{name} {then[name]} (now {now[name]})" for name in now if then.get(name, now[name]) != now[name]]
    if differing:
        raise StocktakeError(f"{checkpoint} was trained with {', '.join(differing)}: give the same, or train anew")


def _load(checkpoint: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
        return {name: content[name] for name in ("global_step", SETTINGS)}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StocktakeError(
            f"{checkpoint} is no checkpoint to resume ({reason}): train anew without --resume"
        ) from None
