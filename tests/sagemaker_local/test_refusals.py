"""What is refused: of a training job what AWS refuses, and what is not emulated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import EmulatedAws

pytestmark = pytest.mark.aws
PLAN = "arn:aws:sagemaker:us-east-1:123456789012:training-plan/p"
RESOURCES = {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TrainingJobName": "under_score"}, "'trainingJobName' failed to satisfy constraint: .* pattern"),
        ({"TrainingJobName": "n" * 64}, "'trainingJobName' .* length less than or equal to 63"),
        ({"RoleArn": "arn:aws:iam::123456789012:user/someone"}, "'roleArn' .* pattern"),
        ({"RoleArn": "arn:aws:iam::123456789012:role/nobody"}, "Could not assume role"),
        ({"ResourceConfig": {**RESOURCES, "InstanceType": "ml.m5.tiny"}}, "'resourceConfig.instanceType' .* enum"),
        ({"ResourceConfig": {"InstanceCount": 1, "VolumeSizeInGB": 1}}, "Value null at 'resourceConfig.instanceType'"),
        ({"HyperParameters": {f"p{n}": "1" for n in range(101)}}, "'hyperParameters' .* less than or equal to 100"),
        ({"HyperParameters": {"k" * 257: "1"}}, "'hyperParameters' .* length less than or equal to 256"),
        ({"HyperParameters": {"key": "v" * 2501}}, "'hyperParameters.key.member' .* length less than or equal to 2500"),
        ({"Environment": {"not a name": "1"}}, "'environment' .* pattern"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 9, "MaxWaitTimeInSeconds": 9}}, "MaxWaitTimeInSeconds"),
        ({"EnableManagedSpotTraining": True}, "Invalid MaxWaitTimeInSeconds"),
        ({"OutputDataConfig": {"S3OutputPath": "s3://no-such-bucket/out"}}, "bucket of s3://no-such-bucket/out"),
        ({"AlgorithmSpecification": {"MetricDefinitions": [{"Name": "m", "Regex": "("}]}}, "regular expression"),
        ({"AlgorithmSpecification": {"ContainerArguments": ["a" * 257]}}, "containerArguments.* equal to 256"),
        ({"CheckpointConfig": {"S3Uri": "s3://b/c", "LocalPath": "/opt/mlx"}}, "LocalPath"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_a_training_job_is_refused(emulator: EmulatedAws, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message) as refused:
        emulator.train("refused", "true", **changes)
    assert refused.value.response["Error"]["Code"] == "ValidationException"
    with pytest.raises(ClientError, match=r"not found|validation error"):
        emulator.job(changes.get("TrainingJobName", "refused"))


def test_missing_objects_and_duplicates_are_refused(emulator: EmulatedAws) -> None:
    for prefix in ("s3://no-such-bucket/a", f"s3://{emulator.bucket}/no-such-prefix"):
        source = {"S3DataType": "S3Prefix", "S3Uri": prefix}
        channel = {"ChannelName": "train", "DataSource": {"S3DataSource": source}}
        with pytest.raises(ClientError, match=f'No S3 objects found under S3 URL "{prefix}"'):
            emulator.train("no-objects", "true", InputDataConfig=[channel])
    uri = emulator.put("once/a", "a")
    channel = {"ChannelName": "program", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri}}}
    with pytest.raises(ClientError, match="program"):
        emulator.train("two-channels", "true", InputDataConfig=[channel])
    emulator.train("once", "true")
    with pytest.raises(ClientError, match="must be unique") as refused:
        emulator.train("once", "true")
    assert refused.value.response["Error"]["Code"] == "ResourceInUse"
    emulator.ended("once")


def test_jobs_that_are_not_there(emulator: EmulatedAws) -> None:
    sagemaker = emulator.client("sagemaker")
    for operation in (sagemaker.describe_training_job, sagemaker.stop_training_job):
        with pytest.raises(ClientError, match="not found"):
            operation(TrainingJobName="nobody")


def not_emulated(call: Any, **request: Any) -> str:
    """The message of a refusal with 501, which clients do not repeat."""
    with pytest.raises(ClientError) as refused:
        call(**request)
    response = refused.value.response
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 501
    assert response["ResponseMetadata"]["RetryAttempts"] == 0
    assert response["Error"]["Code"] == "NotEmulated"
    return str(response["Error"]["Message"])


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"RetryStrategy": {"MaximumRetryAttempts": 2}}, "RetryStrategy"),
        ({"ExperimentConfig": {"ExperimentName": "e"}}, "ExperimentConfig"),
        ({"AlgorithmSpecification": {"TrainingInputMode": "Pipe"}}, "AlgorithmSpecification.TrainingInputMode"),
        (
            {
                "ResourceConfig": RESOURCES
                | {"TrainingPlanArn": "arn:aws:sagemaker:us-east-1:123456789012:training-plan/p"}
            },
            "ResourceConfig.TrainingPlanArn",
        ),
        ({"OutputDataConfig": {"S3OutputPath": "s3://b/o", "CompressionType": "NONE"}}, "CompressionType"),
        (
            {
                "InputDataConfig": [
                    {
                        "ChannelName": "train",
                        "DataSource": {"S3DataSource": {"S3DataType": "AugmentedManifestFile", "S3Uri": "s3://b/m"}},
                    }
                ]
            },
            "InputDataConfig.DataSource.S3DataSource.S3DataType",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_parameter_that_would_be_ignored_is_refused(
    emulator: EmulatedAws, changes: dict[str, Any], parameter: str
) -> None:
    assert parameter in not_emulated(lambda **request: emulator.train("ignored", "true", **request), **changes)
    with pytest.raises(ClientError, match="not found"):
        emulator.job("ignored")


def test_operations_that_are_not_emulated_are_refused(emulator: EmulatedAws) -> None:
    """moto would take the first two and do nothing, and lacks the third."""
    sagemaker = emulator.client("sagemaker")
    assert "CreatePipeline" in not_emulated(
        sagemaker.create_pipeline, PipelineName="p", PipelineDefinition="{}", RoleArn=emulator.role
    )
    assert "ListProcessingJobs" in not_emulated(sagemaker.list_processing_jobs)
    assert "CreateHubContentReference" in not_emulated(
        sagemaker.create_hub_content_reference,
        HubName="h",
        SageMakerPublicHubContentArn="arn:aws:sagemaker:us-east-1:aws:hub-content/SageMakerPublicHub/Model/m/1.0.0",
    )
    variant = {"VariantName": "only", "ModelName": "m", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
    capture = {
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": "s3://b/c",
        "CaptureOptions": [{"CaptureMode": "Input"}],
    }
    request = {"ProductionVariants": [variant], "DataCaptureConfig": capture}
    create = sagemaker.create_endpoint_config
    assert "DataCaptureConfig" in not_emulated(create, EndpointConfigName="captured", **request)


@pytest.mark.parametrize(
    ("kind", "properties", "refused_part"),
    [
        ("NotebookInstance", {"InstanceType": "ml.t3.medium", "RoleArn": "arn"}, "CreateNotebookInstance"),
        (
            "EndpointConfig",
            {"ProductionVariants": [], "DataCaptureConfig": {"DestinationS3Uri": "s3://b/c"}},
            "DataCap",
        ),
    ],
)
def test_stacks_are_held_against_the_same_table(
    emulator: EmulatedAws, kind: str, properties: dict[str, Any], refused_part: str
) -> None:
    template = json.dumps({"Resources": {"Refused": {"Type": f"AWS::SageMaker::{kind}", "Properties": properties}}})
    with pytest.raises(ClientError, match=refused_part):
        emulator.client("cloudformation").create_stack(StackName=f"refused-{kind}", TemplateBody=template)
    assert emulator.client("sagemaker").list_endpoint_configs(NameContains="refused")["EndpointConfigs"] == []
