"""The unmodified SageMaker SDK against the emulator: trainer, tuner, endpoint, batch transform."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emulated_aws import EmulatedAws

pytestmark = [pytest.mark.aws, pytest.mark.slow]
SCORE = """
import json
print("f1=" + json.load(open("/opt/ml/input/config/hyperparameters.json"))["lr"])
"""
TRAIN = """
import os, pathlib, sys
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
print(f"world={world}", sys.argv[1:], flush=True)
pathlib.Path("/opt/ml/model", rank).write_text(pathlib.Path("/opt/ml/input/data/train/photo").read_text())
"""


@pytest.fixture(scope="module")
def results(
    emulator: EmulatedAws, create_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What sdk_client.py prints: importing the SDK takes seconds, so that one process does it all."""
    folder = tmp_path_factory.mktemp("sdk")
    for name, content in (("source/train.py", TRAIN), ("data/photo", "a photo")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    create_model("shout")  # uploads the model's data
    model = emulator.client("sagemaker").describe_model(ModelName="shout")["PrimaryContainer"]["ModelDataUrl"]
    program = emulator.put("scripts/by-sdk/main", SCORE)
    objects = emulator.put("texts-by-sdk/a.txt", "one").removesuffix("a.txt")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("sdk_client.py"), folder, program, model, objects],
        env=os.environ | emulator.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_a_trainer_runs_torchrun_on_two_hosts(emulator: EmulatedAws, results: dict[str, Any]) -> None:
    job = emulator.ended(results["train"])
    assert job["TrainingJobStatus"] == "Completed", emulator.log(f"{results['train']}/")
    assert [(metric["MetricName"], metric["Value"]) for metric in job["FinalMetricDataList"]] == [("world", 2)]
    assert sum("world=2" in line and "--lr" in line for line in emulator.log(f"{results['train']}/")) == 2


def test_a_tuner_finds_the_best(emulator: EmulatedAws, results: dict[str, Any]) -> None:
    name, best = results["tune"]
    trials = emulator.client("sagemaker").list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name, SortBy="FinalObjectiveMetricValue", SortOrder="Descending"
    )["TrainingJobSummaries"]
    assert [trial["TrainingJobStatus"] for trial in trials] == ["Completed"] * 2
    assert trials[0]["TrainingJobName"] == best
    assert {trial["TunedHyperParameters"]["kind"].strip('"') for trial in trials} <= {"a", "b"}


def test_an_endpoint_and_a_transform_answer(emulator: EmulatedAws, results: dict[str, Any]) -> None:
    assert results["deploy"] == "sdk text/plain - HELLO"
    assert emulator.get("by-sdk/a.txt.out") == b"sdk text/plain true ONE"
