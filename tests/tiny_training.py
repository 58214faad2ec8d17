"""Trainings of seconds, alone or in one of several processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stocktake import distributed
from stocktake.config.training import FinetuneConfig, TrainingConfig
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import Precision
from stocktake.stages.prepare import PreparedData
from stocktake.training.fit import FitResult, fit
from tiny_bins import TINY_BACKBONE, TINY_SIZE


def config(epochs: int = 2, lr: float = 1e-2, batch_size: int = 8, **training: Any) -> FinetuneConfig:
    return FinetuneConfig(
        backbone=TINY_BACKBONE,
        weights="none",
        image_size=TINY_SIZE,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        training=TrainingConfig(**{"patience": 100, "augment": "flip", "collective_timeout": 60, **training}),
    )


def tiny_network(prepared: PreparedData, batchnorm: bool = True, dropout: float = 0.0) -> NetworkModel:
    """Two convolutions in the place of the backbone. In deep networks that have learnt nothing yet, normalising the
    few values of a tiny batch makes 1e-2 of a rounding error within five steps, in one process too."""
    model = create_network(prepared.manifest.labels, TINY_SIZE, TINY_BACKBONE, "none", seed=0)
    torch.manual_seed(0)

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batchnorm else nn.Identity()

    model.backbone = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, bias=not batchnorm), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, bias=not batchnorm), norm(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    model.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, len(prepared.manifest.labels)))
    return model


def train(
    prepared: PreparedData,
    given: FinetuneConfig,
    checkpoints: Path,
    stop_at: int | None = None,
    precision: Precision = "fp32",
    batchnorm: bool = True,
    dropout: float = 0.0,
) -> tuple[list[dict[str, float]], FitResult, dict[str, torch.Tensor]]:
    """The figures of each epoch as this process was told them, what was found, and the weights at the end."""
    if distributed.is_rank_zero():
        checkpoints.mkdir(parents=True, exist_ok=True)
    told: list[dict[str, float]] = []

    def on_epoch(figures: Mapping[str, float], epoch: int) -> bool:
        told.append({name: value for name, value in figures.items() if name != "epoch_seconds"} | {"epoch": epoch})
        return epoch == stop_at

    model = tiny_network(prepared, batchnorm, dropout)
    fitted = fit(
        model, prepared.manifest, prepared.photos, given, precision, checkpoints=checkpoints, on_epoch=on_epoch
    )
    return told, fitted, model.state_dict()


def assert_same_curve(one: list[dict[str, float]], other: list[dict[str, float]], within: float = 1e-4) -> None:
    assert len(one) == len(other)
    for here, there in zip(one, other, strict=True):
        assert here == pytest.approx(there, abs=within)
