"""The one place where requests for training and tuning jobs are put together, and checked by AWS's own rules."""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from stocktake.aws.parameters import Parameters
from stocktake.aws.settings import JobSettings
from stocktake.errors import StocktakeError
from stocktake.tracking.attached_run import VARIABLE

PREFIX = "stocktake-"
"""Begins the names of our jobs."""
TUNING_NAME = rf"{PREFIX}tune-\d{{6}}-\d{{6}}-[0-9a-f]{{3}}"
"""Tuning jobs' names; those of their training jobs go on with a hyphen and a number."""
BINS, CODE, FILES = "bins", "code", "files"
ROOT, RUN = "STOCKTAKE_ROOT", VARIABLE
GIVEN = {"root": ROOT, "list": "STOCKTAKE_LIST", "weights": "STOCKTAKE_WEIGHTS"}
"""Settings that are paths, and the variables by which a job knows them as whoever has started it does."""
HOSTS = "STOCKTAKE_HOSTS"
# What deploy/images/training/train does in an image of ours: this way a job runs in any image with Python.
_START = (
    "d=${SAGEMAKER_BASE_DIR:-/opt/ml}; mkdir -p $d/code && tar -xzf $d/input/data/code/source.tar.gz -C $d/code "
    "&& exec sh $d/code/deploy/start_job.sh"
)
_OWN_DISK = ("ml.g4dn.", "ml.g5.", "ml.g6", "ml.p4", "ml.p5", "ml.trn")
"""Machines whose local disk is encrypted by itself and takes no key."""
_DEFINITION, _SEARCH = "TrainingJobDefinition.", "HyperParameterTuningJobConfig."
_SETTING = {
    "RoleArn": "role",
    "AlgorithmSpecification.TrainingImage": "image",
    "ResourceConfig.InstanceType": "instance_type",
    "OutputDataConfig.KmsKeyId": "kms_key",
    "VpcConfig.Subnets": "subnets",
    "VpcConfig.SecurityGroupIds": "security_groups",
    "Tags": "tags",
    "HyperParameters": "-P",
    "StaticHyperParameters": "-P",
    f"{_SEARCH}ParameterRanges": "-P space",
    f"{_SEARCH}ResourceLimits.MaxNumberOfTrainingJobs": "-P trials",
    f"{_SEARCH}ResourceLimits.MaxParallelTrainingJobs": "-P workers",
    "WarmStartConfig": "warm_start",
    "Environment": "environment",
}


@dataclass(frozen=True)
class Inputs:
    """Prefixes of what the job reads."""

    code: str
    bins: str | None = None
    files: str | None = None


def job_name(command: str) -> str:
    """A name that no other job has: stocktake-finetune-20260131-101502-1a2b3c."""
    moment = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return f"{PREFIX}{command}-{moment}-{secrets.token_hex(3)}"


def training_job(
    name: str,
    settings: JobSettings,
    parameters: Parameters,
    inputs: Inputs,
    *,
    run_id: str,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """What `create_training_job` is given.

    Args:
        name: of the job.
        settings: where and how it runs.
        parameters: the command.
        inputs: where its inputs lie.
        run_id: MLflow's run, which the job goes on in.
        tracking_uri: as the job reaches it; None where it cannot.

    Raises:
        StocktakeError: AWS would refuse it; names the setting.
    """
    variables = {RUN: run_id}
    if tracking_uri is not None and not settings.network_isolation:
        variables["MLFLOW_TRACKING_URI"] = tracking_uri
    request = definition(settings, parameters, inputs, variables) | {
        "TrainingJobName": name,
        "HyperParameters": parameters.hyperparameters,
        "CheckpointConfig": {"S3Uri": f"{settings.place}/checkpoints/{name}"},
        "Tags": tags_of(settings, parameters),
    }
    request["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["/bin/sh", "-c"], "ContainerArguments": [_START]}
    check_request(request)
    return request


def definition(
    settings: JobSettings, parameters: Parameters, inputs: Inputs, variables: Mapping[str, str]
) -> dict[str, Any]:
    """What a training job is, whether it is asked for alone or by a tuning job."""
    own = {HOSTS: str(settings.instance_count), "PYTHONUNBUFFERED": "1", **variables}
    own |= {GIVEN[name]: path for name, path in parameters.given_paths.items()}
    kms = settings.kms_key
    resources: dict[str, Any] = {
        "InstanceType": settings.instance_type,
        "InstanceCount": settings.instance_count,
        "VolumeSizeInGB": settings.volume_gb,
    }
    if kms and not settings.instance_type.startswith(_OWN_DISK):
        resources["VolumeKmsKeyId"] = kms
    if settings.keep_alive_seconds:
        resources["KeepAlivePeriodInSeconds"] = settings.keep_alive_seconds
    stopping = {"MaxRuntimeInSeconds": settings.max_run_seconds}
    if settings.wait_seconds:
        stopping["MaxWaitTimeInSeconds"] = settings.wait_seconds
    defined: dict[str, Any] = {
        "RoleArn": settings.role,
        "AlgorithmSpecification": {"TrainingImage": settings.image, "TrainingInputMode": "File"},
        "Environment": own | settings.environment,
        "InputDataConfig": [_channel(channel, prefix) for channel, prefix in _channels(inputs)],
        "OutputDataConfig": {"S3OutputPath": f"{settings.place}/jobs", **({"KmsKeyId": kms} if kms else {})},
        "ResourceConfig": resources,
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": settings.spot,
        "EnableNetworkIsolation": settings.network_isolation,
    }
    if settings.subnets:
        defined["VpcConfig"] = {"Subnets": settings.subnets, "SecurityGroupIds": settings.security_groups}
    return defined


def tags_of(settings: JobSettings, parameters: Parameters) -> list[dict[str, str]]:
    """Of a job."""
    own = {"stocktake": parameters.command} | settings.tags
    return [{"Key": key, "Value": value} for key, value in own.items()]


def check_request(request: Mapping[str, Any], operation: str = "CreateTrainingJob") -> None:
    """Raises StocktakeError for what AWS's description of the operation does not allow, before anything is sent."""
    for where, what in _faults(_shape(operation), request, ""):
        where = where.removeprefix(_DEFINITION)
        setting = next((ours for theirs, ours in _SETTING.items() if where.startswith(theirs)), None)
        named = f"backend config: {setting}" if setting else where
        if setting == "-P":
            named = f"-P {where.partition('.')[2]}" if "." in where else "-P"
        elif setting and setting.startswith("-P "):
            named = setting
        raise StocktakeError(f"{named}: {what}")


def _channels(inputs: Inputs) -> Iterator[tuple[str, str]]:
    yield CODE, inputs.code
    if inputs.bins:
        yield BINS, inputs.bins
    if inputs.files:
        yield FILES, inputs.files


def _channel(name: str, prefix: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": prefix, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


@cache
def _shape(operation: str) -> Any:
    import botocore.session

    model = botocore.session.get_session().get_service_model("sagemaker")
    return model.operation_model(operation).input_shape


def _faults(shape: Any, value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Where the value leaves the shape, and how. botocore itself looks at types only."""
    rules, kind = shape.metadata, shape.type_name
    if kind in ("string", "list", "map"):
        least, most = rules.get("min", 0), rules.get("max", float("inf"))
        if not least <= len(value) <= most:
            unit = "characters" if kind == "string" else "entries"
            yield where, f"{_short(value)} has {len(value)} {unit}: from {least} to {most:g} are allowed"
    elif kind in ("integer", "long") and not rules.get("min", value) <= value <= rules.get("max", value):
        yield where, f"{value} must be from {rules.get('min')} to {rules.get('max')}"
    if kind == "string":
        if "enum" in rules and value not in rules["enum"]:
            yield where, f"{value!r} is none of AWS's{_close(value, rules['enum'])}"
        pattern = rules.get("pattern", "")
        if pattern and "\\p{" not in pattern and not re.fullmatch(pattern, value, re.DOTALL):
            yield where, f"{_short(value)} is not of the form {pattern}"
    elif kind == "structure":
        for name, part in value.items():
            yield from _faults(shape.members[name], part, f"{where}.{name}" if where else name)
    elif kind == "list":
        for part in value:
            yield from _faults(shape.member, part, where)
    elif kind == "map":
        for name, part in value.items():
            yield from _faults(shape.key, name, f"{where}.{name}")
            yield from _faults(shape.value, part, f"{where}.{name}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _close(value: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(value, known, 1)
    return f": did you mean {close[0]}?" if close else ""
