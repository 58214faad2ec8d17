"""Training jobs on the local AWS: folders, artifacts, states, failures, stops, hosts, checkpoints, spot."""

from __future__ import annotations

import io
import json
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import EmulatedAws, eventually

pytestmark = pytest.mark.aws


def channel(name: str, uri: str, **source: str) -> dict[str, Any]:
    """Of InputDataConfig."""
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri, **source}}}


def archive(content: bytes) -> dict[str, bytes]:
    """The files of a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        return {member.name: files.extractfile(member).read() for member in files if member.isfile()}


def test_a_job_runs_its_entry_point_in_the_container_layout(emulator: EmulatedAws) -> None:
    emulator.put("layout/train/a.txt", "A")
    emulator.put("layout/train/deep/b.txt", "B")
    single = emulator.put("layout/one.json", "{}")
    script = """
import json, os, pathlib
ml = pathlib.Path("/opt/ml")
configuration = {path.stem: json.loads(path.read_text()) for path in (ml / "input/config").iterdir()}
files = sorted(str(path.relative_to(ml)) for path in (ml / "input/data").rglob("*") if path.is_file())
folders = sorted(path.name for path in ml.iterdir())
names = "TRAINING_JOB_NAME TRAINING_JOB_ARN GREETING AWS_ENDPOINT_URL AWS_REGION HOME_OF_USER".split()
environment = {name: os.environ.get(name) for name in names}
(ml / "model/seen.json").write_text(json.dumps([configuration, files, folders, environment]))
(ml / "output/data/extra.txt").write_text("extra")
print("val_macro_f1=0.25"); print("epoch=2 val_macro_f1=0.75 done")
"""
    emulator.train(
        "layout",
        script,
        program="python",
        HyperParameters={"lr": "0.1", "words": "two words"},
        Environment={"GREETING": "good day"},
        InputDataConfig=[channel("train", f"s3://{emulator.bucket}/layout/train"), channel("one", single)],
        AlgorithmSpecification={"MetricDefinitions": [{"Name": "f1", "Regex": r"val_macro_f1=(\S+)"}]},
        Tags=[{"Key": "stage", "Value": "finetune"}],
    )
    job = emulator.ended("layout")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Completed", "Completed"), job
    assert [transition["Status"] for transition in job["SecondaryStatusTransitions"]] == [
        "Starting",
        "Downloading",
        "Training",
        "Uploading",
        "Completed",
    ]
    assert all("EndTime" in transition for transition in job["SecondaryStatusTransitions"])
    assert [(metric["MetricName"], metric["Value"]) for metric in job["FinalMetricDataList"]] == [("f1", 0.75)]
    assert job["BillableTimeInSeconds"] >= 1
    assert job["TrainingEndTime"] >= job["TrainingStartTime"] >= job["CreationTime"]

    assert job["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{emulator.bucket}/output/layout/output/model.tar.gz"
    configuration, files, folders, environment = json.loads(
        archive(emulator.get("output/layout/output/model.tar.gz"))["seen.json"]
    )
    assert archive(emulator.get("output/layout/output/output.tar.gz")) == {"extra.txt": b"extra"}
    assert configuration["hyperparameters"] == {"lr": "0.1", "words": "two words"}
    assert configuration["resourceconfig"]["hosts"] == ["algo-1"]
    assert configuration["resourceconfig"]["current_instance_type"] == "ml.m5.xlarge"
    assert configuration["inputdataconfig"]["train"]["TrainingInputMode"] == "File"
    assert files == [
        "input/data/one/one.json",
        "input/data/program/main",
        "input/data/train/a.txt",
        "input/data/train/deep/b.txt",
    ]
    assert folders == ["checkpoints", "code", "input", "model", "output"]
    assert environment == {
        "TRAINING_JOB_NAME": "layout",
        "TRAINING_JOB_ARN": job["TrainingJobArn"],
        "GREETING": "good day",
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_REGION": "us-east-1",
        "HOME_OF_USER": None,
    }
    assert emulator.log("layout/algo-1") == ["val_macro_f1=0.25", "epoch=2 val_macro_f1=0.75 done"]
    tags = emulator.client("sagemaker").list_tags(ResourceArn=job["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "stage", "Value": "finetune"}]


def test_a_failure_has_the_jobs_own_words(emulator: EmulatedAws) -> None:
    emulator.train("failing", "echo half > /opt/ml/model/half; echo 'no photos' > /opt/ml/output/failure; exit 3")
    job = emulator.ended("failing")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Failed", "Failed")
    assert job["FailureReason"] == "AlgorithmError: no photos, exit code: 3"
    emulator.train("no-program", "", program="no-such-program")
    assert emulator.ended("no-program")["FailureReason"] == "AlgorithmError: , exit code: 127"
    assert emulator.log("no-program/") == ["cannot start no-such-program: No such file or directory"]


def test_a_stopped_job_gets_sigterm_and_keeps_what_it_wrote(emulator: EmulatedAws) -> None:
    script = """
trap 'echo ending; touch /opt/ml/model/half; exit 0' TERM
echo started
while true; do sleep 0.1; done
"""
    emulator.train("stopped", script)
    eventually(lambda: emulator.log("stopped/") == ["started"])
    emulator.client("sagemaker").stop_training_job(TrainingJobName="stopped")
    assert emulator.job("stopped")["TrainingJobStatus"] in ("Stopping", "Stopped")
    job = emulator.ended("stopped")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert emulator.log("stopped/") == ["started", "ending"]
    assert archive(emulator.get("output/stopped/output/model.tar.gz")) == {"half": b""}
    with pytest.raises(ClientError, match="ValidationException"):
        emulator.client("sagemaker").stop_training_job(TrainingJobName="stopped")


def test_hosts_find_each_other_by_name_and_share_the_data(emulator: EmulatedAws) -> None:
    for name in "abc":
        emulator.put(f"shards/{name}", name)
    script = """
import json, os, pathlib, socket
resources = json.loads(pathlib.Path("/opt/ml/input/config/resourceconfig.json").read_text())
name, hosts = resources["current_host"], resources["hosts"]
shard = "".join(sorted(path.name for path in pathlib.Path("/opt/ml/input/data/train").iterdir()))
if name == hosts[0]:
    listener = socket.create_server((name, 29317))
    print("listening on", listener.getsockname()[0] == socket.gethostbyname(name), flush=True)
    connection, _ = listener.accept()
    other = connection.recv(100).decode()
else:
    for _ in range(600):
        try:
            connection = socket.create_connection((hosts[0], 29317), timeout=60)
            break
        except ConnectionRefusedError:
            import time; time.sleep(0.1)
    connection.sendall(shard.encode())
    other = "sent"
pathlib.Path("/opt/ml/model", name).write_text(f"{shard} {other} {len(hosts)}")
"""
    emulator.train(
        "two-hosts",
        script,
        program="python",
        ResourceConfig={"InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 10},
        InputDataConfig=[channel("train", f"s3://{emulator.bucket}/shards/", S3DataDistributionType="ShardedByS3Key")],
    )
    job = emulator.ended("two-hosts")
    assert job["TrainingJobStatus"] == "Completed", emulator.log("two-hosts/")
    assert archive(emulator.get("output/two-hosts/output/model.tar.gz")) == {
        "algo-1": b"ac b 2",
        "algo-2": b"b sent 2",
    }
    assert emulator.log("two-hosts/algo-1") == ["listening on True"]


def test_one_failing_host_ends_the_others(emulator: EmulatedAws) -> None:
    script = """
grep -q '"current_host": "algo-2"' /opt/ml/input/config/resourceconfig.json || exec sleep 600
echo lost > /opt/ml/output/failure; exit 9
"""
    emulator.train(
        "half-failing",
        script,
        ResourceConfig={"InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 10},
    )
    job = emulator.ended("half-failing")
    assert (job["TrainingJobStatus"], job["FailureReason"]) == ("Failed", "AlgorithmError: lost, exit code: 9")


STEPS = """
import pathlib, sys, time
checkpoint, steps = pathlib.Path("/opt/ml/checkpoints/step"), 6
pathlib.Path("/opt/ml/model/scratch").touch()
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
print(f"begins at {done}", flush=True)
while done < steps:
    done += 1
    checkpoint.write_text(str(done))
    print(f"step={done}", flush=True)
    if done == 3 and not pathlib.Path("/opt/ml/checkpoints/resumed").exists():
        pathlib.Path("/opt/ml/checkpoints/resumed").touch()
        print("half way", flush=True)
        time.sleep(600)
pathlib.Path("/opt/ml/model/final").write_text(str(done))
"""


def test_a_spot_interruption_loses_all_but_the_checkpoints(emulator: EmulatedAws) -> None:
    name = "spot-interrupted"
    emulator.train(
        name,
        STEPS,
        program="python",
        EnableManagedSpotTraining=True,
        StoppingCondition={"MaxRuntimeInSeconds": 300, "MaxWaitTimeInSeconds": 600},
        CheckpointConfig={"S3Uri": f"s3://{emulator.bucket}/checkpoints/{name}"},
        AlgorithmSpecification={"MetricDefinitions": [{"Name": "step", "Regex": "step=([0-9]+)"}]},
        Environment={"SAGEMAKER_LOCAL_INTERRUPT_AFTER": "half w.y"},
    )
    job = emulator.ended(name)
    assert job["TrainingJobStatus"] == "Completed", (job, emulator.log(f"{name}/"))
    assert [transition["Status"] for transition in job["SecondaryStatusTransitions"]] == [
        *("Starting", "Downloading", "Training", "Interrupted"),
        *("Starting", "Downloading", "Training", "Uploading", "Completed"),
    ]
    lines = emulator.log(f"{name}/")
    assert lines[:2] == ["begins at 0", "step=1"]
    assert lines[-4:] == ["begins at 3", "step=4", "step=5", "step=6"]
    assert job["FinalMetricDataList"][0]["Value"] == 6
    assert job["BillableTimeInSeconds"] <= job["TrainingTimeInSeconds"]
    assert archive(emulator.get(f"output/{name}/output/model.tar.gz")) == {"scratch": b"", "final": b"6"}
    assert emulator.get(f"checkpoints/{name}/step") == b"6"


def test_a_spot_instance_is_taken_back_after_seconds(emulator: EmulatedAws) -> None:
    emulator.train(
        "spot-seconds",
        "test -e /opt/ml/checkpoints/begun && exit 0; touch /opt/ml/checkpoints/begun; sleep 600",
        EnableManagedSpotTraining=True,
        StoppingCondition={"MaxRuntimeInSeconds": 300, "MaxWaitTimeInSeconds": 300},
        CheckpointConfig={"S3Uri": f"s3://{emulator.bucket}/checkpoints/seconds"},
        Environment={"SAGEMAKER_LOCAL_INTERRUPT_AFTER": "1"},
    )
    job = emulator.ended("spot-seconds")
    assert job["TrainingJobStatus"] == "Completed"
    assert "Interrupted" in [transition["Status"] for transition in job["SecondaryStatusTransitions"]]


def test_a_spot_job_waits_for_machines_as_long_as_its_limit(emulator: EmulatedAws) -> None:
    """What is not to be had in time stops it; it waits again after an interruption."""

    def train(name: str, capacity_after: str, longest: int) -> None:
        emulator.train(
            name,
            "test -e /opt/ml/checkpoints/begun && exit 0; touch /opt/ml/checkpoints/begun; echo begun; sleep 600",
            EnableManagedSpotTraining=True,
            StoppingCondition={"MaxRuntimeInSeconds": longest, "MaxWaitTimeInSeconds": longest},
            CheckpointConfig={"S3Uri": f"s3://{emulator.bucket}/checkpoints/{name}"},
            Environment={
                "SAGEMAKER_LOCAL_CAPACITY_AFTER": capacity_after,
                "SAGEMAKER_LOCAL_INTERRUPT_AFTER": "begun",
            },
        )

    train("spot-patient", "1", 600)
    train("spot-impatient", "600", 1)
    job = emulator.ended("spot-impatient")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")
    assert emulator.log("spot-impatient/") == []
    train("spot-stopped", "600", 600)
    emulator.client("sagemaker").stop_training_job(TrainingJobName="spot-stopped")
    assert emulator.ended("spot-stopped")["SecondaryStatus"] == "Stopped"
    assert emulator.ended("spot-patient")["TrainingJobStatus"] == "Completed"
    with pytest.raises(ClientError, match="SAGEMAKER_LOCAL_CAPACITY_AFTER"):
        train("spot-odd", "soon", 600)


def test_checkpoints_go_to_s3_while_the_job_runs(emulator: EmulatedAws) -> None:
    emulator.train(
        "checkpoints",
        "echo 1 > /opt/ml/checkpoints/one; sleep 600",
        CheckpointConfig={"S3Uri": f"s3://{emulator.bucket}/checkpoints/running/"},
    )
    eventually(lambda: emulator.keys("checkpoints/running") == ["checkpoints/running/one"])
    emulator.client("sagemaker").stop_training_job(TrainingJobName="checkpoints")
    assert emulator.ended("checkpoints")["TrainingJobStatus"] == "Stopped"


def test_metrics_reach_cloudwatch(emulator: EmulatedAws) -> None:
    definitions = [{"Name": "val:f1", "Regex": "f1=([0-9.]+)"}, {"Name": "other", "Regex": "never=(.*)"}]
    script = "echo f1=0.5; echo f1=0.25; echo f1=..; echo 'caf\xe9'"
    emulator.train("metrics", script, AlgorithmSpecification={"MetricDefinitions": definitions})
    job = emulator.ended("metrics")
    assert [(metric["MetricName"], metric["Value"]) for metric in job["FinalMetricDataList"]] == [("val:f1", 0.25)]
    statistics = emulator.client("cloudwatch").get_metric_statistics(
        Namespace="/aws/sagemaker/TrainingJobs",
        MetricName="val:f1",
        Dimensions=[{"Name": "TrainingJobName", "Value": "metrics"}],
        StartTime=job["CreationTime"] - timedelta(minutes=5),
        EndTime=job["TrainingEndTime"] + timedelta(minutes=5),
        Period=3600,
        Statistics=["SampleCount", "Maximum"],
    )
    assert sum(point["SampleCount"] for point in statistics["Datapoints"]) == 2


def test_jobs_are_listed_newest_first(emulator: EmulatedAws) -> None:
    for name in ("listed-1", "listed-2", "listed-3"):
        emulator.train(name, "exit 1" if name == "listed-2" else "true")
        emulator.ended(name)
    sagemaker = emulator.client("sagemaker")
    first = sagemaker.list_training_jobs(NameContains="listed-", MaxResults=2)
    assert [job["TrainingJobName"] for job in first["TrainingJobSummaries"]] == ["listed-3", "listed-2"]
    rest = sagemaker.list_training_jobs(NameContains="listed-", MaxResults=2, NextToken=first["NextToken"])
    assert [job["TrainingJobName"] for job in rest["TrainingJobSummaries"]] == ["listed-1"]
    assert "NextToken" not in rest
    failed = sagemaker.list_training_jobs(NameContains="listed-", StatusEquals="Failed")["TrainingJobSummaries"]
    assert [(job["TrainingJobName"], job["SecondaryStatus"]) for job in failed] == [("listed-2", "Failed")]


def test_keys_cannot_lead_out_of_a_jobs_folder(emulator: EmulatedAws, tmp_path: Path) -> None:
    """An absolute key, one that climbs, a channel and a checkpoint path that climb: nothing is written outside."""
    outside = tmp_path / "outside"
    for name, key in (("absolute", f"escaping/absolute/{outside}"), ("climbing", "escaping/climbing/../../../x")):
        emulator.put(key, "out")
        emulator.train(
            f"{name}-key", "true", InputDataConfig=[channel("data", f"s3://{emulator.bucket}/escaping/{name}/")]
        )
        job = emulator.ended(f"{name}-key")
        assert job["TrainingJobStatus"] == "Failed"
        assert job["FailureReason"].startswith("ClientError: Data download failed")
    emulator.put(f"escaping/checkpoints/{outside}", "out")
    emulator.train(
        "absolute-checkpoint", "true", CheckpointConfig={"S3Uri": f"s3://{emulator.bucket}/escaping/checkpoints"}
    )
    assert emulator.ended("absolute-checkpoint")["TrainingJobStatus"] == "Failed"
    assert not outside.exists()
    for changes in (
        {"CheckpointConfig": {"S3Uri": f"s3://{emulator.bucket}/c", "LocalPath": "/opt/ml/../../tmp"}},
        {"InputDataConfig": [channel("..", emulator.put("once/a", "a"))]},
    ):
        with pytest.raises(ClientError) as refused:
            emulator.train("climbing-path", "true", **changes)
        assert refused.value.response["Error"]["Code"] == "ValidationException"
