"""The session's emulator of SageMaker, and what tests ask of it again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sagemaker_local.process import EmulatorProcess

PATIENCE = 120.0
"""Seconds that a test waits for what should come at once on a machine that has nothing else to do."""
TRAIN = Path(__file__).parents[1] / "deploy" / "images" / "training" / "train"
ENDED = ("Completed", "Failed", "Stopped")


class EmulatedAws(EmulatorProcess):
    """`sagemaker-local` in another process, asked by the unmodified boto3."""

    def put(self, key: str, content: bytes | str) -> str:
        """An object in the bucket: its URI."""
        self.client("s3").put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"s3://{self.bucket}/{key}"

    def get(self, key: str) -> bytes:
        """An object of the bucket, by key or URI."""
        key = key.removeprefix(f"s3://{self.bucket}/")
        return bytes(self.client("s3").get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self, prefix: str) -> list[str]:
        """Of the bucket's objects."""
        objects = self.client("s3").list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [entry["Key"] for entry in objects]

    def train(self, name: str, script: str, program: str = "bash", **changes: Any) -> None:
        """Create a training job that runs a script; changes are to CreateTrainingJob's request.

        The script comes as a channel, since an argument has 256 characters at most.
        """
        source = {"S3DataType": "S3Prefix", "S3Uri": self.put(f"scripts/{name}/main", script)}
        channel = {"ChannelName": "program", "DataSource": {"S3DataSource": source}}
        specification = {
            "TrainingImage": "counting:1",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": [program],
            "ContainerArguments": ["/opt/ml/input/data/program/main"],
        }
        request: dict[str, Any] = {
            "TrainingJobName": name,
            "AlgorithmSpecification": specification | changes.pop("AlgorithmSpecification", {}),
            "RoleArn": self.role,
            "InputDataConfig": [*changes.pop("InputDataConfig", []), channel],
            "OutputDataConfig": {"S3OutputPath": f"s3://{self.bucket}/output"},
            "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
            "StoppingCondition": {"MaxRuntimeInSeconds": 600},
        }
        self.client("sagemaker").create_training_job(**request | changes)

    def job(self, name: str) -> dict[str, Any]:
        """DescribeTrainingJob's answer."""
        answer: dict[str, Any] = self.client("sagemaker").describe_training_job(TrainingJobName=name)
        return answer

    def ended(self, name: str) -> dict[str, Any]:
        """The same, once the job has ended."""
        return eventually(lambda: (job := self.job(name))["TrainingJobStatus"] in ENDED and job)

    def log(self, name: str, group: str = "/aws/sagemaker/TrainingJobs") -> list[str]:
        """The lines in the streams whose names begin so."""
        logs = self.client("logs")
        if not logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
            return []
        streams = logs.describe_log_streams(logGroupName=group, logStreamNamePrefix=name)["logStreams"]
        lines = []
        for stream in streams:
            where = {"logGroupName": group, "logStreamName": stream["logStreamName"]}
            lines += [event["message"] for event in logs.get_log_events(**where, startFromHead=True)["events"]]
        return lines


@pytest.fixture(scope="session")
def sagemaker_local_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A stopped container has five seconds.

    The image `program` runs the file `main` of the channel `program`, as `model-program` runs the model's; `broken`
    fails once there is a file GATE; `stocktake-training` starts with the training image's own `train`.
    """
    images = {
        "*/broken:*": "sh -c 'until test -e ${GATE:-/}; do sleep 0.1; done; exit 3'",
        "*/program:*": f"{sys.executable} /opt/ml/input/data/program/main",
        "*/model-program:*": f"{sys.executable} /opt/ml/model/main",
        "*stocktake-training*": f"sh {TRAIN}",
    }
    mapped = [word for pattern, command in images.items() for word in ("--image", f"{pattern}={command}")]
    return ["--state", str(tmp_path_factory.mktemp("emulator")), "--grace", "5", *mapped]


@pytest.fixture(scope="session")
def emulator(sagemaker_local: EmulatorProcess) -> EmulatedAws:
    """The session's emulator; tests choose names of their own in it."""
    return EmulatedAws(sagemaker_local.process, sagemaker_local.environment)


def eventually(condition: Callable[[], Any]) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)
    return value
