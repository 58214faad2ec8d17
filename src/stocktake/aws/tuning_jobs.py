"""Tuning jobs that exist: what they are, their trials, and their end."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stocktake.aws.connection import Aws, translate_aws_errors
from stocktake.aws.jobs import COMPLETED, FAILED, JobSummary, SageMakerJob, log_link, moment
from stocktake.aws.packaging import split_uri
from stocktake.aws.parameters import SPACE
from stocktake.aws.request import FILES, PREFIX
from stocktake.aws.search import load_space
from stocktake.aws.tuning_request import PARENT
from stocktake.errors import StocktakeError
from stocktake.tuning.space import Space

_COUNTERS = ("Completed", "InProgress", "RetryableError", "NonRetryableError", "Stopped")


class TuningJob(SageMakerJob):
    """A tuning job. Its run is the one that its trials' runs are below."""

    KIND, RUN_VARIABLE = "HyperParameterTuningJob", PARENT

    @property
    def definition(self) -> Mapping[str, Any]:
        """What each trial is."""
        return dict(self.description["TrainingJobDefinition"])

    @property
    def step(self) -> str:
        """How far it is: 3 of 20 trials."""
        counts = self.description["TrainingJobStatusCounters"]
        over = sum(int(counts.get(kind, 0)) for kind in _COUNTERS if kind != "InProgress")
        return f"{self.status}, {over} of {self.trials} trials"

    @property
    def trials(self) -> int:
        """How many it may have."""
        return int(self._config["ResourceLimits"]["MaxNumberOfTrainingJobs"])

    @property
    def workers(self) -> int:
        """Trials at a time."""
        return int(self._config["ResourceLimits"]["MaxParallelTrainingJobs"])

    @property
    def strategy(self) -> str:
        """Bayesian, Random or Hyperband."""
        return str(self._config["Strategy"])

    @property
    def ranges(self) -> Mapping[str, Any]:
        """As the request had them."""
        return {kind: ranges for kind, ranges in self._config["ParameterRanges"].items() if ranges}

    @property
    def parameters(self) -> Mapping[str, str]:
        """What is the same for all trials."""
        return dict(self.definition.get("StaticHyperParameters") or {})

    @property
    def stage(self) -> str:
        """What is searched."""
        return self.parameters.get("stage", "finetune")

    @property
    def ended(self) -> datetime.datetime | None:
        """When it was over."""
        ended = self.description.get("HyperParameterTuningEndTime")
        return moment(ended) if ended else None

    def log_link(self, region: str) -> str:
        """The logs of its trials in the AWS console."""
        return log_link(region, f"{self.name}-")

    def space(self, aws: Aws) -> Space:
        """What it searches, as it was uploaded for its trials.

        Raises:
            StocktakeError: it is no longer there.
        """
        channels = {one["ChannelName"]: one["DataSource"]["S3DataSource"] for one in self.definition["InputDataConfig"]}
        bucket, prefix = split_uri(channels[FILES]["S3Uri"])
        with translate_aws_errors(f"the search space of {self.name}"):
            content = aws.s3.get_object(Bucket=bucket, Key=prefix + SPACE)["Body"].read()
        return load_space(content.decode(), self.stage)

    @property
    def _config(self) -> Mapping[str, Any]:
        return dict(self.description["HyperParameterTuningJobConfig"])


@dataclass(frozen=True)
class TrialJob(JobSummary):
    """One trial of a tuning job at a moment, by its training job."""

    number: int
    """From 1, in the order in which they were begun."""

    @property
    def label(self) -> str:
        """trial-003"""
        return f"trial-{self.number:03d}"

    @property
    def chosen(self) -> Mapping[str, str]:
        """The hyperparameters that SageMaker has chosen."""
        return dict(self.description["TunedHyperParameters"])

    @property
    def ended(self) -> datetime.datetime:
        """When it was over; when it was begun, before that."""
        return moment(self.description.get("TrainingEndTime") or self.description["CreationTime"])

    @property
    def value(self) -> float | None:
        """The objective, where it has reported one."""
        found = self.description.get("FinalHyperParameterTuningJobObjectiveMetric")
        return float(found["Value"]) if found else None

    @property
    def is_complete(self) -> bool:
        """Whether it has trained to its end: only such a one has a model."""
        return self.status == COMPLETED and self.value is not None


def describe_search(aws: Aws, name: str) -> TuningJob:
    """The tuning job of a name; StocktakeError if there is none."""
    with translate_aws_errors(f"tuning job {name}"):
        return TuningJob(aws.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name))


def trials_of(aws: Aws, name: str) -> list[TrialJob]:
    """Those that were begun, in that order."""
    with translate_aws_errors(f"the trials of {name}"):
        pages = aws.sagemaker.get_paginator("list_training_jobs_for_hyper_parameter_tuning_job").paginate(
            HyperParameterTuningJobName=name,
            SortBy="CreationTime",
            SortOrder="Ascending",
            PaginationConfig={"PageSize": 100},
        )
        found = [one for page in pages for one in page["TrainingJobSummaries"]]
    return [TrialJob(summary, number) for number, summary in enumerate(found, 1)]


def best_of(trials: list[TrialJob]) -> TrialJob | None:
    """The completed one with the highest objective, of equals the first; SageMaker may name one of an earlier job."""
    return max((one for one in trials if one.is_complete), key=lambda one: (one.value or 0, -one.number), default=None)


def newest_searches(aws: Aws, limit: int) -> list[TuningJob]:
    """Our tuning jobs, newest first."""
    with translate_aws_errors("the list of tuning jobs"):
        pages = aws.sagemaker.get_paginator("list_hyper_parameter_tuning_jobs").paginate(
            NameContains=PREFIX, SortBy="CreationTime", SortOrder="Descending", PaginationConfig={"MaxItems": limit}
        )
        names = [
            one["HyperParameterTuningJobName"] for page in pages for one in page["HyperParameterTuningJobSummaries"]
        ]
    return [describe_search(aws, name) for name in names if name.startswith(PREFIX)][:limit]


def stop_search(aws: Aws, name: str) -> TuningJob:
    """Ask it to end: its trials get SIGTERM and two minutes. One that has ended stays as it is."""
    search = describe_search(aws, name)
    if not search.has_ended and search.status != "Stopping":
        with suppress(StocktakeError), translate_aws_errors(f"tuning job {name}"):  # it may have ended meanwhile
            aws.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
        search = describe_search(aws, name)
        if search.status == "InProgress":
            raise StocktakeError(f"tuning job {name} could not be stopped: it is still {search.step}")
    return search


def check_parents(aws: Aws, names: list[str], ranges: Mapping[str, Any], kind: str) -> None:
    """Raises StocktakeError for earlier tuning jobs that a search cannot begin with."""
    for name in names:
        with translate_aws_errors(f"backend config: warm_start {name}"):
            earlier = TuningJob(aws.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name))
        if not earlier.has_ended or earlier.status == FAILED:
            raise StocktakeError(f"backend config: warm_start {name} is {earlier.status}: name one that has ended well")
        if kind == "IdenticalDataAndAlgorithm" and earlier.ranges != ranges:
            raise StocktakeError(
                f"backend config: warm_start {name} had other ranges: give the same space, or "
                '"warm_start_type": "TransferLearning"'
            )
