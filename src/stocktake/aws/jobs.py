"""Training and tuning jobs as AWS describes them: names, states, the list, stopping."""

from __future__ import annotations

import datetime
import itertools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import quote

from stocktake.aws.connection import Aws, AwsError, translate_aws_errors
from stocktake.tracking.attached_run import VARIABLE

COMPLETED, FAILED, STOPPED = "Completed", "Failed", "Stopped"
PREFIX = "stocktake-"
"""Begins the names of our jobs; policies refer to it."""
RUN_VARIABLE, TUNING_RUN_VARIABLE = VARIABLE, "STOCKTAKE_TUNING_RUN"
"""Variables of a job's processes that hold the id of its MLflow run, and of its tuning job's run."""
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_TUNING_PREFIX = f"{PREFIX}tune-"
_MAX_TUNING_NAME = 32  # AWS's limit; the training jobs of a tuning job add to its name
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Job:
    """A training job at a moment, as it was described or listed."""

    description: Mapping[str, Any]
    """AWS's answer."""
    kind: ClassVar[str] = "TrainingJob"
    """Begins the names of the answer's fields."""
    run_variable: ClassVar[str] = RUN_VARIABLE

    @property
    def name(self) -> str:
        return str(self.description[f"{self.kind}Name"])

    @property
    def arn(self) -> str:
        return str(self.description[f"{self.kind}Arn"])

    @property
    def status(self) -> str:
        """InProgress, Stopping, Completed, Failed or Stopped."""
        return str(self.description[f"{self.kind}Status"])

    @property
    def step(self) -> str:
        """What it is doing: Starting, Downloading, Training, Uploading, Interrupted, MaxRuntimeExceeded, ..."""
        return str(self.description.get("SecondaryStatus") or self.status)

    @property
    def has_ended(self) -> bool:
        return self.status in (COMPLETED, FAILED, STOPPED)

    @property
    def failure(self) -> str | None:
        """Why it failed, in one line."""
        reason = self.description.get("FailureReason")
        return printable(" ".join(str(reason).split()))[:1000] if reason else None

    @property
    def created(self) -> datetime.datetime:
        moment: datetime.datetime = self.description["CreationTime"]
        return moment

    @property
    def definition(self) -> Mapping[str, Any]:
        """The part of the description that says how it trains."""
        return self.description

    @property
    def instance_type(self) -> str:
        """ml.m5.xlarge, ..."""
        return str(self.definition["ResourceConfig"].get("InstanceType", ""))

    @property
    def instance_count(self) -> int:
        return int(self.definition["ResourceConfig"].get("InstanceCount", 1))

    @property
    def is_spot(self) -> bool:
        return bool(self.definition.get("EnableManagedSpotTraining"))

    @property
    def run_id(self) -> str | None:
        """MLflow's run of it."""
        return (self.definition.get("Environment") or {}).get(self.run_variable)

    @property
    def billed_seconds(self) -> int | None:
        """Seconds that AWS bills for, summed over the instances; None while it runs or where AWS does not say."""
        seconds = self.description.get("BillableTimeInSeconds")
        return int(seconds) * self.instance_count if seconds is not None and self.has_ended else None

    def log_link(self, region: str) -> str:
        """The job's log streams in the AWS console, whose addresses are quoted twice, with $ for %."""

        def quoted(text: str) -> str:
            return quote(quote(text, safe=""), safe="").replace("%", "$")

        beginning = self.name + ("/" if self.kind == "TrainingJob" else "-")
        return (
            f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}#logsV2:log-groups/log-group/"
            f"{quoted(LOG_GROUP)}$3FlogStreamNameFilter$3D{quoted(beginning)}"
        )


class TuningJob(Job):
    """A tuning job. Its run is the parent of its trials' runs."""

    kind, run_variable = "HyperParameterTuningJob", TUNING_RUN_VARIABLE

    @property
    def definition(self) -> Mapping[str, Any]:
        """What each trial is."""
        return dict(self.description["TrainingJobDefinition"])

    @property
    def config(self) -> Mapping[str, Any]:
        """Its HyperParameterTuningJobConfig."""
        return dict(self.description["HyperParameterTuningJobConfig"])

    @property
    def step(self) -> str:
        """How far it is: InProgress, 3 of 20 trials."""
        counts = self.description["TrainingJobStatusCounters"]
        ended = sum(int(count) for state, count in counts.items() if state != "InProgress")
        return f"{self.status}, {ended} of {self.config['ResourceLimits']['MaxNumberOfTrainingJobs']} trials"

    @property
    def workers(self) -> int:
        """Trials at a time."""
        return int(self.config["ResourceLimits"]["MaxParallelTrainingJobs"])

    @property
    def stage(self) -> str:
        """What is trained."""
        return str((self.definition.get("StaticHyperParameters") or {}).get("stage", "finetune"))


def new_name(command: str) -> str:
    """A name that no other job has: stocktake-finetune-20260131-101502-1a2b3c, stocktake-tune-260131-101502-1a2."""
    moment = datetime.datetime.now(datetime.UTC)
    if command == "tune":
        return f"{_TUNING_PREFIX}{moment:%y%m%d-%H%M%S}-{secrets.token_hex(2)[:3]}"
    return f"{PREFIX}{command}-{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def is_tuning_name(name: str) -> bool:
    """Whether it is a tuning job's, not one of its training jobs' or another job's."""
    return name.startswith(_TUNING_PREFIX) and len(name) <= _MAX_TUNING_NAME


def find_job(aws: Aws, name: str) -> Job | TuningJob:
    """The training or tuning job of a name; AwsError if there is none."""
    if is_tuning_name(name):
        return find_tuning_job(aws, name)
    with translate_aws_errors(f"job {name}"):
        return Job(aws.sagemaker.describe_training_job(TrainingJobName=name))


def find_tuning_job(aws: Aws, name: str) -> TuningJob:
    """The tuning job of a name; AwsError if there is none."""
    with translate_aws_errors(f"job {name}"):
        return TuningJob(aws.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name))


def list_jobs(aws: Aws, limit: int) -> list[Job | TuningJob]:
    """Our training and tuning jobs, newest first, without the training jobs of tuning jobs."""
    newest = {"NameContains": PREFIX, "SortBy": "CreationTime", "SortOrder": "Descending"}
    summaries: list[Job] = []
    with translate_aws_errors("the list of jobs"):
        training = aws.sagemaker.get_paginator("list_training_jobs")
        tuning = aws.sagemaker.get_paginator("list_hyper_parameter_tuning_jobs")
        for kind, paginator in ((Job, training), (TuningJob, tuning)):
            pages = paginator.paginate(**newest)
            listed = (kind(summary) for page in pages for summary in page[f"{kind.kind}Summaries"])
            ours = (job for job in listed if job.name.startswith(PREFIX))
            if kind is Job:
                ours = (job for job in ours if not job.name.startswith(_TUNING_PREFIX))
            summaries += itertools.islice(ours, limit)
    summaries.sort(key=lambda job: job.created, reverse=True)
    return [find_job(aws, job.name) for job in summaries[:limit]]


def stop_job(aws: Aws, name: str) -> Job | TuningJob:
    """Ask a job to end: its processes get SIGTERM and two minutes. One that has ended stays as it is."""
    job = find_job(aws, name)
    if job.status != "InProgress":
        return job
    try:
        with translate_aws_errors(f"job {name} could not be stopped"):
            if isinstance(job, TuningJob):
                aws.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
            else:
                aws.sagemaker.stop_training_job(TrainingJobName=name)
    except AwsError:
        if find_job(aws, name).status == "InProgress":
            raise
    return find_job(aws, name)


def printable(text: str) -> str:
    """The text without control characters, which could move a terminal's cursor or change its title; tabs stay."""
    return _CONTROL.sub("", text)
