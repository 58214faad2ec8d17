"""Versions of a registered model, and the gate between them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from stocktake.config.runs import TrackingConfig
from stocktake.config.settings import Settings
from stocktake.errors import StocktakeError


@dataclass
class GateConfig(Settings):
    """What a challenger has to show before it becomes the champion."""

    min_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """The gain over the champion in the metric on test: the lower end of its paired one-sided interval, whose level
    shrinks with the uses of the test split, must be above this."""
    max_recall_drop: Annotated[float, Field(ge=0, le=1)] = 0.10
    """No quantity's recall on test may fall by more than this: refused when the paired 95 % interval lies above it."""
    max_latency_ms: Annotated[float, Field(ge=0)] = 100.0
    """One photo's median milliseconds on this machine must be below this."""
    max_size_mb: Annotated[float, Field(ge=0)] = 200.0
    """The model's megabytes must be below this."""
    metric: Literal["macro_f1", "rmse", "rmse_expected"] = "macro_f1"
    """What the gain is measured in. rmse, in items: of the served quantity; rmse_expected: of the rounded mean of the
    served probabilities. Lower is better there."""


@dataclass
class ModelConfig(Settings):
    """A registered model, and where it is registered."""

    model_name: str | None = None
    """Name of the registered model. Default: --tracking.model_name."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name is not None:
            self.tracking.model_name = self.model_name
        name = self.tracking.model_name
        if not name.strip() or set(name) & set("/:"):
            raise StocktakeError(f"--model_name {name!r} must be a name without / and :")


@dataclass
class RegisterConfig(ModelConfig):
    """Make a finished run's model a version, with the alias candidate and a model card.

    Examples:
        stocktake register --run workspace/runs/frozen-1a2b3c
        stocktake register --run frozen-wide
    """

    run: str | None = None
    """Which run: its id, its name in the experiment, or its folder (workspace/runs/frozen-1a2b3c)."""
    workspace: str = "workspace"
    """Run folders are looked for in runs/, and model cards written to registry/ in here."""


@dataclass
class PromoteConfig(ModelConfig):
    """Make a version the challenger and, if the gate lets it pass, the champion.

    Examples:
        stocktake promote
        stocktake promote --version 3 --gate.min_gain 0.01 --gate.max_latency_ms 20
        stocktake promote --version 3 --gate.metric rmse
        stocktake promote --version 3 --to challenger
        stocktake promote --version 3 --force --reason urgent
    """

    version: str = "candidate"
    """Which version: its number, or an alias (candidate, challenger)."""
    to: Literal["champion", "challenger"] = "champion"
    """champion: through the gate. challenger: no gate."""
    gate: GateConfig = field(default_factory=GateConfig)
    force: bool = False
    """Promote what the gate refuses; needs --reason."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """What to do with test bins that the version or the champion, or a model that they started from, was trained on:
    refuse to compare, or leave them out."""
    reason: str | None = None
    """Why, for the history."""
    workspace: str = "workspace"
    """Model cards are written to registry/ in here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.force and not (self.reason or "").strip():
            raise StocktakeError("--force needs --reason TEXT: the history keeps why the gate was overruled")


@dataclass
class RollbackConfig(ModelConfig):
    """Make the champion before this one the champion again.

    Examples:
        stocktake rollback --reason drift
    """

    reason: str | None = None
    """Why, for the history."""
    workspace: str = "workspace"
    """Model cards are written to registry/ in here."""


@dataclass
class RegistryConfig(ModelConfig):
    """List the versions of a model, with their aliases and figures, and the history of promotions.

    Examples:
        stocktake registry
        stocktake registry --format json
    """

    format: Literal["table", "json"] = "table"
    """table: for people. json: for programs."""
