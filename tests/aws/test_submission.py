"""From `mlflow run -b sagemaker` to a job that exists: refusals, lost answers, interrupts, names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from botocore.exceptions import ClientError
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend import loader

from emulated_aws import EmulatedAws, eventually
from faulty_aws import FaultyAws

pytestmark = pytest.mark.aws
PROJECT = Path(__file__).parents[2]
REQUIRED = {"role": "arn:aws:iam::123456789012:role/jobs", "bucket": "s3://some-bucket/here", "image": "image:1"}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An AWS where nobody answers: a request that is sent all the same takes another error's place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "parameters", "named"),
    [
        ({"sport": True}, {}, "spot"),
        ({}, {"lr": "abc"}, "lr"),
        ({}, {"root": "bins"}, "-P root=bins"),
        ({"tracking_uri": "http://me:secret@host"}, {}, "http://***@host"),
        ({"region": "us-east-1"}, {"root": "s3://bins"}, "-P root=s3://bins"),
    ],
)
def test_refused_before_anything_is_sent(
    sqlite_store: str, nowhere: None, change: dict[str, Any], parameters: dict[str, str], named: str
) -> None:
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    experiment = client.create_experiment("refused")
    backend = loader.load_backend("sagemaker")
    with pytest.raises(ExecutionException) as refused:
        backend.run(str(PROJECT), "finetune", parameters, None, REQUIRED | change, sqlite_store, experiment)
    assert named in str(refused.value)
    assert client.search_runs([experiment]) == [], "nothing was begun"


def test_a_missing_region_is_said(sqlite_store: str, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    backend = loader.load_backend("sagemaker")
    with pytest.raises(ExecutionException, match="AWS_DEFAULT_REGION"):
        backend.run(str(PROJECT), "finetune", {}, None, REQUIRED, sqlite_store, "0")


class Account:
    """The emulator behind a faulty network, a store, and jobs whose container does nothing, or sleeps."""

    def __init__(self, emulator: EmulatedAws, proxy: FaultyAws, store: str, folder: Path, role: str) -> None:
        self.emulator, self.proxy, self.store, self.folder, self.role = emulator, proxy, store, folder, role
        self.client = mlflow.MlflowClient(store, store)
        self.experiment = self.client.create_experiment("submitted", artifact_location=str(folder / "stored"))

    def settings(self, *, seconds: int = 0, **changes: Any) -> dict[str, Any]:
        python = self.folder / f"python-{seconds}"
        python.write_text(f'#!/bin/sh\n[ "$2" = -c ] || {{ echo started; exec sleep {seconds}; }}\n')
        python.chmod(0o755)
        bucket = f"s3://{self.emulator.bucket}/stocktake"
        environment = {"STOCKTAKE_PYTHON": str(python)}
        return {"role": self.role, "bucket": bucket, "image": "image:1", "environment": environment, **changes}

    def submit(self, *, synchronous: bool = False, settings: dict[str, Any] | None = None, **parameters: str) -> None:
        mlflow.set_tracking_uri(self.store)
        mlflow.projects.run(
            str(PROJECT),
            "majority",
            parameters={"workspace": str(self.folder / "workspace"), **parameters},
            experiment_id=self.experiment,
            backend="sagemaker",
            backend_config=settings or self.settings(),
            synchronous=synchronous,
        )

    def run(self) -> Run:
        (run,) = self.client.search_runs([self.experiment])
        return run

    def job(self) -> dict[str, Any]:
        return self.emulator.job(self.run().data.tags["job.name"])


@pytest.fixture
def account(
    emulator: EmulatedAws, rights: Any, sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Account]:
    for name, value in rights.environment.items():
        monkeypatch.setenv(name, value)
    proxy = FaultyAws(emulator.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", emulator.endpoint)
    before = mlflow.get_tracking_uri()
    account = Account(emulator, proxy, sqlite_store, tmp_path, rights.role)
    yield account
    for run in account.client.search_runs([account.experiment], "tags.job.name LIKE 'stocktake%'"):
        with contextlib.suppress(ClientError):  # it does not exist, or has ended
            emulator.client("sagemaker").stop_training_job(TrainingJobName=run.data.tags["job.name"])
    proxy.close()
    mlflow.set_tracking_uri(before)


def test_from_python_it_returns_at_once_and_the_bucket_must_have_its_owner(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", account.proxy.endpoint)
    account.emulator.put("other/bin-images/1.jpg", b"")
    bucket = f"s3://{account.emulator.bucket}/stocktake/owned"
    settings = account.settings(bucket=bucket, bucket_owner="123456789012")
    account.submit(settings=settings, root=f"s3://{account.emulator.bucket}/other")
    assert account.run().info.status == "RUNNING"
    assert account.job()["TrainingJobName"] == account.run().data.tags["job.name"]
    assert account.run().data.tags["job.instance"] == "1 x ml.m5.xlarge"
    owners = {headers.get("x-amz-expected-bucket-owner") for name, _, headers in account.proxy.requests if name == "s3"}
    assert owners == {"123456789012"}


def test_a_job_that_aws_refuses_leaves_a_failed_run(account: Account) -> None:
    with pytest.raises(ExecutionException, match=r"ml\.m5\.xlarg"):
        account.submit(settings=account.settings(instance_type="ml.m5.xlarg"))
    assert account.run().info.status == "FAILED"
    assert "ml.m5.xlarg" in account.run().data.tags["failure"]
    with pytest.raises(ExecutionException, match="no-such-bucket"):
        account.submit(settings=account.settings(bucket="s3://no-such-bucket"))
    with pytest.raises(ExecutionException, match="-P root=s3://"):
        account.submit(root=f"s3://{account.emulator.bucket}/empty")
    assert len(account.client.search_runs([account.experiment])) == 1


def test_a_create_whose_answer_is_lost_meets_its_own_job(account: Account) -> None:
    account.proxy.faults["CreateTrainingJob"] = ["lose"]
    account.submit()
    assert account.proxy.counts()["CreateTrainingJob"] == 2, "botocore sent it again, and the name was taken"
    assert account.run().info.status == "RUNNING"
    assert account.job()["Environment"]["MLFLOW_RUN_ID"] == account.run().info.run_id
    assert "failure" not in account.run().data.tags


def test_a_job_that_may_exist_leaves_its_run_open(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    account.proxy.faults = {"CreateTrainingJob": ["lose"], "DescribeTrainingJob": ["drop"]}
    with pytest.raises(ExecutionException, match="stocktake jobs --follow stocktake-majority-"):
        account.submit()
    assert account.run().info.status == "RUNNING", "the job runs, and is paid for"
    assert account.job()["TrainingJobName"] == account.run().data.tags["job.name"]


def test_ctrl_c_while_the_job_is_created_stops_it(account: Account) -> None:
    account.proxy.faults["CreateTrainingJob"] = [lambda: os.kill(os.getpid(), signal.SIGINT)]
    account.submit(settings=account.settings(seconds=60))
    assert account.job()["TrainingJobStatus"] in ("Stopping", "Stopped")
    assert account.run().info.status == "RUNNING", "until its job has ended"


def test_a_store_that_fails_after_the_job_exists_fails_no_run(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_batch = mlflow.MlflowClient.log_batch

    def fail_once_it_exists(self: Any, run_id: str, *args: Any, **options: Any) -> Any:
        if any(tag.key == "job.arn" for tag in options.get("tags", ())):
            raise ConnectionError("the tracking server is away")
        return log_batch(self, run_id, *args, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail_once_it_exists)
    account.submit()
    assert account.run().info.status == "RUNNING"
    assert account.job()
    assert "the tracking server is away" in capsys.readouterr().out


def test_a_job_that_is_left_running_does_not_end_its_run(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("stocktake.aws.watch.sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr("builtins.input", lambda _question: "l")
    # The log is read once the job runs: Ctrl-C comes while it is followed
    account.proxy.faults["DescribeLogStreams"] = [lambda: os.kill(os.getpid(), signal.SIGINT)]
    with pytest.raises(ExecutionException, match="stocktake jobs --follow"):
        account.submit(synchronous=True, settings=account.settings(seconds=60))
    assert account.run().info.status == "RUNNING"
    assert account.job()["TrainingJobStatus"] == "InProgress"


@pytest.mark.slow
def test_the_command_line_names_the_run_before_the_job_and_waits_for_its_end(account: Account) -> None:
    config = account.folder / "sagemaker.json"
    config.write_text(json.dumps(account.settings(seconds=30)))
    command = [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-b", "sagemaker", "--backend-config", str(config)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": account.store}
    process = subprocess.Popen(
        [*command, "-e", "majority", "--experiment-name", "submitted", "--run-name", "mine"],
        env=environment,
        cwd=account.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        eventually(lambda: [*account.client.search_runs([account.experiment], "tags.job.arn LIKE 'arn%'")])
        assert account.run().info.run_name == "mine"
        assert account.run().info.status == "RUNNING"
        assert process.poll() is None, "it waits"
        process.send_signal(signal.SIGINT)  # without a terminal: stops the job
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # Python drops an interrupt that comes in a destructor: users send it again
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Stopped" in output
    assert "Traceback" not in output
    assert (account.run().info.status, account.run().info.run_name) == ("KILLED", "mine")
