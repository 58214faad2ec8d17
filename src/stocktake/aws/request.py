"""The requests for training and tuning jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stocktake.aws.jobs import RUN_VARIABLE, TUNING_RUN_VARIABLE
from stocktake.aws.parameters import Parameters
from stocktake.aws.settings import JobSettings
from stocktake.stages import ROOT

if TYPE_CHECKING:  # it imports optuna
    from stocktake.aws.tuning_spec import TuningSpec

BINS, CODE, FILES = "bins", "code", "files"
"""Input channels."""
ORIGINAL_PATHS = {"root": ROOT, "list": "STOCKTAKE_LIST", "weights": "STOCKTAKE_WEIGHTS"}
"""Settings that are paths, and the variables that hold them as the user gave them."""
INSTANCE_COUNT = "STOCKTAKE_INSTANCE_COUNT"
"""Variable that holds the number of instances that the job asked for."""
METRIC = "val/macro_f1"
_EPOCH_LINE = r"val_macro_f1=([0-9.]+)"
# What deploy/images/training/train does in an image of ours: this way a job runs in any image with Python.
_START = (
    "d=${SAGEMAKER_BASE_DIR:-/opt/ml}; mkdir -p $d/code && tar -xzf $d/input/data/code/source.tar.gz -C $d/code "
    "&& exec sh $d/code/deploy/start_job.sh"
)
_ENCRYPTED_DISK = ("ml.g4dn.", "ml.g5.", "ml.g6", "ml.p4", "ml.p5", "ml.trn")
"""Instances whose local disk is encrypted by itself and takes no key."""


def training_job(
    name: str,
    settings: JobSettings,
    parameters: Parameters,
    inputs: Mapping[str, str],
    *,
    run_id: str,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """The arguments of `create_training_job`.

    Args:
        name: of the job.
        settings: where and how it runs.
        parameters: the command.
        inputs: channel -> its s3:// prefix.
        run_id: MLflow's run, which the job goes on in.
        tracking_uri: as the job reaches it; None where it cannot.
    """
    variables = {RUN_VARIABLE: run_id}
    if tracking_uri is not None and not settings.network_isolation:
        variables["MLFLOW_TRACKING_URI"] = tracking_uri
    request = _definition(settings, parameters, inputs, variables) | {
        "TrainingJobName": name,
        "HyperParameters": parameters.hyperparameters,
        "CheckpointConfig": {"S3Uri": f"{settings.prefix}/checkpoints/{name}"},
        "Tags": _tags(settings, parameters),
    }
    request["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["/bin/sh", "-c"], "ContainerArguments": [_START]}
    return request


def tuning_job(
    name: str,
    settings: JobSettings,
    parameters: Parameters,
    spec: TuningSpec,
    inputs: Mapping[str, str],
    *,
    run_id: str,
) -> dict[str, Any]:
    """The arguments of `create_hyper_parameter_tuning_job`.

    Its training jobs start what the image starts with `train`: a tuning job has no entry point. They log to their
    output only; whoever follows the tuning job uploads it to MLflow, as child runs of `run_id`.
    """
    tuned = {tuning_range["Name"] for ranges in spec.ranges.values() for tuning_range in ranges}
    static = {key: value for key, value in parameters.hyperparameters.items() if key not in tuned}
    definition = _definition(settings, parameters, inputs, {TUNING_RUN_VARIABLE: run_id})
    definition |= {"StaticHyperParameters": static}
    definition["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": METRIC, "Regex": _EPOCH_LINE}]
    if settings.spot:  # all trials share the prefix, each below its own name
        definition["CheckpointConfig"] = {"S3Uri": f"{settings.prefix}/checkpoints/{name}"}
    config: dict[str, Any] = {
        "Strategy": spec.strategy,
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": METRIC},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": spec.trials, "MaxParallelTrainingJobs": spec.workers},
        "ParameterRanges": spec.ranges,
        "TrainingJobEarlyStoppingType": "Auto" if spec.stops_early else "Off",
        "RandomSeed": spec.seed,
    }
    if spec.strategy == "Hyperband":
        config["StrategyConfig"] = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": spec.max_epochs}}
    request: dict[str, Any] = {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": config,
        "TrainingJobDefinition": definition,
        "Tags": _tags(settings, parameters),
    }
    if settings.warm_start:
        request["WarmStartConfig"] = {
            "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": job} for job in settings.warm_start],
            "WarmStartType": settings.warm_start_type,
        }
    return request


def _definition(
    settings: JobSettings, parameters: Parameters, inputs: Mapping[str, str], variables: Mapping[str, str]
) -> dict[str, Any]:
    """What a training job is, whether it is asked for alone or by a tuning job."""
    environment = {INSTANCE_COUNT: str(settings.instance_count), "PYTHONUNBUFFERED": "1", **variables}
    environment |= {ORIGINAL_PATHS[name]: path for name, path in parameters.original_paths.items()}
    kms = settings.kms_key
    resources: dict[str, Any] = {
        "InstanceType": settings.instance_type,
        "InstanceCount": settings.instance_count,
        "VolumeSizeInGB": settings.volume_gb,
    }
    if kms and not settings.instance_type.startswith(_ENCRYPTED_DISK):
        resources["VolumeKmsKeyId"] = kms
    if settings.keep_alive_seconds:
        resources["KeepAlivePeriodInSeconds"] = settings.keep_alive_seconds
    stopping = {"MaxRuntimeInSeconds": settings.max_run_seconds}
    if settings.wait_seconds:
        stopping["MaxWaitTimeInSeconds"] = settings.wait_seconds
    definition: dict[str, Any] = {
        "RoleArn": settings.role,
        "AlgorithmSpecification": {"TrainingImage": settings.image, "TrainingInputMode": "File"},
        "Environment": environment | settings.environment,
        "InputDataConfig": [_channel(channel, prefix) for channel, prefix in inputs.items()],
        "OutputDataConfig": {"S3OutputPath": f"{settings.prefix}/jobs", **({"KmsKeyId": kms} if kms else {})},
        "ResourceConfig": resources,
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": settings.spot,
        "EnableNetworkIsolation": settings.network_isolation,
    }
    if settings.subnets:
        definition["VpcConfig"] = {"Subnets": settings.subnets, "SecurityGroupIds": settings.security_groups}
    return definition


def _channel(name: str, prefix: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": prefix, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def _tags(settings: JobSettings, parameters: Parameters) -> list[dict[str, str]]:
    tags = {"stocktake": parameters.command} | settings.tags
    return [{"Key": key, "Value": value} for key, value in tags.items()]
