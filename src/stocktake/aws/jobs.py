"""Training jobs that exist: list, stop, follow their states and their logs."""

from __future__ import annotations

import datetime
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import quote

from stocktake.aws.connection import Aws, translate_aws_errors
from stocktake.aws.request import PREFIX, RUN, TUNING_NAME
from stocktake.errors import StocktakeError

COMPLETED, FAILED, STOPPED = "Completed", "Failed", "Stopped"
ENDED = (COMPLETED, FAILED, STOPPED)
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_TRIAL = re.compile(rf"{TUNING_NAME}-\d+-")
_POLL_SECONDS = 1.0
_QUIET_LOOKS = 2
"""Logs may lag behind the job: at its end, look until nothing came this often."""


@dataclass(frozen=True)
class JobSummary:
    """What AWS says of a job at a moment, in lists too."""

    description: Mapping[str, Any]
    """AWS's answer."""
    KIND: ClassVar[str] = "TrainingJob"
    """Begins the names of the answer's fields."""

    @property
    def name(self) -> str:
        """Of the job."""
        return str(self.description[f"{self.KIND}Name"])

    @property
    def arn(self) -> str:
        """Of the job."""
        return str(self.description[f"{self.KIND}Arn"])

    @property
    def status(self) -> str:
        """InProgress, Stopping, Completed, Failed or Stopped."""
        return str(self.description[f"{self.KIND}Status"])

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDED

    @property
    def failure(self) -> str | None:
        """Why it failed, in a line."""
        reason = self.description.get("FailureReason")
        return " ".join(str(reason).split())[:1000] if reason else None

    @property
    def created(self) -> datetime.datetime:
        """When it was submitted."""
        return moment(self.description["CreationTime"])


class SageMakerJob(JobSummary):
    """What a training job and a tuning job have in common, as they are described."""

    RUN_VARIABLE: ClassVar[str] = RUN
    """Variable of its processes that holds MLflow's run."""

    @property
    def definition(self) -> Mapping[str, Any]:
        """The part of the answer that says how it trains."""
        return self.description

    @property
    def instance_type(self) -> str:
        """ml.m5.xlarge, ..."""
        return str(self.definition["ResourceConfig"].get("InstanceType", ""))

    @property
    def instance_count(self) -> int:
        """Machines of a training."""
        return int(self.definition["ResourceConfig"].get("InstanceCount", 1))

    @property
    def is_spot(self) -> bool:
        """Whether on spare capacity."""
        return bool(self.definition.get("EnableManagedSpotTraining"))

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of its processes."""
        return dict(self.definition.get("Environment") or {})

    @property
    def run_id(self) -> str | None:
        """MLflow's run of it."""
        return self.environment.get(self.RUN_VARIABLE)


class Job(SageMakerJob):
    """A training job. Its run is the one that it goes on in."""

    @property
    def step(self) -> str:
        """What it is doing: Starting, Downloading, Training, Uploading, Interrupted, MaxRuntimeExceeded, ..."""
        return str(self.description.get("SecondaryStatus") or self.status)

    @property
    def billed_seconds(self) -> float | None:
        """What one machine is billed for, spot's saving taken off; None before it has trained."""
        if (billed := self.description.get("BillableTimeInSeconds")) is not None:
            return float(billed)
        began, ended = self.description.get("TrainingStartTime"), self.description.get("TrainingEndTime")
        return (moment(ended) - moment(began)).total_seconds() if began and ended else None

    def log_link(self, region: str) -> str:
        """The job's logs in the AWS console."""
        return log_link(region, f"{self.name}/")


def describe(aws: Aws, name: str) -> Job:
    """The job of a name; StocktakeError if there is none."""
    with translate_aws_errors(f"job {name}"):
        return Job(aws.sagemaker.describe_training_job(TrainingJobName=name))


def newest(aws: Aws, limit: int) -> list[Job]:
    """Our jobs, newest first, without the trials of tuning jobs."""
    with translate_aws_errors("the list of jobs"):
        pages = aws.sagemaker.get_paginator("list_training_jobs").paginate(
            NameContains=PREFIX, SortBy="CreationTime", SortOrder="Descending"
        )
        listed = (one["TrainingJobName"] for page in pages for one in page["TrainingJobSummaries"])
        ours = (name for name in listed if name.startswith(PREFIX) and not _TRIAL.match(name))
        names = [*itertools.islice(ours, limit)]
    jobs = [describe(aws, name) for name in names]
    return sorted(jobs, key=lambda job: job.created, reverse=True)


def stop(aws: Aws, name: str) -> Job:
    """Ask the job to end: its processes get SIGTERM and two minutes. One that has ended stays as it is."""
    job = describe(aws, name)
    if not job.has_ended and job.status != "Stopping":
        with suppress(StocktakeError), translate_aws_errors(f"job {name}"):  # it may have ended meanwhile
            aws.sagemaker.stop_training_job(TrainingJobName=name)
        job = describe(aws, name)
        if job.status == "InProgress":
            raise StocktakeError(f"job {name} could not be stopped: it is still {job.step}")
    return job


@dataclass
class Logs:
    """The lines of a job's processes, each once."""

    aws: Aws
    name: str
    _tokens: dict[str, str] = field(default_factory=dict)
    _is_refused: bool = False

    def fresh(self) -> Iterator[str]:
        """Lines since the last time; with several machines each begins with its name."""
        from botocore.exceptions import ClientError

        if self._is_refused:
            return
        try:
            pages = self.aws.logs.get_paginator("describe_log_streams").paginate(
                logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self.name}/"
            )
            streams = sorted(stream["logStreamName"] for page in pages for stream in page["logStreams"])
            # NAME/algo-1-1700000000; one machine has several after an interruption
            machines = {stream: stream.partition("/")[2].rpartition("-")[0] for stream in streams}
            has_several = len(set(machines.values())) > 1
            for stream, machine in machines.items():
                for line in self._lines(stream):
                    yield f"[{machine}] {line}" if has_several else line
        except ClientError as error:
            if error.response["Error"]["Code"] != "ResourceNotFoundException":  # nothing was written yet
                self._is_refused = True
                yield f"warning: the job's logs cannot be read ({error.response['Error']['Message']})"

    def _lines(self, stream: str) -> Iterator[str]:
        while True:
            token = self._tokens.get(stream)
            following = {"nextToken": token} if token else {}
            answer = self.aws.logs.get_log_events(
                logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **following
            )
            self._tokens[stream] = answer["nextForwardToken"]
            yield from (event["message"].rstrip("\n") for event in answer["events"])
            if not answer["events"] or answer["nextForwardToken"] == token:
                return


def follow(aws: Aws, name: str, say: Callable[[str], None], *, poll_seconds: float = _POLL_SECONDS) -> Job:
    """Wait for the job's end; says its log lines as they come, and a line whenever its state changes."""
    logs, told = Logs(aws, name), ""
    while True:
        job = describe(aws, name)
        for line in logs.fresh():
            say(line)
        state = f"{job.status}: {job.step}" if job.step != job.status else job.status
        if state != told:
            told = state
            say(f"--- {name} {state}{f' ({job.failure})' if job.failure else ''}")
        if job.has_ended:
            quiet = 0
            while quiet < _QUIET_LOOKS:
                lines = list(logs.fresh())
                for line in lines:
                    say(line)
                quiet = 0 if lines else quiet + 1
                time.sleep(min(0.5, poll_seconds))
            return job
        time.sleep(poll_seconds)


def log_link(region: str, beginning: str) -> str:
    """The log streams of a beginning in the AWS console, whose addresses quote twice, with $ for %."""

    def quoted(text: str) -> str:
        return quote(quote(text, safe=""), safe="").replace("%", "$")

    filtered = "$3FlogStreamNameFilter$3D" + quoted(beginning)
    return (
        f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}"
        f"#logsV2:log-groups/log-group/{quoted(LOG_GROUP)}{filtered}"
    )


def moment(given: datetime.datetime) -> datetime.datetime:
    """With a time zone, which a stand-in for AWS may leave out."""
    return given if given.tzinfo else given.replace(tzinfo=datetime.UTC)
