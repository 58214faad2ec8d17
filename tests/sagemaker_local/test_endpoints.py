"""Endpoints on the local AWS: the serving image's own program behind them, updates, weights, refusals and failures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError

from emulated_aws import EmulatedAws, eventually

pytestmark = pytest.mark.aws


@pytest.fixture(scope="module")
def models(emulator: EmulatedAws, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models, named after the quantity that they always answer, and one whose image does not start."""
    from stocktake.models.export import export_model
    from stocktake.models.majority import fit_majority

    sagemaker = emulator.client("sagemaker")
    names = {}
    for quantity in (2, 3):
        folder = tmp_path_factory.mktemp("exported") / "model"
        export_model(fit_majority((1, 2, 3), 32, np.array([1, 2, 3, quantity, quantity])), folder)
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            archive.add(folder, ".")
        uri = emulator.put(f"models/{quantity}/model.tar.gz", data.getvalue())
        names[str(quantity)] = f"answers-{quantity}"
        container = {"Image": "1.dkr.ecr/stocktake:1", "ModelDataUrl": uri, "Environment": {"STOCKTAKE_THREADS": "1"}}
        sagemaker.create_model(
            ModelName=f"answers-{quantity}", ExecutionRoleArn=emulator.role, PrimaryContainer=container
        )
    names["broken"] = "broken"
    container = {"Image": "1.dkr.ecr/broken:1", "ModelDataUrl": f"s3://{emulator.bucket}/models/2/model.tar.gz"}
    sagemaker.create_model(ModelName="broken", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    return names


def create_config(emulator: EmulatedAws, name: str, **weights: float) -> str:
    """An endpoint configuration: model to weight; variants bear the models' names."""
    variants = [
        {
            "VariantName": model.replace("_", "-"),
            "ModelName": model.replace("_", "-"),
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
        lambda: (said := describe(EndpointName=name))["EndpointStatus"] not in ("Creating", "Updating") and said
    )


def ask(emulator: EmulatedAws, name: str, body: bytes, **more: str) -> tuple[Any, str]:
    """The answer to a photo, and the variant that gave it."""
    said = emulator.client("sagemaker-runtime").invoke_endpoint(
        EndpointName=name, Body=body, **{"ContentType": "image/jpeg", **more}
    )
    return json.loads(said["Body"].read()), said["InvokedProductionVariant"]


def test_the_life_of_an_endpoint(
    emulator: EmulatedAws, models: dict[str, str], bin_photo: Callable[..., bytes]
) -> None:
    sagemaker = emulator.client("sagemaker")
    photo = bin_photo(1)
    created = sagemaker.create_endpoint(
        EndpointName="life", EndpointConfigName=create_config(emulator, "life-1", answers_2=1)
    )
    said = settled(emulator, "life")
    assert said["EndpointStatus"] == "InService", (said, emulator.log("answers-2/", "/aws/sagemaker/Endpoints/life"))
    assert said["EndpointArn"] == created["EndpointArn"]
    assert said["ProductionVariants"][0]["CurrentWeight"] == 1
    answer, variant = ask(emulator, "life", photo)
    assert (answer["quantity"], variant) == (2, "answers-2")

    # What the model refuses comes back with the model's own status and words.
    with pytest.raises(ClientError) as refused:
        ask(emulator, "life", b"\xff\xd8 no photo")
    error = refused.value.response
    assert error["Error"]["Code"] == "ModelError"
    assert error["OriginalStatusCode"] in (400, 415, 422)
    assert error["OriginalMessage"]
    with pytest.raises(ClientError) as refused:
        ask(emulator, "life", b"\0" * (6 * 2**20 + 1))
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413

    # An update to what does not start keeps what is there, and says why.
    sagemaker.update_endpoint(EndpointName="life", EndpointConfigName=create_config(emulator, "life-broken", broken=1))
    said = settled(emulator, "life")
    assert (said["EndpointStatus"], said["EndpointConfigName"]) == ("InService", "life-1")
    assert "variant broken did not pass the ping health check" in said["FailureReason"]
    assert ask(emulator, "life", photo)[0]["quantity"] == 2

    # Two variants by weight, or by name.
    sagemaker.update_endpoint(
        EndpointName="life", EndpointConfigName=create_config(emulator, "life-2", answers_2=1, answers_3=0)
    )
    said = settled(emulator, "life")
    assert said["EndpointConfigName"] == "life-2"
    assert "FailureReason" not in said
    assert [one["CurrentWeight"] for one in said["ProductionVariants"]] == [1, 0]
    assert {ask(emulator, "life", photo)[1] for _ in range(10)} == {"answers-2"}
    answer, variant = ask(emulator, "life", photo, TargetVariant="answers-3")
    assert (answer["quantity"], variant) == (3, "answers-3")
    with pytest.raises(ClientError, match="ValidationError"):
        ask(emulator, "life", photo, TargetVariant="neither")
    sagemaker.update_endpoint_weights_and_capacities(
        EndpointName="life",
        DesiredWeightsAndCapacities=[
            {"VariantName": "answers-2", "DesiredWeight": 0},
            {"VariantName": "answers-3", "DesiredWeight": 5},
        ],
    )
    assert {ask(emulator, "life", photo)[0]["quantity"] for _ in range(10)} == {3}

    metrics = emulator.client("cloudwatch").list_metrics(Namespace="AWS/SageMaker", MetricName="ModelLatency")
    assert {"Name": "EndpointName", "Value": "life"} in metrics["Metrics"][0]["Dimensions"]

    sagemaker.delete_endpoint(EndpointName="life")
    eventually(lambda: not sagemaker.list_endpoints(NameContains="life")["Endpoints"])
    with pytest.raises(ClientError, match="Could not find endpoint"):
        sagemaker.describe_endpoint(EndpointName="life")
    with pytest.raises(ClientError, match="not found"):
        ask(emulator, "life", photo)


def test_an_endpoint_whose_container_does_not_start_fails(
    emulator: EmulatedAws, models: dict[str, str], tmp_path: Path
) -> None:
    sagemaker = emulator.client("sagemaker")
    container = {"Image": "1.dkr.ecr/broken:1", "Environment": {"GATE": str(tmp_path / "gate")}}
    sagemaker.create_model(ModelName="failing", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    sagemaker.create_endpoint(EndpointName="failing", EndpointConfigName=create_config(emulator, "failing", failing=1))
    assert sagemaker.describe_endpoint(EndpointName="failing")["EndpointStatus"] == "Creating"
    with pytest.raises(ClientError, match="already existing endpoint"):
        sagemaker.create_endpoint(EndpointName="failing", EndpointConfigName="failing")
    for asked in (
        lambda: sagemaker.update_endpoint(EndpointName="failing", EndpointConfigName="failing"),
        lambda: sagemaker.delete_endpoint(EndpointName="failing"),
    ):
        with pytest.raises(ClientError, match="in-progress"):
            asked()
    (tmp_path / "gate").touch()
    said = settled(emulator, "failing")
    assert said["EndpointStatus"] == "Failed"
    assert "did not pass the ping health check" in said["FailureReason"]
    sagemaker.delete_endpoint(EndpointName="failing")


def test_models_and_configurations_are_held_against_the_rules(emulator: EmulatedAws, models: dict[str, str]) -> None:
    sagemaker = emulator.client("sagemaker")
    container = {"Image": "counting:1", "ModelDataUrl": f"s3://{emulator.bucket}/models/nothing.tar.gz"}
    with pytest.raises(ClientError, match="Could not find model data"):
        sagemaker.create_model(ModelName="no-data", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    with pytest.raises(ClientError, match="already existing model"):
        sagemaker.create_model(ModelName="broken", ExecutionRoleArn=emulator.role, PrimaryContainer=container)
    create_config(emulator, "rules", answers_2=1)
    with pytest.raises(ClientError, match="already existing endpoint configuration"):
        create_config(emulator, "rules", answers_2=1)
    with pytest.raises(ClientError, match="Could not find model"):
        create_config(emulator, "rules-2", no_model=1)
    variant = {"VariantName": "one", "ModelName": "answers-2", "InstanceType": "ml.m5.tiny", "InitialInstanceCount": 1}
    with pytest.raises(ClientError, match="enum value set"):
        sagemaker.create_endpoint_config(EndpointConfigName="rules-3", ProductionVariants=[variant])
    with pytest.raises(ClientError, match="Could not find endpoint configuration"):
        sagemaker.create_endpoint(EndpointName="rules", EndpointConfigName="none")


def test_a_stack_makes_an_endpoint_that_answers(
    emulator: EmulatedAws, models: dict[str, str], bin_photo: Callable[..., bytes]
) -> None:
    cloudformation = emulator.client("cloudformation")
    variant = {
        "VariantName": "only",
        "ModelName": "answers-3",
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
    assert ask(emulator, "stacked", bin_photo(1))[0]["quantity"] == 3
    cloudformation.delete_stack(StackName="counting")
    eventually(lambda: not emulator.client("sagemaker").list_endpoints(NameContains="stacked")["Endpoints"])
