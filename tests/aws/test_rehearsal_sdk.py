"""The unmodified SageMaker SDK against the local AWS: a trainer with its own driver scripts, on two hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal_process import RehearsalProcess

pytestmark = [pytest.mark.aws, pytest.mark.slow]

CLIENT = """
import os, boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import MetricDefinition
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig, SourceCode
from sagemaker.train.distributed import Torchrun

bucket = os.environ["STOCKTAKE_BUCKET"]
trainer = ModelTrainer(
    training_image="stocktake-training:1",
    source_code=SourceCode(source_dir="source", entry_script="train.py"),
    compute=Compute(instance_type="ml.m5.xlarge", instance_count=2),
    distributed=Torchrun(process_count_per_node=1),
    hyperparameters={"lr": 0.1, "epochs": 2},
    role=os.environ["STOCKTAKE_ROLE"],
    base_job_name="by-sdk",
    sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=bucket),
    output_data_config=OutputDataConfig(s3_output_path=f"s3://{bucket}/by-sdk"),
).with_metric_definitions([MetricDefinition(name="sum", regex="sum=([0-9.]+)")])
trainer.train(input_data_config=[InputData(channel_name="train", data_source="data")], wait=True, logs=False)
print("job", trainer._latest_training_job.training_job_name)
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


def test_a_trainer_runs_torchrun_on_two_hosts(rehearsal: RehearsalProcess, tmp_path: Path) -> None:
    for name, content in (("source/train.py", TRAIN), ("data/photo", "a photo"), ("client.py", CLIENT)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    ended = subprocess.run(
        [sys.executable, "client.py"],
        cwd=tmp_path,
        env=os.environ | rehearsal.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    name = ended.stdout.split()[-1]
    job = rehearsal.job(name)
    assert job["TrainingJobStatus"] == "Completed", json.dumps(rehearsal.log(f"{name}/"), indent=1)
    assert [(one["MetricName"], one["Value"]) for one in job["FinalMetricDataList"]] == [("sum", 0.3)]
