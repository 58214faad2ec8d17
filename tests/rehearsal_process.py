"""The local AWS as users start it: a process of its own, asked by the unmodified boto3."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

PATIENCE = 120.0
"""Seconds that a test waits for what should come at once on a machine that has nothing else to do."""
ENDED = ("Completed", "Failed", "Stopped")


@dataclass
class RehearsalProcess:
    """`stocktake rehearse` in another process, and clients of it."""

    process: subprocess.Popen[str]
    environment: dict[str, str]
    """To add to a program's, so that it talks to the local AWS."""
    _clients: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]

    @property
    def bucket(self) -> str:
        return self.environment["STOCKTAKE_BUCKET"]

    @property
    def role(self) -> str:
        return self.environment["STOCKTAKE_ROLE"]

    def client(self, service: str) -> Any:
        """A boto3 client."""
        if service not in self._clients:
            self._clients[service] = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name=self.environment["AWS_DEFAULT_REGION"],
                aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            )
        return self._clients[service]

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
        found = self.client("s3").list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [one["Key"] for one in found]

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

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_rehearsal(state: Path, *options: str) -> RehearsalProcess:
    """Start it, with its state in a folder."""
    state.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SAGEMAKER_", "MLFLOW_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "stocktake", "rehearse", "--state", str(state), *options],
        stdout=subprocess.PIPE,
        text=True,
        env=kept,
    )
    assert process.stdout is not None
    environment: dict[str, str] = {}
    for line in process.stdout:
        if line.startswith("export "):
            name, _, value = shlex.split(line)[1].partition("=")
            environment[name] = value
        if line.startswith("# ready"):
            return RehearsalProcess(process, environment)
    raise RuntimeError(f"stocktake rehearse ended with {process.wait()}")


def eventually(condition: Callable[[], Any]) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)
    return value
