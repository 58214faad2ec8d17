"""The Lightning module: loss, optimizer, schedule, and figures that sum exactly over batches and processes."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from stocktake import distributed
from stocktake.config.training import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.evaluation.metrics import scores
from stocktake.models.network import NetworkModel
from stocktake.models.precision import Precision

SETTINGS = "stocktake.settings"
"""Where a checkpoint holds what it was trained with."""


class NetworkModule(LightningModule):
    """Trains a NetworkModel; logs the val/ figures once an epoch."""

    def __init__(
        self, model: NetworkModel, config: FinetuneConfig, train_counts: list[int], precision: Precision = "fp32"
    ) -> None:
        """Train `model` as `config` says; train_counts: bins of each class in the training split."""
        super().__init__()
        self.model = model
        self._config = config
        self._precision = precision
        classes = len(model.spec.labels)
        weights = torch.ones(classes)
        if config.training.class_weight == "balanced":
            weights = sum(train_counts) / (classes * torch.tensor(train_counts, dtype=torch.float32))
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("smoothing", smoothed_targets(classes, config), persistent=False)
        # a loss that is no number is kept: the default drops it, and "disable" drops the weights (torchmetrics 1.9)
        self.train_loss, self.val_loss = (MeanMetric(nan_strategy=math.nan) for _ in range(2))
        self.train_confusion, self.val_confusion = (MulticlassConfusionMatrix(classes) for _ in range(2))

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The loss of a batch, or of this process's share of it: the mean over the processes is the batch's loss."""
        photos, targets = batch
        logits = self.model(photos)
        # a soft target is the class's row of the smoothing table, weighed by the class
        soft = self.get_buffer("smoothing")[targets]
        weights = self.get_buffer("class_weights")[targets]
        loss = -(soft * F.log_softmax(logits.float(), 1)).sum(1).mul(weights).sum() / mean_over_ranks(weights.sum())
        self.train_loss.update(F.cross_entropy(logits.detach().float(), targets), weight=len(targets))
        self.train_confusion.update(logits.detach().argmax(1), targets)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        """Counts a batch, which may be empty: a process without photos still takes part in every step."""
        photos, targets = batch
        if not len(targets):
            return
        logits = self.model(photos)
        self.val_loss.update(F.cross_entropy(logits.float(), targets), weight=len(targets))
        self.val_confusion.update(logits.argmax(1), targets)

    def on_train_start(self) -> None:
        """As at the start of an epoch: one that is gone on with has none."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Hold the backbone still while it is frozen."""
        frozen = self.current_epoch < self._config.training.freeze_epochs
        self.model.backbone.requires_grad_(not frozen).train(not frozen)

    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        """Seed what is random inside the network (dropout): by the batch, since a resumed epoch begins with fewer
        random numbers drawn than one that follows another."""
        place = (self._config.seed, self.current_epoch, index, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation figures."""
        figures = self._figures(self.val_loss, self.val_confusion)
        names = ("loss", "accuracy", "macro_f1", "rmse", "mae", "within_1")
        self.log_dict({f"val/{name}": figures[name] for name in names}, sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the checkpoint was trained with."""
        checkpoint[SETTINGS] = resume_settings(self._config) | {"precision": self._precision}

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, stepped with every batch."""
        config = self._config.training
        groups = self._parameter_groups()
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self._config.lr)
        else:
            optimizer = torch.optim.SGD(groups, lr=self._config.lr, momentum=0.9, nesterov=True)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule: LRScheduler | None = None
        if config.schedule == "one_cycle":
            rise = max(0.25, 2 / (steps + 1))  # one step at least: OneCycleLR divides by its length
            schedule = OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=rise)
        elif config.schedule == "cosine":
            schedule = CosineAnnealingLR(optimizer, T_max=steps)
        elif config.schedule == "step":
            schedule = StepLR(optimizer, step_size=max(1, steps // 3), gamma=0.1)
        found: dict[str, Any] = {"optimizer": optimizer}
        return found | ({"lr_scheduler": {"scheduler": schedule, "interval": "step"}} if schedule else {})

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Head and backbone apart (the head learns faster), with and without decay (none on biases and norms)."""
        groups = []
        for part, factor in ((self.model.backbone, 1.0), (self.model.head, self._config.training.head_lr_factor)):
            parameters = list(part.parameters())
            for decays in (True, False):
                chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
                decay = self._config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": self._config.lr * factor, "weight_decay": decay})
        return groups

    def train_figures(self) -> dict[str, float]:
        """Scores and loss of the epoch's training batches as they came by; counting starts anew."""
        return self._figures(self.train_loss, self.train_confusion)

    def _figures(self, losses: MeanMetric, confusions: MulticlassConfusionMatrix) -> dict[str, float]:
        confusion, loss = confusions.compute().cpu().numpy(), float(losses.compute())
        confusions.reset()
        losses.reset()
        found = {name: float(value) for name, value in scores(confusion, self.model.spec.labels).items()}
        return found | {"loss": loss}


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of each number over all processes."""
    size = distributed.world().size
    if size > 1:
        torch.distributed.all_reduce(value)
        value /= size
    return value


def resume_settings(config: FinetuneConfig) -> dict[str, object]:
    """By option, what a training must have in common with the one that it goes on from."""
    names = ["backbone", "image_size", "seed", "batch_size", "lr", "weight_decay"]
    free = {"workers", "patience", "collective_timeout", "world_size"}
    if config.training.schedule == "constant":
        free.add("max_steps")
    else:
        names.append("epochs")  # a schedule is made for a length
    settings = {name: getattr(config, name) for name in names}
    return settings | {f"training.{name}": v for name, v in asdict(config.training).items() if name not in free}


def smoothed_targets(classes: int, config: FinetuneConfig) -> Tensor:
    """(classes, classes): each class's target shares; rows sum to 1.

    `label_smoothing` is spread over the other classes evenly, `ordinal_smoothing` over the neighbouring ones: a count
    that is off by one is less wrong.

    Raises:
        StocktakeError: the two shares are all of the target or more.
    """
    label, ordinal = config.training.label_smoothing, config.training.ordinal_smoothing
    if label + ordinal >= 1:
        raise StocktakeError(
            f"--training.label_smoothing {label:g} and --training.ordinal_smoothing {ordinal:g} leave nothing of a "
            "target: their sum must be below 1"
        )
    table = torch.eye(classes) * (1 - label - ordinal) + label * (1 - torch.eye(classes)) / (classes - 1)
    near = torch.diag(torch.ones(classes - 1), 1) + torch.diag(torch.ones(classes - 1), -1)
    return table + ordinal * near / near.sum(1, keepdim=True)
