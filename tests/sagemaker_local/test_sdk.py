"""The unmodified SageMaker SDK, and MLflow's deployments, against the local AWS: trainer, tuner, endpoint, batches."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.deployments import get_deploy_client

from emulated_aws import EmulatedAws

pytestmark = [pytest.mark.aws, pytest.mark.slow]

TRAINER = """
import os, boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import MetricDefinition
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig, SourceCode
from sagemaker.train.distributed import Torchrun

bucket = os.environ["SAGEMAKER_LOCAL_BUCKET"]
trainer = ModelTrainer(
    training_image="stocktake-training:1",
    source_code=SourceCode(source_dir="source", entry_script="train.py"),
    compute=Compute(instance_type="ml.m5.xlarge", instance_count=2),
    distributed=Torchrun(process_count_per_node=1),
    hyperparameters={"lr": 0.1, "epochs": 2},
    role=os.environ["SAGEMAKER_LOCAL_ROLE"],
    base_job_name="by-sdk",
    sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=bucket),
    output_data_config=OutputDataConfig(s3_output_path=f"s3://{bucket}/by-sdk"),
).with_metric_definitions([MetricDefinition(name="sum", regex="sum=([0-9.]+)")])
trainer.train(input_data_config=[InputData(channel_name="train", data_source="data")], wait=True, logs=False)
print("job", trainer._latest_training_job.training_job_name)
"""
TUNER = """
import os, sys, boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.parameter import CategoricalParameter, ContinuousParameter
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig
from sagemaker.train.tuner import HyperparameterTuner

bucket = os.environ["SAGEMAKER_LOCAL_BUCKET"]
trainer = ModelTrainer(
    training_image="1.dkr.ecr/program:1",
    compute=Compute(instance_type="ml.m5.xlarge", instance_count=1),
    hyperparameters={"epochs": 2},
    role=os.environ["SAGEMAKER_LOCAL_ROLE"],
    base_job_name="tuned-by-sdk",
    sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=bucket),
    output_data_config=OutputDataConfig(s3_output_path=f"s3://{bucket}/by-sdk"),
)
tuner = HyperparameterTuner(
    model_trainer=trainer,
    objective_metric_name="f1",
    hyperparameter_ranges={"lr": ContinuousParameter(0.1, 1.0), "kind": CategoricalParameter(["a", "b"])},
    metric_definitions=[{"Name": "f1", "Regex": "f1=([0-9.]+)"}],
    max_jobs=2,
    max_parallel_jobs=2,
    strategy="Random",
)
tuner.tune(inputs=[InputData(channel_name="program", data_source=sys.argv[1])], wait=True)
print(tuner.latest_tuning_job.hyper_parameter_tuning_job_name, tuner.best_training_job())
"""
SCORE = """
import json
given = json.load(open("/opt/ml/input/config/hyperparameters.json"))
print("f1=" + given["lr"])
"""
ENDPOINT = """
import os, sys, boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.resources import Endpoint, EndpointConfig, Model
from sagemaker.core.shapes import ContainerDefinition, ProductionVariant
from sagemaker.core.transformer import Transformer

data, photo, photos = sys.argv[1:]
Model.create(
    model_name="by-sdk",
    execution_role_arn=os.environ["SAGEMAKER_LOCAL_ROLE"],
    primary_container=ContainerDefinition(image="1.dkr.ecr/stocktake:1", model_data_url=data),
)
variant = ProductionVariant(
    variant_name="only",
    model_name="by-sdk",
    instance_type="ml.c7i.large",
    initial_instance_count=1,
    initial_variant_weight=1,
)
EndpointConfig.create(endpoint_config_name="by-sdk", production_variants=[variant])
endpoint = Endpoint.create(endpoint_name="by-sdk", endpoint_config_name="by-sdk")
endpoint.wait_for_status("InService", poll=1)
assert Endpoint.get("by-sdk").endpoint_status == "InService"
with open(photo, "rb") as body:
    answer = endpoint.invoke(body=body.read(), content_type="image/jpeg").body.read().decode()
endpoint.delete()
bucket = os.environ["SAGEMAKER_LOCAL_BUCKET"]
session = Session(boto_session=boto3.Session(), default_bucket=bucket)
where = f"s3://{bucket}/by-sdk-counted"
transformer = Transformer("by-sdk", 1, "ml.m5.xlarge", output_path=where, sagemaker_session=session)
transformer.transform(photos, content_type="image/jpeg", wait=True, logs=False)
print(answer)
"""
TRAIN = """
import argparse, pathlib, torch, torch.distributed as distributed
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--epochs", type=int)
given = parser.parse_args()
distributed.init_process_group("gloo")
total = torch.tensor([given.lr * (distributed.get_rank() + 1)])
distributed.all_reduce(total)
print(f"sum={total.item():.2f}", flush=True)
seen = pathlib.Path("/opt/ml/input/data/train/photo").read_text()
pathlib.Path("/opt/ml/model", str(distributed.get_rank())).write_text(seen)
distributed.destroy_process_group()
"""


def run_client(emulator: EmulatedAws, folder: Path, script: str, *arguments: str) -> str:
    """The last line that a program of the SDK prints."""
    (folder / "client.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "client.py", *arguments],
        cwd=folder,
        env=os.environ | emulator.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that always answers 2."""
    from stocktake.models.export import export_model
    from stocktake.models.majority import fit_majority

    folder = tmp_path_factory.mktemp("exported") / "counter"
    export_model(fit_majority((1, 2, 3), 32, np.array([1, 2, 3, 2, 2])), folder)
    return folder


def test_a_trainer_runs_torchrun_on_two_hosts(emulator: EmulatedAws, tmp_path: Path) -> None:
    for name, content in (("source/train.py", TRAIN), ("data/photo", "a photo")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    name = run_client(emulator, tmp_path, TRAINER).split()[-1]
    job = emulator.job(name)
    assert job["TrainingJobStatus"] == "Completed", json.dumps(emulator.log(f"{name}/"), indent=1)
    assert [(one["MetricName"], one["Value"]) for one in job["FinalMetricDataList"]] == [("sum", 0.3)]


def test_a_tuner_finds_the_best(emulator: EmulatedAws, tmp_path: Path) -> None:
    source = emulator.put("scripts/by-sdk/main", SCORE)
    name, best = run_client(emulator, tmp_path, TUNER, source).split()
    trials = emulator.client("sagemaker").list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name, SortBy="FinalObjectiveMetricValue", SortOrder="Descending"
    )["TrainingJobSummaries"]
    assert [one["TrainingJobStatus"] for one in trials] == ["Completed"] * 2
    assert trials[0]["TrainingJobName"] == best
    assert {one["TunedHyperParameters"]["kind"].strip('"') for one in trials} <= {"a", "b"}


def test_an_endpoint_and_a_transform_count(
    emulator: EmulatedAws, exported: Path, tmp_path: Path, bin_photo: Callable[..., bytes]
) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        archive.add(exported, ".")
    model = emulator.put("models/by-sdk/model.tar.gz", data.getvalue())
    emulator.put("photos-by-sdk/a.jpg", bin_photo(1))
    (tmp_path / "a.jpg").write_bytes(bin_photo(1))
    said = run_client(emulator, tmp_path, ENDPOINT, model, "a.jpg", f"s3://{emulator.bucket}/photos-by-sdk/")
    assert json.loads(said)["quantity"] == 2
    assert json.loads(emulator.get("by-sdk-counted/a.jpg.out"))["quantity"] == 2


def test_mlflow_deploys_a_model(
    emulator: EmulatedAws,
    exported: Path,
    tmp_path: Path,
    bin_photo: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stocktake.serving.pyfunc import save_pyfunc

    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    model = save_pyfunc(exported, tmp_path / "model", bin_photo(1))
    client = get_deploy_client("sagemaker:/us-east-1")
    config = {"execution_role_arn": emulator.role, "bucket": emulator.bucket, "image_url": "1.dkr.ecr/stocktake:1"}
    config |= {"instance_type": "ml.c7i.large"}
    client.create_deployment("by-mlflow", str(model), "python_function", config)
    assert client.get_deployment("by-mlflow")["EndpointStatus"] == "InService"
    photos = pd.DataFrame({"photo": [base64.b64encode(bin_photo(1)).decode()]})
    assert client.predict("by-mlflow", photos)["predictions"][0]["quantity"] == 2
    client.delete_deployment("by-mlflow")
    assert not emulator.client("sagemaker").list_endpoints(NameContains="by-mlflow")["Endpoints"]
