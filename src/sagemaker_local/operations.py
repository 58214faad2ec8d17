"""What of SageMaker is emulated: a table of operations and their parameters. Everything else is refused with 501."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from moto.core.common_models import CloudFormationModel
from moto.core.common_types import TYPE_RESPONSE
from moto.core.responses import ActionResult, BaseResponse
from moto.core.utils import camelcase_to_underscores
from moto.sagemaker import models
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local import endpoints, invocations, permissions, training_jobs, transform_jobs, tuning_jobs
from sagemaker_local.context import EmulatorContext
from sagemaker_local.refusals import error_response
from sagemaker_local.service_model import check_request, without_empty_structures

_CODE = "NotEmulated"
_ANY: Any = None


def _any(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), _ANY)


_MODES = ("File", "FastFile")
_SOURCE = _any("S3Uri") | {
    "S3DataType": ("S3Prefix",),
    "S3DataDistributionType": ("FullyReplicated", "ShardedByS3Key"),
}
_TRAINING = _any(
    "RoleArn CheckpointConfig Environment EnableNetworkIsolation EnableManagedSpotTraining VpcConfig "
    "EnableInterContainerTrafficEncryption"
) | {
    "AlgorithmSpecification": _any(
        "TrainingImage MetricDefinitions EnableSageMakerMetricsTimeSeries ContainerEntrypoint ContainerArguments"
    )
    | {"TrainingInputMode": _MODES},
    "InputDataConfig": _any("ChannelName ContentType")
    | {
        "DataSource": {"S3DataSource": _SOURCE},
        "InputMode": _MODES,
        "CompressionType": ("None",),
        "RecordWrapperType": ("None",),
    },
    "OutputDataConfig": _any("S3OutputPath KmsKeyId") | {"CompressionType": ("GZIP",)},
    "ResourceConfig": _any("InstanceType InstanceCount VolumeSizeInGB VolumeKmsKeyId KeepAlivePeriodInSeconds"),
    "StoppingCondition": _any("MaxRuntimeInSeconds MaxWaitTimeInSeconds"),
}
_RANGE = _any("Name MinValue MaxValue") | {"ScalingType": ("Auto", "Linear", "Logarithmic")}
_TUNING = _any("HyperParameterTuningJobObjective StrategyConfig TrainingJobEarlyStoppingType RandomSeed") | {
    "Strategy": ("Bayesian", "Random", "Hyperband"),
    "ResourceLimits": _any("MaxNumberOfTrainingJobs MaxParallelTrainingJobs"),
    "ParameterRanges": _any("CategoricalParameterRanges")
    | {"IntegerParameterRanges": _RANGE, "ContinuousParameterRanges": _RANGE},
}
_CONTAINER = _any("Image ModelDataUrl Environment ContainerHostname") | {
    "Mode": ("SingleModel",),
    "ModelDataSource": {
        "S3DataSource": _any("S3Uri CompressionType") | {"S3DataType": ("S3Prefix", "S3Object")},
    },
}
_FILTERS = _any(
    "NameContains StatusEquals CreationTimeAfter CreationTimeBefore LastModifiedTimeAfter LastModifiedTimeBefore "
    "SortBy SortOrder MaxResults NextToken"
)
EMULATED: dict[str, Any] = {
    "CreateTrainingJob": _TRAINING | _any("TrainingJobName HyperParameters Tags"),
    "ListTrainingJobs": _FILTERS,
    "CreateHyperParameterTuningJob": _any("HyperParameterTuningJobName WarmStartConfig Tags")
    | {
        "HyperParameterTuningJobConfig": _TUNING,
        "TrainingJobDefinition": _TRAINING | _any("StaticHyperParameters"),
    },
    "ListHyperParameterTuningJobs": _FILTERS,
    "ListTrainingJobsForHyperParameterTuningJob": _FILTERS | _any("HyperParameterTuningJobName"),
    "CreateTransformJob": _any(
        "TransformJobName ModelName MaxConcurrentTransforms ModelClientConfig MaxPayloadInMB BatchStrategy "
        "Environment TransformOutput Tags"
    )
    | {
        "TransformInput": _any("ContentType")
        | {
            "DataSource": {"S3DataSource": _SOURCE},
            "CompressionType": ("None",),
            "SplitType": ("None", "Line"),
        },
        "TransformResources": _any("InstanceType VolumeKmsKeyId") | {"InstanceCount": (1,)},
    },
    "ListTransformJobs": _FILTERS,
    "CreateModel": _any("ModelName ExecutionRoleArn Tags VpcConfig")
    | {"PrimaryContainer": _CONTAINER, "Containers": _CONTAINER},
    "ListModels": {},
    "CreateEndpointConfig": _any("EndpointConfigName Tags KmsKeyId")
    | {
        "ProductionVariants": _any(
            "VariantName ModelName InstanceType InitialInstanceCount InitialVariantWeight VolumeSizeInGB"
        )
        | {"ServerlessConfig": _any("MemorySizeInMB MaxConcurrency")},
    },
    "ListEndpointConfigs": _FILTERS,
    "CreateEndpoint": _any("EndpointName EndpointConfigName Tags"),
    "ListEndpoints": _FILTERS,
    "UpdateEndpoint": _any("EndpointName EndpointConfigName RetainAllVariantProperties"),
    "UpdateEndpointWeightsAndCapacities": _any("EndpointName")
    | {"DesiredWeightsAndCapacities": _any("VariantName DesiredWeight DesiredInstanceCount")},
} | _any(
    "DescribeTrainingJob StopTrainingJob DescribeHyperParameterTuningJob StopHyperParameterTuningJob "
    "DescribeTransformJob StopTransformJob DescribeModel DeleteModel DescribeEndpointConfig DeleteEndpointConfig "
    "DescribeEndpoint DeleteEndpoint AddTags ListTags DeleteTags"
)
"""Operation -> parameters: _ANY takes every value, a tuple these values, a mapping these members.

Without effect on one machine, and so taken as they are: KMS keys, VPCs, traffic encryption, instance types, volume
sizes, keep-alive periods.
"""


def install(context: EmulatorContext) -> None:
    """Put this package's operations in the place of moto's, and take away what is not emulated."""
    endpoints.install(context)
    invocations.install()
    permissions.install(context)
    own = training_jobs.operations(context) | tuning_jobs.operations(context) | transform_jobs.operations(context)
    own |= endpoints.operations()
    emulated = {camelcase_to_underscores(action): action for action in EMULATED}
    inherited = set(dir(BaseResponse))
    for name in [name for name in vars(SageMakerResponse) if name not in inherited and not name.startswith("_")]:
        if name not in emulated and callable(getattr(SageMakerResponse, name)):
            delattr(SageMakerResponse, name)
    for name, action in emulated.items():
        setattr(SageMakerResponse, name, _checked(action, own.get(name) or getattr(SageMakerResponse, name)))
    for resource in [*_resources()]:
        _check_in_stacks(resource)
    _refuse_what_is_missing()


def _resources() -> Iterator[type[CloudFormationModel]]:
    """Yield moto's resources of SageMaker in stacks."""
    for value in vars(models).values():
        if isinstance(value, type) and issubclass(value, CloudFormationModel) and value is not CloudFormationModel:
            yield value


def _check_in_stacks(resource: type[CloudFormationModel]) -> None:
    """Hold the properties of a stack's resource against the table, as parameters of its Create operation."""
    create = resource.create_from_cloudformation_json
    action = f"Create{resource.cloudformation_type().rpartition('::')[2]}"

    def create_checked(name: str, template: dict[str, Any], *rest: Any, **named: Any) -> Any:
        unsupported = _first_unsupported(action, template.get("Properties", {}))
        if unsupported is not None:
            raise ValidationError(message=unsupported)
        return create(name, template, *rest, **named)

    setattr(resource, create.__name__, staticmethod(create_checked))


def _first_unsupported(action: str, request: dict[str, Any]) -> str | None:
    if action not in EMULATED:
        return f"{action} is not emulated by sagemaker-local"
    parameter = next(_unsupported(EMULATED[action], request, ""), None)
    return None if parameter is None else f"{action}'s {parameter} is not emulated by sagemaker-local"


def _checked(action: str, method: Callable[[SageMakerResponse], ActionResult]) -> Callable[[SageMakerResponse], Any]:
    """Hold requests against the service model's limits and the table before they are carried out."""

    def operation(response: SageMakerResponse) -> ActionResult | TYPE_RESPONSE:
        check_request(action, response.params)
        if (unsupported := _first_unsupported(action, response.params)) is not None:
            return _not_emulated(response, unsupported)
        result = method(response)
        return (
            ActionResult(without_empty_structures(action, result.result)) if isinstance(result.result, dict) else result
        )

    return operation


def _unsupported(supported: Any, value: Any, path: str) -> Iterator[str]:
    """Yield every parameter of a request that the table lacks, with its path."""
    if supported is _ANY or value is None:
        return
    if isinstance(value, list):
        for member in value:
            yield from _unsupported(supported, member, path)
    elif isinstance(supported, tuple):
        if value not in supported:
            yield f"{path} {value} (only {', '.join(map(str, supported))})"
    else:
        for name, member in value.items():
            inner = f"{path}.{name}" if path else name
            if name in supported:
                yield from _unsupported(supported[name], member, inner)
            elif member not in (None, False, [], {}):
                yield inner


def _not_emulated(response: BaseResponse, message: str) -> TYPE_RESPONSE:
    """Answer with 501, which no client repeats."""
    logging.getLogger(__name__).warning("%s", message)
    headers, body = error_response(response.headers, _CODE, message)
    return 501, headers | {"status": "501"}, body


def _refuse_what_is_missing() -> None:
    """Let moto answer operations that it lacks, of whatever service, with 501 instead of a traceback."""
    call = BaseResponse.call_action

    def call_action(response: BaseResponse) -> TYPE_RESPONSE:
        try:
            return call(response)
        except NotImplementedError:
            action = response._get_action()
            return _not_emulated(response, f"{response.service_name}'s {action} is not emulated by sagemaker-local")

    setattr(BaseResponse, call.__name__, call_action)
