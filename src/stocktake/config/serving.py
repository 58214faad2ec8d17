"""Servers, endpoints and counts."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from stocktake.config.data import BinsConfig
from stocktake.config.runs import TrackingConfig
from stocktake.config.settings import Settings


@dataclass
class ServeConfig(Settings):
    """Serve a model over HTTP in the foreground, until Ctrl-C.

    Examples:
        stocktake serve
        stocktake serve --model workspace/runs/frozen-1a2b3c/model --server.port 0 --server.page true
    """

    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    settings: str = "deploy/local.yaml"
    """YAML of the server's settings; none at this default place: the server's own defaults."""
    server: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Single settings over those of the file: --server.port 0 --server.workers 2. `serve --help` explains them."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class DeployConfig(BinsConfig):
    """Deploy a model as an endpoint, or update it, and compare its answers with the model's own.

    Examples:
        stocktake deploy --root ../bins
        stocktake deploy --model models:/stocktake/3 --name trial --server.port 0 --server.workers 2
    """

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
    smoke: Annotated[int, Field(ge=0, le=10_000)] = 16
    """Photos of the root's test split to compare; 0: none."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.02
    """How far a probability may lie from the model's own."""
    on_failure: Literal["rollback", "keep"] = "rollback"
    """After a failed comparison. rollback: an update is undone; a new endpoint stays. keep: an update stays too."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PredictConfig(Settings):
    """Count photos: files, folders, or the rows of a CSV, whose recorded quantities are checked.

    Examples:
        stocktake predict shelf.jpg
        stocktake predict photos/ --endpoint bins --format jsonl --output counts.jsonl
        stocktake predict records.csv --model models:/stocktake/3 --format csv
    """

    photos: list[str] | str = field(default_factory=list)
    """Photos, folders with photos, or CSV files with a column photo or path; named before the options."""
    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    endpoint: str | None = None
    """Ask this endpoint instead: its name on this machine, or its address (http://host:port)."""
    format: Literal["table", "csv", "json", "jsonl"] = "table"
    """table: for people. The others: for programs."""
    output: str | None = None
    """File to write. Default: the terminal."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.photos, str):
            self.photos = [self.photos]
