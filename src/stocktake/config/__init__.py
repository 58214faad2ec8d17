"""What every command takes: dataclasses whose field docstrings are the command line's help.

Ground floor: imports nothing heavy, so that `stocktake COMMAND --help` answers at once. A command's config
inherits the fields that it shares with others; the ladder's config is every rung's config at once.
"""

from stocktake.config.aws import JobConfig, JobsConfig, RemoteTrialConfig
from stocktake.config.data import BinsConfig, DataConfig, S3Config, SplitConfig, SyntheticConfig
from stocktake.config.runs import (
    CompareConfig,
    EdaConfig,
    EvaluateConfig,
    ImageConfig,
    RunConfig,
    SyncConfig,
    TrackingConfig,
)
from stocktake.config.serving import DeployConfig, PredictConfig, ServeConfig
from stocktake.config.training import (
    ClassicalConfig,
    DdpConfig,
    FinetuneConfig,
    FrozenConfig,
    HeadConfig,
    LadderConfig,
    MajorityConfig,
    NetworkConfig,
    PcaSvmConfig,
    TrainingConfig,
    TuneConfig,
)
from stocktake.config.versions import (
    GateConfig,
    ModelConfig,
    PromoteConfig,
    RegisterConfig,
    RegistryConfig,
    RollbackConfig,
)

__all__ = [
    "BinsConfig",
    "ClassicalConfig",
    "CompareConfig",
    "DataConfig",
    "DdpConfig",
    "DeployConfig",
    "EdaConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "FrozenConfig",
    "GateConfig",
    "HeadConfig",
    "ImageConfig",
    "JobConfig",
    "JobsConfig",
    "LadderConfig",
    "MajorityConfig",
    "ModelConfig",
    "NetworkConfig",
    "PcaSvmConfig",
    "PredictConfig",
    "PromoteConfig",
    "RegisterConfig",
    "RegistryConfig",
    "RemoteTrialConfig",
    "RollbackConfig",
    "RunConfig",
    "S3Config",
    "ServeConfig",
    "SplitConfig",
    "SyncConfig",
    "SyntheticConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TuneConfig",
]
