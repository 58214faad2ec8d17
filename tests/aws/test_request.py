"""From -P and the backend config to the request, its inputs and its refusals; nothing is sent here."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stocktake.aws.jobs import new_name
from stocktake.aws.packaging import pack_source
from stocktake.aws.parameters import as_arguments, read_parameters
from stocktake.aws.request import training_job
from stocktake.aws.settings import JobSettings
from stocktake.cli import parse
from stocktake.errors import StocktakeError

PROJECT = Path(__file__).parents[2]
LOCK = "deploy/images/training/requirements.lock"
SETTINGS = JobSettings(role="arn:aws:iam::123456789012:role/jobs", bucket="s3://some-bucket/here", image="image:1")
INPUTS = {"code": "s3://some-bucket/here/code/1/"}


def request_of(settings: JobSettings = SETTINGS, entry_point: str = "finetune", **parameters: str) -> dict[str, Any]:
    checked = read_parameters(PROJECT, entry_point, parameters, settings)
    return training_job(
        new_name(checked.command), settings, checked, INPUTS, run_id="0" * 32, tracking_uri="http://somewhere:5000"
    )


def test_a_plain_job() -> None:
    request = request_of(root="s3://bins/all", epochs="2", workspace="elsewhere")
    assert re.fullmatch(r"stocktake-finetune-\d{8}-\d{6}-[0-9a-f]{6}", request["TrainingJobName"])
    assert request["HyperParameters"] == {"command": "finetune", "epochs": "2"}
    assert request["Environment"]["MLFLOW_RUN_ID"] == "0" * 32
    assert request["Environment"]["MLFLOW_TRACKING_URI"] == "http://somewhere:5000"
    assert request["Environment"]["STOCKTAKE_ROOT"] == "s3://bins/all"
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == ["code"]
    assert request["CheckpointConfig"]["S3Uri"].startswith("s3://some-bucket/here/checkpoints/stocktake-")
    assert request["EnableManagedSpotTraining"] is False
    assert "VpcConfig" not in request


def test_every_setting_arrives() -> None:
    settings = replace(
        SETTINGS,
        spot=True,
        max_run_seconds=600,
        max_wait_seconds=1200,
        tags={"team": "counting"},
        kms_key="alias/ours",
        subnets=["subnet-1"],
        security_groups=["sg-1"],
        network_isolation=True,
        environment={"A": "b"},
        instance_count=2,
    )
    request = request_of(settings)
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    assert request["EnableManagedSpotTraining"]
    assert {"Key": "team", "Value": "counting"} in request["Tags"]
    assert request["OutputDataConfig"]["KmsKeyId"] == request["ResourceConfig"]["VolumeKmsKeyId"] == "alias/ours"
    assert request["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert request["EnableNetworkIsolation"]
    assert "MLFLOW_TRACKING_URI" not in request["Environment"], "nothing is reached from an isolated job"
    assert request["Environment"]["A"] == "b"
    warm = request_of(replace(SETTINGS, keep_alive_seconds=600, kms_key="k", instance_type="ml.g5.xlarge"))
    assert warm["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert "VolumeKmsKeyId" not in warm["ResourceConfig"], "its local disk takes no key"


def test_an_experiment_goes_along_as_parameters(tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("epochs: 7\nlr: 1e-3\nsplit: {fractions: [0.7, 0.2, 0.1]}\ntraining: {world_size: null}\n")
    hyperparameters = request_of(experiment=str(experiment), epochs="2")["HyperParameters"]
    assert "experiment" not in hyperparameters
    assert hyperparameters["epochs"] == "2", "what is given on the command line wins"
    command, arguments = as_arguments(hyperparameters, Path("/opt/ml/input/data"))
    config = parse(command, arguments)
    assert (config.epochs, config.lr, config.split.fractions) == (2, 1e-3, (0.7, 0.2, 0.1))


def test_a_file_of_this_machine_becomes_a_channel(tmp_path: Path) -> None:
    listed = tmp_path / "ids.json"
    listed.write_text('["00001"]')
    checked = read_parameters(PROJECT, "majority", {"list": str(listed)}, SETTINGS)
    assert checked.files == {"ids.json": b'["00001"]'}
    assert checked.original_paths == {"list": str(listed)}
    _, arguments = as_arguments(checked.hyperparameters, Path("/data"))
    assert arguments == ["--list", "/data/files/ids.json"]


def test_what_the_tuner_adds_is_no_argument() -> None:
    hyperparameters = {"command": "finetune", "lr": "0.1", "_tuning_objective_metric": "x", "sagemaker_program": "y"}
    assert as_arguments(hyperparameters, Path("/data")) == ("finetune", ["--lr", "0.1"])


@pytest.mark.parametrize(
    ("entry_point", "parameters", "change", "named"),
    [
        ("finetune", {"lr": "abc"}, {}, "lr"),
        ("finetune", {"epoch": "2"}, {}, "epoch"),
        ("finetune", {"batch_size": "0"}, {}, "--batch_size 0"),
        ("finetune", {"batch_size": "3"}, {"instance_count": 2}, "--batch_size 3"),
        ("finetune", {"resume": "workspace/runs/x"}, {}, "-P resume"),
        ("finetune", {"tracking.uri": "http://x"}, {}, "-P tracking.uri"),
        ("finetune", {"experiment": "nowhere"}, {}, "--experiment nowhere"),
        ("finetune", {"list": "nowhere.json"}, {}, "--list nowhere.json"),
        ("ddp", {"nnodes": "2"}, {}, "-P nnodes"),
        ("promote", {}, {}, "-e promote"),
        ("ladder", {}, {"instance_count": 2}, "instance_count 2"),
        ("majority", {"root": "bins"}, {}, "-P root=bins"),
        ("majority", {"root": "https://bins"}, {}, "-P root=https://bins"),
        ("majority", {}, {"warm_start": ["earlier"]}, "warm_start"),
    ],
)
def test_what_no_job_can_do_is_refused_by_name(
    entry_point: str, parameters: dict[str, str], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(StocktakeError) as refused:
        request_of(replace(SETTINGS, **change), entry_point, **parameters)
    assert named in str(refused.value)


def test_the_source_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    packed = pack_source(PROJECT)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = archive.getnames()
    assert {"src/stocktake/cli.py", LOCK, "deploy/start_job.sh", "pyproject.toml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    copied = tmp_path / "copy"
    for name in ("src/stocktake", "deploy"):
        shutil.copytree(PROJECT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", copied)
    first = pack_source(copied)
    (copied / "src" / "stocktake" / "errors.py").touch()
    assert pack_source(copied) == first
    with pytest.raises(StocktakeError, match="src/stocktake"):
        pack_source(tmp_path)
