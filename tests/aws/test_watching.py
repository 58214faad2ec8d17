"""Watching a job: lines, states, and what Ctrl-C means. AWS's answers are played here; tests/aws has real jobs."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError

from stocktake.aws import watch
from stocktake.aws.connection import Aws
from stocktake.aws.jobs import Job, Logs, follow
from stocktake.aws.results import CollectedResults
from stocktake.config import TrackingConfig

NAME = "stocktake-finetune-20260131-101502-1a2b3c"


def described(status: str, step: str | None = None, **more: Any) -> dict[str, Any]:
    machines = {"InstanceType": "ml.m5.xlarge", "InstanceCount": 2}
    told = {"TrainingJobName": NAME, "TrainingJobArn": "arn", "ResourceConfig": machines, **more}
    return {**told, "TrainingJobStatus": status, "SecondaryStatus": step or status}


class PlayedAws:
    """Says these states one after the other, and these lines of two machines in pages of one."""

    def __init__(self, states: list[dict[str, Any]], lines: dict[str, list[str]]) -> None:
        self.states, self.lines = states, lines
        self.stopped: list[str] = []
        self.sagemaker = SimpleNamespace(
            describe_training_job=lambda TrainingJobName: self.states.pop(0) if self.states[1:] else self.states[0],
            stop_training_job=lambda TrainingJobName: self.stopped.append(TrainingJobName),
        )
        self.logs = SimpleNamespace(
            get_paginator=lambda _operation: SimpleNamespace(paginate=self._streams),
            get_log_events=self._events,
        )

    def _streams(self, **_: object) -> list[dict[str, Any]]:
        return [{"logStreams": [{"logStreamName": f"{NAME}/{machine}"} for machine in self.lines]}]

    def _events(self, logStreamName: str, nextToken: str = "0", **_: object) -> dict[str, Any]:
        lines, position = self.lines[logStreamName.partition("/")[2]], int(nextToken)
        page = lines[position : position + 1]
        return {"events": [{"message": line} for line in page], "nextForwardToken": str(position + len(page))}


def test_lines_come_once_and_states_when_they_change() -> None:
    states = [described("InProgress", "Starting"), described("InProgress", "Training")]
    states += [described("InProgress", "Training"), described("Failed", FailureReason="out\nof luck")]
    aws = PlayedAws(states, {"algo-1-17": ["one", "two"], "algo-2-17": ["three"]})
    said: list[str] = []
    job = follow(cast(Aws, aws), NAME, said.append, poll_seconds=0)
    assert said == [
        "[algo-1] one",
        "[algo-1] two",
        "[algo-2] three",
        f"--- {NAME} InProgress: Starting",
        f"--- {NAME} InProgress: Training",
        f"--- {NAME} Failed (out of luck)",
    ]
    assert job.has_ended


def test_logs_that_may_not_be_read_are_said_once() -> None:
    aws = PlayedAws([described("InProgress")], {})
    answer = {"Error": {"Code": "AccessDeniedException", "Message": "no logs for you"}}

    def refuse(**_: object) -> None:
        raise ClientError(cast(Any, answer), "DescribeLogStreams")

    aws.logs.get_paginator = lambda _operation: SimpleNamespace(paginate=refuse)
    logs = Logs(cast(Aws, aws), NAME)
    assert list(logs.fresh()) == ["warning: the job's logs cannot be read (no logs for you)"]
    assert list(logs.fresh()) == []


@pytest.mark.parametrize(("answer", "stops"), [("s", True), ("l", False), (None, True)])
def test_ctrl_c_asks_on_a_terminal_and_stops_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str | None, stops: bool
) -> None:
    aws = PlayedAws([described("InProgress", "Training")], {})
    came: list[str] = []

    def follow_until_interrupted(*_: object) -> Job:
        if not came:
            came.append("Ctrl-C")
            raise KeyboardInterrupt
        return Job(described("Stopped"))

    monkeypatch.setattr(watch, "follow", follow_until_interrupted)
    monkeypatch.setattr(watch, "collect_results", lambda *_: CollectedResults((), None, "KILLED"))
    monkeypatch.setattr(watch, "stop_job", lambda _aws, name: aws.stopped.append(name))
    if answer is not None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=print, flush=lambda: None))
        monkeypatch.setattr("builtins.input", lambda _question: answer)
        monkeypatch.setattr(watch, "say", lambda _line: None)
    ended = watch.watch(cast(Aws, aws), NAME, tmp_path, TrackingConfig(), None)
    assert aws.stopped == ([NAME] if stops else [])
    assert (ended is not None) == stops


def test_what_a_job_says_of_itself() -> None:
    began = datetime.datetime(2026, 1, 31, 10, 15, tzinfo=datetime.UTC)
    times = {"TrainingStartTime": began, "TrainingEndTime": began + datetime.timedelta(seconds=90)}
    assert Job(described("Stopped", **times)).billed_seconds == 90
    assert Job(described("Stopped", **times, BillableTimeInSeconds=40)).billed_seconds == 40
    assert Job(described("InProgress")).billed_seconds is None
    link = Job(described("InProgress")).log_link("eu-west-1")
    assert link.endswith(
        f"#logsV2:log-groups/log-group/$252Faws$252Fsagemaker$252FTrainingJobs$3FlogStreamNameFilter$3D{NAME}$252F"
    )
