"""Endpoints: servers behind them, updates, weights, refusals and failures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import EmulatedAws, eventually

pytestmark = pytest.mark.aws


@pytest.fixture
def models(create_model: Callable[..., str]) -> tuple[str, str]:
    """Two models that answer with their names, `alto` and `bass`."""
    return create_model("alto"), create_model("bass")


def create_config(emulator: EmulatedAws, name: str, **weights: float) -> str:
    """An endpoint configuration: model to weight; variants bear the models' names."""
    variants = [
        {
            "VariantName": model,
            "ModelName": model,
            "InstanceType": "ml.c7i.large",
            "InitialInstanceCount": 1,
            "InitialVariantWeight": weight,
        }
        for model, weight in weights.items()
    ]
    emulator.client("sagemaker").create_endpoint_config(EndpointConfigName=name, ProductionVariants=variants)
    return name


def settled(emulator: EmulatedAws, name: str) -> dict[str, Any]:
    """DescribeEndpoint's answer, once nothing is in progress."""
    describe = emulator.client("sagemaker").describe_endpoint
    return eventually(
        lambda: (endpoint := describe(EndpointName=name))["EndpointStatus"] not in ("Creating", "Updating") and endpoint
    )


def invoke(emulator: EmulatedAws, name: str, body: bytes = b"hello", **more: str) -> tuple[str, str]:
    """The answer, and the variant that gave it."""
    answer = emulator.client("sagemaker-runtime").invoke_endpoint(
        EndpointName=name, Body=body, **{"ContentType": "text/plain", **more}
    )
    return answer["Body"].read().decode(), answer["InvokedProductionVariant"]


def test_the_life_of_an_endpoint(
    emulator: EmulatedAws, models: tuple[str, str], create_model: Callable[..., str]
) -> None:
    sagemaker = emulator.client("sagemaker")
    created = sagemaker.create_endpoint(
        EndpointName="life", EndpointConfigName=create_config(emulator, "life-1", alto=1)
    )
    endpoint = settled(emulator, "life")
    assert endpoint["EndpointStatus"] == "InService", emulator.log("alto/", "/aws/sagemaker/Endpoints/life")
    assert endpoint["EndpointArn"] == created["EndpointArn"]
    assert endpoint["ProductionVariants"][0]["CurrentWeight"] == 1
    assert invoke(emulator, "life") == ("alto text/plain - HELLO", "alto")

    # What the model refuses comes back with the model's own status and words.
    with pytest.raises(ClientError) as refused:
        invoke(emulator, "life", b"a bad one")
    error = refused.value.response
    assert error["Error"]["Code"] == "ModelError"
    assert (error["OriginalStatusCode"], error["OriginalMessage"]) == (400, "a bad record")
    with pytest.raises(ClientError) as refused:
        invoke(emulator, "life", b"\0" * (6 * 2**20 + 1))
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413

    # An update to what does not start keeps what runs, and says why.
    create_model("broken", "1.dkr.ecr/broken:1")
    sagemaker.update_endpoint(EndpointName="life", EndpointConfigName=create_config(emulator, "life-broken", broken=1))
    endpoint = settled(emulator, "life")
    assert (endpoint["EndpointStatus"], endpoint["EndpointConfigName"]) == ("InService", "life-1")
    assert "variant broken did not pass the ping health check" in endpoint["FailureReason"]
    assert invoke(emulator, "life")[1] == "alto"

    # Two variants by weight, or by name.
    sagemaker.update_endpoint(EndpointName="life", EndpointConfigName=create_config(emulator, "life-2", alto=1, bass=0))
    endpoint = settled(emulator, "life")
    assert endpoint["EndpointConfigName"] == "life-2"
    assert "FailureReason" not in endpoint
    assert [variant["CurrentWeight"] for variant in endpoint["ProductionVariants"]] == [1, 0]
    assert {invoke(emulator, "life")[1] for _ in range(10)} == {"alto"}
    assert invoke(emulator, "life", TargetVariant="bass") == ("bass text/plain - HELLO", "bass")
    with pytest.raises(ClientError, match="ValidationError"):
        invoke(emulator, "life", TargetVariant="neither")
    weights = [{"VariantName": "alto", "DesiredWeight": 0}, {"VariantName": "bass", "DesiredWeight": 5}]
    sagemaker.update_endpoint_weights_and_capacities(EndpointName="life", DesiredWeightsAndCapacities=weights)
    assert {invoke(emulator, "life")[1] for _ in range(10)} == {"bass"}

    metrics = emulator.client("cloudwatch").list_metrics(Namespace="AWS/SageMaker", MetricName="ModelLatency")
    assert any({"Name": "EndpointName", "Value": "life"} in metric["Dimensions"] for metric in metrics["Metrics"])

    sagemaker.delete_endpoint(EndpointName="life")
    eventually(lambda: not sagemaker.list_endpoints(NameContains="life")["Endpoints"])
    with pytest.raises(ClientError, match="Could not find endpoint"):
        sagemaker.describe_endpoint(EndpointName="life")
    with pytest.raises(ClientError, match="not found"):
        invoke(emulator, "life")


def test_an_endpoint_whose_container_does_not_start_fails(
    emulator: EmulatedAws, create_model: Callable[..., str], tmp_path: Path
) -> None:
    sagemaker = emulator.client("sagemaker")
    create_model("failing", "1.dkr.ecr/broken:1", GATE=str(tmp_path / "gate"))
    sagemaker.create_endpoint(EndpointName="failing", EndpointConfigName=create_config(emulator, "failing", failing=1))
    assert sagemaker.describe_endpoint(EndpointName="failing")["EndpointStatus"] == "Creating"
    with pytest.raises(ClientError, match="already existing endpoint"):
        sagemaker.create_endpoint(EndpointName="failing", EndpointConfigName="failing")
    for change in (
        lambda: sagemaker.update_endpoint(EndpointName="failing", EndpointConfigName="failing"),
        lambda: sagemaker.delete_endpoint(EndpointName="failing"),
    ):
        with pytest.raises(ClientError, match="in-progress"):
            change()
    (tmp_path / "gate").touch()
    endpoint = settled(emulator, "failing")
    assert endpoint["EndpointStatus"] == "Failed"
    assert "did not pass the ping health check" in endpoint["FailureReason"]
    sagemaker.delete_endpoint(EndpointName="failing")


@pytest.mark.parametrize("kind", ["absolute", "climbing", "link", "device"])
def test_a_models_archive_cannot_write_outside_its_folder(emulator: EmulatedAws, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    member = tarfile.TarInfo({"absolute": str(outside), "climbing": "../../../../outside"}.get(kind, kind))
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, str(outside)
    if kind == "device":
        member.type = tarfile.CHRTYPE
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        archive.addfile(member, io.BytesIO())
    container = {
        "Image": "1.dkr.ecr/model-program:1",
        "ModelDataUrl": emulator.put(f"models/{kind}/model.tar.gz", data.getvalue()),
    }
    sagemaker = emulator.client("sagemaker")
    sagemaker.create_model(ModelName=kind, ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    sagemaker.create_endpoint(EndpointName=kind, EndpointConfigName=create_config(emulator, kind, **{kind: 1}))
    endpoint = settled(emulator, kind)
    assert endpoint["EndpointStatus"] == "Failed"
    assert "UnsafePathError" in endpoint["FailureReason"]
    assert not outside.exists()


def test_models_and_configurations_are_held_against_the_rules(emulator: EmulatedAws, models: tuple[str, str]) -> None:
    sagemaker = emulator.client("sagemaker")
    container = {"Image": "counting:1", "ModelDataUrl": f"s3://{emulator.bucket}/models/nothing.tar.gz"}
    with pytest.raises(ClientError, match="Could not find model data"):
        sagemaker.create_model(ModelName="no-data", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    with pytest.raises(ClientError, match="already existing model"):
        sagemaker.create_model(ModelName="alto", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    create_config(emulator, "rules", alto=1)
    with pytest.raises(ClientError, match="already existing endpoint configuration"):
        create_config(emulator, "rules", alto=1)
    with pytest.raises(ClientError, match="Could not find model"):
        create_config(emulator, "rules-2", none=1)
    variant = {"VariantName": "only", "ModelName": "alto", "InstanceType": "ml.m5.tiny", "InitialInstanceCount": 1}
    with pytest.raises(ClientError, match="enum value set"):
        sagemaker.create_endpoint_config(EndpointConfigName="rules-3", ProductionVariants=[variant])
    with pytest.raises(ClientError, match="Could not find endpoint configuration"):
        sagemaker.create_endpoint(EndpointName="rules", EndpointConfigName="none")


def test_a_stack_makes_an_endpoint_that_answers(emulator: EmulatedAws, models: tuple[str, str]) -> None:
    cloudformation = emulator.client("cloudformation")
    variant = {
        "VariantName": "only",
        "ModelName": "bass",
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
        "InitialVariantWeight": 1,
    }
    name = {"Fn::GetAtt": ["Configuration", "EndpointConfigName"]}
    resources = {
        "Configuration": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": {"ProductionVariants": [variant]}},
        "Endpoint": {
            "Type": "AWS::SageMaker::Endpoint",
            "Properties": {"EndpointName": "stacked", "EndpointConfigName": name},
        },
    }
    cloudformation.create_stack(StackName="counting", TemplateBody=json.dumps({"Resources": resources}))
    assert settled(emulator, "stacked")["EndpointStatus"] == "InService"
    assert invoke(emulator, "stacked")[0].startswith("bass ")
    cloudformation.delete_stack(StackName="counting")
    eventually(lambda: not emulator.client("sagemaker").list_endpoints(NameContains="stacked")["Endpoints"])
