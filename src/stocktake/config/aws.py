"""Jobs on AWS, and the local AWS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stocktake.config.bound import bound
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import ClassicalConfig, DdpConfig, FrozenConfig
from stocktake.errors import StocktakeError


@dataclass
class RehearseConfig:
    """A local AWS whose jobs train and whose endpoints answer, in the foreground, until Ctrl-C."""

    port: int = 0
    """Of 127.0.0.1; 0: any free one."""
    region: str = "us-east-1"
    """The region that it plays."""
    state: str | None = None
    """Folder for what containers write; emptied at the end. Default: the system's temporary folder."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL when a container is stopped; AWS gives 120."""
    startup: float = 60.0
    """Seconds that a model server may take until it answers /ping."""
    images: dict[str, str] = field(default_factory=dict)
    """What images start with, as their ENTRYPOINT: '{"*/mine:*": "python -m mine"}'. SageMaker adds train or serve."""

    def __post_init__(self) -> None:
        bound(self, "port", least=0, most=65535)
        bound(self, "grace", least=0, most=120)
        bound(self, "startup", least=1, most=3600)


@dataclass
class JobConfig:
    """Run the command of a training job's hyperparameters: what a training container starts."""

    base: str | None = None
    """Folder with input/, output/, model/ and checkpoints/. Default: SAGEMAKER_BASE_DIR, else /opt/ml."""


@dataclass
class JobsConfig:
    """List SageMaker training and tuning jobs; follow one and bring its results home; stop one."""

    follow: str | None = None
    """Name of a job: show its log and state until it ends, then bring its results into its MLflow run. Of a tuning
    job every trial becomes a child run."""
    stop: str | None = None
    """Name of a job: end it, and bring home what it has."""
    limit: int = 20
    """How many to list, newest first."""
    region: str | None = None
    """AWS region. Default: AWS_DEFAULT_REGION, or the profile's."""
    workspace: str = "workspace"
    """Run folders come home to runs/ in here."""
    prices: str = "deploy/prices.yaml"
    """YAML with what machines cost."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        bound(self, "limit", least=1, most=1000)
        if self.follow and self.stop:
            raise StocktakeError("--follow and --stop exclude each other: --stop follows the job to its end too")


@dataclass
class RemoteTrialConfig(DdpConfig, FrozenConfig, ClassicalConfig):
    """Train one trial of a search without its study, never looking at test: what a tuning job's containers start."""

    stage: Literal["finetune", "frozen", "classical"] = "finetune"
    """What is trained."""
    nproc: int = 1
    """Processes on each machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nproc * self.nnodes > 1 and self.stage != "finetune":
            raise StocktakeError(f"--stage {self.stage}: only finetune trains in several processes")
