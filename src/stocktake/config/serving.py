"""Servers, endpoints and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stocktake.config.bound import bound
from stocktake.config.data import BinsConfig
from stocktake.config.runs import TrackingConfig


@dataclass
class ServeConfig:
    """Serve a model over HTTP in the foreground, until Ctrl-C."""

    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    settings: str = "deploy/local.yaml"
    """YAML of the server's settings; none at this default place: the server's own defaults."""
    server: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Single settings over those of the file: --server.port 0 --server.workers 2. `serve --help` explains them."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class DeployConfig(BinsConfig):
    """Deploy a model as an endpoint, or update it, and compare its answers with the model's own."""

    target: Literal["local"] = "local"
    """local: a server on this machine that outlives the command."""
    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    name: str = "bins"
    """Of the endpoint. One that is there already is updated, without dropping a request."""
    settings: str = "deploy/local.yaml"
    """YAML of the server's settings; none at this default place: the server's own defaults."""
    server: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Single settings over those of the file: --server.port 0 --server.workers 2. `serve --help` explains them."""
    smoke: int = 16
    """Photos of the root's test split to compare; 0: none."""
    tolerance: float = 0.02
    """How far a probability may lie from the model's own."""
    on_failure: Literal["rollback", "keep"] = "rollback"
    """After a failed comparison. rollback: an update is undone; a new endpoint stays. keep: an update stays too."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        bound(self, "smoke", least=0, most=10_000)
        bound(self, "tolerance", least=0, most=1)


@dataclass
class PredictConfig:
    """Count photos: files, folders, or the rows of a CSV, whose recorded quantities are checked."""

    photos: list[str] | str = field(default_factory=list)
    """Photos, folders with photos, or CSV files with a column photo or path; given before the options."""
    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    endpoint: str | None = None
    """Ask this endpoint instead: its name on this machine, or its address (http://host:port)."""
    format: Literal["table", "csv", "json", "jsonl"] = "table"
    """table: for people. The others: for programs."""
    output: str | None = None
    """File to write. Default: the terminal."""
    batch_size: int = 32
    """Photos a step."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if isinstance(self.photos, str):
            self.photos = [self.photos]
        bound(self, "batch_size", least=1, most=4096)
