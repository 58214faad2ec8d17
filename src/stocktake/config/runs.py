"""Tracked runs, and what looks at them afterwards."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from stocktake.config.data import BinsConfig
from stocktake.config.settings import Settings


@dataclass
class TrackingConfig(Settings):
    """Where runs are logged."""

    uri: str | None = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    registry_uri: str | None = None
    """MLflow registry URI. Default: MLFLOW_REGISTRY_URI, else the tracking URI."""
    experiment: str = field(default_factory=lambda: os.environ.get("MLFLOW_EXPERIMENT_NAME") or "stocktake")
    """MLflow experiment. Default: MLFLOW_EXPERIMENT_NAME, else stocktake. A run that `mlflow run` opened
    stays in that run's experiment."""
    run_name: str | None = None
    """Name of the run. Default: the command's name."""
    model_name: str = "stocktake"
    """Name of the registered model."""
    offline: bool = False
    """Write to disk only; `stocktake sync` uploads later."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of the run."""


@dataclass
class RunConfig(BinsConfig):
    """A tracked run over bins."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EdaConfig(RunConfig):
    """Explore the bins: a tracked run with figures and one self-contained HTML page.

    Examples:
        stocktake eda --root ../bins --task 0-5
    """


@dataclass
class ImageConfig(RunConfig):
    """A run of a model over photos of one size."""

    image_size: Annotated[int, Field(ge=8, le=2048)] = 128
    """Side of the square that a photo is resized to, in pixels."""


@dataclass
class EvaluateConfig(RunConfig):
    """Evaluate a registered or saved model on a split of any root.

    Examples:
        stocktake evaluate --model models:/stocktake@candidate --root ../bins --on test
        stocktake evaluate --model models:/stocktake@champion --root ../other-warehouse --on all
    """

    model: str = "models:/stocktake/latest"
    """models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model, or a model folder."""
    on: Literal["train", "val", "test", "all"] = "test"
    """The split to evaluate on; all: every bin, of a root that the model has not seen."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """What to do with bins that the model, or one that it started from, was trained on: refuse to evaluate, or leave
    them out."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Photos a step."""


@dataclass
class CompareConfig(Settings):
    """The leaderboard of an experiment: in the terminal, as HTML and as CSV.

    Examples:
        stocktake compare
        stocktake compare --stage finetune --best 10
    """

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    workspace: str = "workspace"
    """The leaderboard is written to compare/ in here."""
    output: str | None = None
    """Folder for leaderboard.html and leaderboard.csv. Default: WORKSPACE/compare."""
    stage: str | None = None
    """Only runs of this stage: majority, classical, frozen, finetune, ..."""
    best: Annotated[int, Field(ge=1)] = 50
    """How many runs to show at most, best val/macro_f1 first."""


@dataclass
class SyncConfig(Settings):
    """Upload runs that a tracking server could not take when they ran.

    Examples:
        stocktake sync
        stocktake sync --tracking.uri http://host:5000
    """

    workspace: str = "workspace"
    """Folder whose runs/ are uploaded."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
