"""Versions of a registered model, and the gate between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stocktake.config.bound import bound
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError


@dataclass
class GateConfig:
    """What a challenger has to show before it becomes the champion."""

    min_gain: float = 0.0
    """The gain in test macro-F1 over the champion: the lower end of its paired 95 % interval must be above this."""
    max_recall_drop: float = 0.10
    """No quantity's recall on test may fall by more than this."""
    max_latency_ms: float = 100.0
    """One photo's median milliseconds on this machine must be below this."""
    max_size_mb: float = 200.0
    """The model's megabytes must be below this."""

    def __post_init__(self) -> None:
        bound(self, "min_gain", least=-1, most=1, option="gate.")
        bound(self, "max_recall_drop", least=0, most=1, option="gate.")
        bound(self, "max_latency_ms", least=0, option="gate.")
        bound(self, "max_size_mb", least=0, option="gate.")


@dataclass
class ModelConfig:
    """A registered model, and where it is registered."""

    model_name: str | None = None
    """Name of the registered model. Default: --tracking.model_name."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model_name is not None:
            self.tracking.model_name = self.model_name
        name = self.tracking.model_name
        if not name.strip() or set(name) & set("/:"):
            raise StocktakeError(f"--model_name {name!r} must be a name without / and :")


@dataclass
class RegisterConfig(ModelConfig):
    """Make a finished run's model a version, with the alias candidate and a model card."""

    run: str | None = None
    """Which run: its id, its name in the experiment, or its folder (workspace/runs/frozen-1a2b3c)."""
    workspace: str = "workspace"
    """Run folders are looked for in runs/, and model cards written to registry/ in here."""


@dataclass
class PromoteConfig(ModelConfig):
    """Make a version the challenger and, if the gate lets it pass, the champion."""

    version: str = "candidate"
    """Which version: its number, or an alias (candidate, challenger)."""
    to: Literal["champion", "challenger"] = "champion"
    """champion: through the gate. challenger: no gate."""
    gate: GateConfig = field(default_factory=GateConfig)
    force: bool = False
    """Promote what the gate refuses; needs --reason."""
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
    """Make the champion before this one the champion again."""

    reason: str | None = None
    """Why, for the history."""
    workspace: str = "workspace"
    """Model cards are written to registry/ in here."""


@dataclass
class RegistryConfig(ModelConfig):
    """List the versions of a model, with their aliases and figures, and the history of promotions."""

    format: Literal["table", "json"] = "table"
    """table: for people. json: for programs."""
