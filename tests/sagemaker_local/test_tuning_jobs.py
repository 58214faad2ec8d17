"""Tuning jobs on the local AWS: what they choose, how many run, failures, the best, warm and early stops."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import ENDED, EmulatedAws, eventually

pytestmark = pytest.mark.aws

SCORE = """
import json, os, pathlib, sys, time
parameters = json.loads(pathlib.Path("/opt/ml/input/config/hyperparameters.json").read_text())
lr, depth = float(parameters["lr"]), int(parameters["depth"])
if parameters["kind"] == "bad":
    sys.exit("a bad kind")
if parameters["kind"] == "late" and "-005-" in os.environ["TRAINING_JOB_NAME"]:
    print("val_macro_f1=-9", flush=True)
    time.sleep(600)
print(json.dumps(parameters))
print(f"val_macro_f1={1 - (lr - 0.3) ** 2 - depth / 1000}", flush=True)
time.sleep(float(parameters["seconds"]))
"""


def tune(emulator: EmulatedAws, name: str, most: int = 4, width: int = 2, **changes: Any) -> None:
    """Create a tuning job of SCORE."""
    uri = emulator.put("scripts/score/main", SCORE)
    ranges = {
        "ContinuousParameterRanges": [{"Name": "lr", "MinValue": "0.01", "MaxValue": "1", "ScalingType": "Linear"}],
        "IntegerParameterRanges": [{"Name": "depth", "MinValue": "1", "MaxValue": "8"}],
        "CategoricalParameterRanges": [{"Name": "kind", "Values": changes.pop("kinds", ["good"])}],
    }
    config = {
        "Strategy": "Random",
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "val:f1"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": most, "MaxParallelTrainingJobs": width},
        "ParameterRanges": ranges,
        "RandomSeed": 7,
    }
    definition = {
        "StaticHyperParameters": {"seconds": str(changes.pop("seconds", 0)), "epochs": "2"},
        "AlgorithmSpecification": {
            "TrainingImage": "1.dkr.ecr/program:1",
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "val:f1", "Regex": "val_macro_f1=([0-9.-]+)"}],
        },
        "RoleArn": emulator.role,
        "InputDataConfig": [
            {"ChannelName": "program", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri}}}
        ],
        "OutputDataConfig": {"S3OutputPath": f"s3://{emulator.bucket}/tuned"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
    }
    emulator.client("sagemaker").create_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name,
        HyperParameterTuningJobConfig=config | changes.pop("config", {}),
        TrainingJobDefinition=definition | changes.pop("definition", {}),
        **changes,
    )


def described(emulator: EmulatedAws, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = emulator.client("sagemaker").describe_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name
    )
    return answer


def ended(emulator: EmulatedAws, name: str) -> dict[str, Any]:
    def search() -> Any:
        search = described(emulator, name)
        return search["HyperParameterTuningJobStatus"] in ENDED and search

    return eventually(search)


def trials(emulator: EmulatedAws, name: str, **how: Any) -> list[dict[str, Any]]:
    listed = emulator.client("sagemaker").list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name, **how
    )
    return list(listed["TrainingJobSummaries"])


def test_a_search_runs_two_at_a_time_and_names_the_best(emulator: EmulatedAws) -> None:
    # Of seed 7, some choices are bad and some good.
    tune(emulator, "search", most=6, kinds=["good", "bad"], Tags=[{"Key": "stage", "Value": "tune"}])
    search = ended(emulator, "search")
    assert search["HyperParameterTuningJobStatus"] == "Completed", search
    jobs = trials(emulator, "search", SortOrder="Ascending")
    assert len(jobs) == 6
    failed = [job for job in jobs if job["TrainingJobStatus"] == "Failed"]
    assert 0 < len(failed) < 6
    assert search["TrainingJobStatusCounters"]["Completed"] == 6 - len(failed)
    assert search["TrainingJobStatusCounters"]["NonRetryableError"] == len(failed)
    assert search["ObjectiveStatusCounters"] == {"Succeeded": 6 - len(failed), "Pending": 0, "Failed": len(failed)}
    assert {job["TunedHyperParameters"]["kind"] for job in failed} == {"bad"}
    assert failed[0]["FailureReason"] == "AlgorithmError: , exit code: 1"
    assert all(job["TrainingJobName"].startswith(f"search-{n:03d}-") for n, job in enumerate(jobs, 1))

    objective = "FinalHyperParameterTuningJobObjectiveMetric"
    best = max((job for job in jobs if objective in job), key=lambda job: job[objective]["Value"])
    assert search["BestTrainingJob"]["TrainingJobName"] == best["TrainingJobName"]
    by_value = trials(emulator, "search", SortBy="FinalObjectiveMetricValue", SortOrder="Descending", MaxResults=1)
    assert by_value[0]["TrainingJobName"] == best["TrainingJobName"]

    job = emulator.job(best["TrainingJobName"])
    assert job["TuningJobArn"] == search["HyperParameterTuningJobArn"]
    assert job["HyperParameters"] == {
        **best["TunedHyperParameters"],
        "seconds": "0",
        "epochs": "2",
        "_tuning_objective_metric": "val:f1",
    }
    assert 0.01 <= float(job["HyperParameters"]["lr"]) <= 1
    assert int(job["HyperParameters"]["depth"]) in range(1, 9)
    events = [(job["TrainingStartTime"], 1) for job in jobs] + [(job["TrainingEndTime"], -1) for job in jobs]
    running = most_at_once = 0
    for _, step in sorted(events):
        running += step
        most_at_once = max(most_at_once, running)
    assert most_at_once <= 2

    # A search that starts from this one's results, with the Bayesian strategy.
    warm = {
        "WarmStartType": "IdenticalDataAndAlgorithm",
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": "search"}],
    }
    tune(emulator, "warm", most=2, kinds=["good", "bad"], config={"Strategy": "Bayesian"}, WarmStartConfig=warm)
    assert ended(emulator, "warm")["WarmStartConfig"] == warm
    names = {
        job["HyperParameterTuningJobName"]
        for job in emulator.client("sagemaker").list_hyper_parameter_tuning_jobs(StatusEquals="Completed")[
            "HyperParameterTuningJobSummaries"
        ]
    }
    assert "search" in names


def test_a_stopped_search_stops_its_jobs(emulator: EmulatedAws) -> None:
    tune(emulator, "halted", most=8, seconds=600)
    eventually(lambda: [job["TrainingJobStatus"] for job in trials(emulator, "halted")] == ["InProgress"] * 2)
    emulator.client("sagemaker").stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="halted")
    search = ended(emulator, "halted")
    assert search["HyperParameterTuningJobStatus"] == "Stopped"
    assert search["TrainingJobStatusCounters"]["Stopped"] == 2
    assert len(trials(emulator, "halted")) == 2


def test_a_search_whose_jobs_all_fail_has_failed(emulator: EmulatedAws) -> None:
    tune(emulator, "hopeless", most=2, kinds=["bad"])
    search = ended(emulator, "hopeless")
    assert search["HyperParameterTuningJobStatus"] == "Failed"
    assert search["FailureReason"].startswith("All training jobs failed")
    assert "BestTrainingJob" not in search


def test_a_job_worse_than_the_median_is_stopped_early(emulator: EmulatedAws) -> None:
    tune(emulator, "early", most=6, kinds=["late"], config={"TrainingJobEarlyStoppingType": "Auto"})
    search = ended(emulator, "early")
    assert search["HyperParameterTuningJobStatus"] == "Completed"
    assert search["TrainingJobStatusCounters"]["Stopped"] >= 1
    fifth = next(job for job in trials(emulator, "early") if "-005-" in job["TrainingJobName"])
    assert fifth["TrainingJobStatus"] == "Stopped"
    assert fifth["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] == -9
    assert search["BestTrainingJob"]["TrainingJobName"] != fifth["TrainingJobName"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"definition": {"RoleArn": "arn:aws:iam::123456789012:role/nobody"}}, "Could not assume role"),
        ({"definition": {"StaticHyperParameters": {"lr": "1"}}}, "must be disjoint: lr"),
        ({"config": {"Strategy": "Guess"}}, "enum value set"),
        (
            {"config": {"HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "loss"}}},
            "Provide loss in the metric definitions",
        ),
    ],
)
def test_what_aws_refuses(emulator: EmulatedAws, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        tune(emulator, "refused", **changes)
    with pytest.raises(ClientError, match="ResourceNotFound"):
        described(emulator, "refused")


def test_a_long_name_is_refused(emulator: EmulatedAws) -> None:
    with pytest.raises(ClientError, match="length less than or equal to 32"):
        tune(emulator, "s" * 33)
