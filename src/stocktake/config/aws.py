"""Jobs on AWS."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from stocktake.config.runs import TrackingConfig
from stocktake.config.settings import Settings
from stocktake.config.training import AnyStageConfig, StageName
from stocktake.errors import StocktakeError


@dataclass
class JobConfig(Settings):
    """Run the command of a training job's hyperparameters: what a training container starts.

    Examples:
        stocktake job
    """

    base: str | None = None
    """Folder with input/, output/, model/ and checkpoints/. Default: SAGEMAKER_BASE_DIR, else /opt/ml."""


@dataclass
class JobsConfig(Settings):
    """List SageMaker training and tuning jobs; follow one and collect its results; stop one.

    Examples:
        stocktake jobs
        stocktake jobs --follow stocktake-finetune-20260131-101502-1a2b3c
        stocktake jobs --follow stocktake-tune-260131-101502-1a2
        stocktake jobs --stop stocktake-finetune-20260131-101502-1a2b3c
    """

    follow: str | None = None
    """Name of a job: show its log and state until it ends, then bring its results into its MLflow run. Of a tuning
    job every trial becomes a child run."""
    stop: str | None = None
    """Name of a job: end it, and collect what it has."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    """How many to list, newest first."""
    region: str | None = None
    """AWS region. Default: AWS_DEFAULT_REGION, or the profile's."""
    workspace: str = "workspace"
    """Run folders are collected to runs/ in here."""
    bucket_owner: str | None = None
    """Account that must own the bucket of the job's results: S3 refuses to give them out if another one does."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.follow and self.stop:
            raise StocktakeError("--follow and --stop exclude each other: --stop follows the job to its end too")


@dataclass
class RemoteTrialConfig(AnyStageConfig):
    """Train one trial of a search without its study, never looking at test: what a tuning job's containers start.

    Examples:
        stocktake remote_trial --stage frozen --root ../bins --image_size 96 --tracking.offline true
    """

    stage: StageName = "finetune"
    """What is trained."""
