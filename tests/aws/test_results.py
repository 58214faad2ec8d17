"""What an ended job left, collected: a stranger's files stay in their folder, and runs get what they lack."""

from __future__ import annotations

import datetime
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import mlflow
import pytest

from emulated_aws import EmulatedAws
from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job
from stocktake.aws.results import collect_results, download_results
from stocktake.config.runs import TrackingConfig
from stocktake.tracking.local_store import LocalRun

pytestmark = pytest.mark.aws


@pytest.fixture
def aws(emulator: EmulatedAws, monkeypatch: pytest.MonkeyPatch) -> Aws:
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    return Aws()


def ended_job(emulator: EmulatedAws, name: str, run_id: str | None = None) -> Job:
    """A failed job whose output and checkpoints are below its name in the bucket."""
    environment = {"MLFLOW_RUN_ID": run_id} if run_id else {}
    return Job(
        {
            "TrainingJobName": name,
            "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{name}",
            "TrainingJobStatus": "Failed",
            "FailureReason": "InternalServerError: the instance is gone",
            "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 2},
            "BillableTimeInSeconds": 30,
            "Environment": environment,
            "CreationTime": datetime.datetime.now(datetime.UTC),
            "OutputDataConfig": {"S3OutputPath": f"s3://{emulator.bucket}/{name}"},
            "CheckpointConfig": {"S3Uri": f"s3://{emulator.bucket}/{name}/checkpoints"},
        }
    )


def test_keys_below_a_jobs_prefix_write_nothing_outside_of_it(
    aws: Aws, emulator: EmulatedAws, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging, outside = tmp_path / "staging", tmp_path / "outside"
    staging.mkdir()
    outside.mkdir()
    prefix = "keys/checkpoints/runs/"
    attacks = [f"/{outside}/absolute", f"/{outside.name}", "run-1/../../outside/up", "run-1//etc", ".lock/x", "alone"]
    attacks += ["run-1/\x1b]0;title", "run-1/a\\..\\b", "run-1/.ssh/key", "run-1/./x"]
    for attack in attacks:
        emulator.put(prefix + attack, "evil")
    emulator.put(prefix + "run-1/run.json", "{}")
    emulator.put(prefix + "run-1/artifacts/a b.txt", "good")
    emulator.put(prefix + "run-1/checkpoints/last.ckpt", "heavy")
    download_results(aws, ended_job(emulator, "keys"), staging)
    assert [*outside.iterdir()] == []
    assert {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} == {
        "run-1/run.json",
        "run-1/artifacts/a b.txt",
    }
    out = capsys.readouterr().out
    assert "absolute" in out, "what is left out is said"
    assert "\x1b" not in out


def test_an_archive_gives_regular_files_only(
    aws: Aws, emulator: EmulatedAws, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging, outside = tmp_path / "staging", tmp_path / "outside"
    staging.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:

        def add(name: str, content: bytes = b"evil", **fields: Any) -> None:
            member = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(member, field, value)
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))

        add("runs", type=tarfile.DIRTYPE)
        add("runs/run-1/run.json", b"{}")
        add("runs/run-1/link", type=tarfile.SYMTYPE, linkname=str(outside))
        add("runs/run-1/link/through-the-link")
        add("runs/run-1/deep", type=tarfile.SYMTYPE, linkname="../" * 8 + str(outside).lstrip("/"))
        add("runs/run-1/hard", type=tarfile.LNKTYPE, linkname=str(outside / "secret"))
        add("runs/run-1/pipe", type=tarfile.FIFOTYPE)
        add("runs/run-1/device", type=tarfile.CHRTYPE)
        add(f"runs/{outside}/absolute")
        add("runs/../../outside/up")
        add("runs/run-1/artifacts/fine.txt", b"good", mode=0o4777)
        add("elsewhere/other.txt")
    emulator.put("archive/archive/output/output.tar.gz", packed.getvalue())
    download_results(aws, ended_job(emulator, "archive"), staging)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    extracted = [path for path in staging.rglob("*") if not path.is_dir()]
    assert {path.relative_to(staging).as_posix() for path in extracted} == {
        "run-1/run.json",
        "run-1/artifacts/fine.txt",
        "run-1/link/through-the-link",  # below a folder of that name
    }
    assert not any(path.is_symlink() for path in staging.rglob("*"))
    assert not (staging / "run-1/artifacts/fine.txt").stat().st_mode & 0o4111
    assert "run-1/device" in capsys.readouterr().out


def test_a_killed_job_is_collected_from_its_checkpoints_into_its_own_run_only(
    aws: Aws, emulator: EmulatedAws, sqlite_store: str, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    experiment = client.create_experiment("jobs", artifact_location=str(tmp_path / "stored"))
    own, other = (client.create_run(experiment).info.run_id for _ in range(2))
    run = LocalRun.create(tmp_path / "there", name="lost", experiment="jobs", tracking_uri=None, attach_run_id=other)
    run.log_metrics({"val/macro_f1": 0.25}, 1)
    for path in run.folder.rglob("*"):
        if path.is_file():
            inside = path.relative_to(tmp_path / "there")
            emulator.put(f"killed/checkpoints/runs/{inside}", path.read_bytes())
    job, tracking = ended_job(emulator, "killed", own), TrackingConfig(uri=sqlite_store)
    results = collect_results(aws, job, tmp_path / "here", tracking)
    assert [path.name for path in results.folders] == [run.folder.name]
    logged = client.get_run(own)
    assert (logged.info.status, logged.data.metrics["val/macro_f1"]) == ("FAILED", 0.25)
    assert logged.data.tags["failure"] == "InternalServerError: the instance is gone"
    assert logged.data.tags["results.source"] == "job output"
    assert logged.data.tags["job.billed_seconds"] == "60", "of both instances"
    untouched = client.get_run(other)
    assert (untouched.info.status, untouched.data.metrics) == ("RUNNING", {}), "run.json named another run"
    assert json.loads((results.folders[0] / "run.json").read_text())["attach_run_id"] == own

    again = collect_results(aws, job, tmp_path / "here", tracking)
    assert again == results
    assert client.get_run(own).data.tags == logged.data.tags
    assert len(client.get_metric_history(own, "val/macro_f1")) == 1
    assert [path.name for path in (tmp_path / "here" / "runs").glob("[!.]*")] == [run.folder.name]
