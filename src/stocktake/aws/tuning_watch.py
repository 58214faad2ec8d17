"""A tuning job in MLflow: its run, and a child run for each trial, kept up to date until its end.

Child runs are found again by their tags: following a tuning job twice, or from two machines, adds nothing twice.
"""

from __future__ import annotations

import csv
import datetime
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from stocktake.aws.connection import Aws, AwsError, split_uri, translate_aws_errors
from stocktake.aws.jobs import COMPLETED, STOPPED, Job, TuningJob, find_job, find_tuning_job
from stocktake.aws.logs import POLL_SECONDS
from stocktake.aws.parameters import SPACE
from stocktake.aws.request import FILES, METRIC
from stocktake.aws.results import RUN_STATES, collect_results, job_tags
from stocktake.aws.tuning_spec import chosen_settings, load_space
from stocktake.config.runs import TrackingConfig
from stocktake.config.yaml_io import BEST, EXPERIMENT
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import FAILED, KILLED, RUNNING
from stocktake.tracking.uploader import is_generated
from stocktake.tuning.study import best_table, format_params

if TYPE_CHECKING:
    from mlflow.entities import Run

_LONGEST_PAUSE = 5.0
_BEST_METRIC = "best/val_macro_f1"


@dataclass(frozen=True)
class Trial(Job):
    """A trial of a tuning job, by its training job as it is listed."""

    number: int
    """From 1, in the order in which they were started."""

    @property
    def label(self) -> str:
        """trial-003"""
        return f"trial-{self.number:03d}"

    @property
    def value(self) -> float | None:
        """The objective, if it has reported one."""
        metric = self.description.get("FinalHyperParameterTuningJobObjectiveMetric")
        return float(metric["Value"]) if metric else None

    @property
    def ended(self) -> datetime.datetime:
        """When it ended; when it was started, before that."""
        moment: datetime.datetime = self.description.get("TrainingEndTime") or self.created
        return moment

    @property
    def is_complete(self) -> bool:
        """Whether it has trained to its end: only then it has a model."""
        return self.status == COMPLETED and self.value is not None


def list_trials(aws: Aws, name: str) -> list[Trial]:
    """The trials that were started, in that order."""
    with translate_aws_errors(f"the trials of {name}"):
        pages = aws.sagemaker.get_paginator("list_training_jobs_for_hyper_parameter_tuning_job").paginate(
            HyperParameterTuningJobName=name, SortBy="CreationTime", SortOrder="Ascending"
        )
        summaries = [summary for page in pages for summary in page["TrainingJobSummaries"]]
    return [Trial(summary, number) for number, summary in enumerate(summaries, 1)]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The completed one with the highest objective, of equals the first; SageMaker may name one of an earlier job."""
    complete = [trial for trial in trials if trial.is_complete]
    return max(complete, key=lambda trial: (trial.value or 0, -trial.number), default=None)


def follow_tuning_job(
    aws: Aws, name: str, workspace: Path, tracking: TrackingConfig, *, poll_seconds: float = POLL_SECONDS
) -> TuningJob:
    """Wait for a tuning job's end; keep its runs up to date, and print what happens.

    Raises:
        StocktakeError: AWS refuses, or MLflow does not have all of it at the end.
    """
    runs: TuningRuns | None = None
    state, warning, pause = "", "", poll_seconds
    while True:
        has_ended = is_transient = False
        try:
            job = find_tuning_job(aws, name)
            has_ended = job.has_ended
            trials = list_trials(aws, name)  # after it: of a job that has ended, these are all
            if state != (state := job.step):
                pause = poll_seconds
                print(f"--- {name} {state}", flush=True)
            runs = runs or TuningRuns(aws, job, workspace, tracking)
            runs.update(trials)
            if job.has_ended and all(trial.has_ended for trial in trials):
                runs.end(job, trials)
                return job
        except Exception as error:  # whatever a tracking server or the network does, the job goes on
            is_transient = isinstance(error, AwsError) and error.is_transient
            if isinstance(error, StocktakeError) and not is_transient:
                raise
            if warning != (warning := brief(error)):
                print(f"warning: the runs could not be brought up to date: {warning}", flush=True)
            if has_ended and not is_transient:
                raise StocktakeError(
                    f"{name} has ended, but its runs could not be brought up to date ({warning}): "
                    f"`stocktake jobs --follow {name}` does so"
                ) from None
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)


class TuningRuns:
    """The MLflow runs of one tuning job."""

    def __init__(self, aws: Aws, job: TuningJob, workspace: Path, tracking: TrackingConfig) -> None:
        """Raises StocktakeError: the job has no run, its space is gone, or the store cannot be used."""
        if job.run_id is None:
            raise StocktakeError(f"{job.name} has no run in MLflow: stocktake did not submit it")
        self._aws, self._job, self._workspace, self._tracking = aws, job, workspace, tracking
        self._run_id = job.run_id
        self._children: dict[str, Run] = {}  # by the names of their training jobs
        self._ended = 0  # trials whose best value is logged
        channels = {channel["ChannelName"]: channel for channel in job.definition["InputDataConfig"]}
        bucket, prefix = split_uri(channels[FILES]["DataSource"]["S3DataSource"]["S3Uri"])
        with translate_aws_errors(f"the search space of {job.name}"):
            content = aws.s3.get_object(Bucket=bucket, Key=prefix + SPACE)["Body"].read()
        self._space = load_space(content.decode(), job.stage)
        self._connection = Connection(resolve(tracking))
        self._connection.open()
        try:
            run = self._client.get_run(self._run_id)
            if is_generated(run.info.run_name):
                self._client.update_run(self._run_id, name="tune")
        except Exception as error:
            raise StocktakeError(
                f"{self._connection.shown} does not have the run {self._run_id} of {job.name} ({brief(error)}): give "
                "the --tracking.uri that it was submitted with"
            ) from None
        self._experiment: str = run.info.experiment_id

    @property
    def _client(self) -> Any:
        return self._connection.client

    def update(self, trials: Sequence[Trial]) -> None:
        """Make a child run for every trial that was started; end it with its results if the trial has ended."""
        if any(trial.name not in self._children for trial in trials):
            self._find_children(trials)
        for trial in trials:
            if trial.has_ended and self._children[trial.name].info.status == RUNNING:
                self._collect(trial)
                value = "" if trial.value is None else f" val_macro_f1={trial.value:.4f}"
                best = best_of(trials)
                so_far = f" best={best.value:.4f} (trial {best.number})" if best else ""
                state = self._children[trial.name].data.tags["trial.state"]
                failure = f": {trial.failure}" if trial.failure else ""
                print(f"trial={trial.number} {state}{failure}{value}{so_far} {self._shown(trial)}", flush=True)
        self._log_best(trials)

    def end(self, job: TuningJob, trials: Sequence[Trial]) -> None:
        """Log the table of trials, the best one as an experiment, what was billed, and the end."""
        client, run_id, best = self._client, self._run_id, best_of(trials)
        status, failure = RUN_STATES.get(job.status, KILLED), job.failure
        if status == FAILED:
            reasons = [f"{trial.label}: {trial.failure}" for trial in trials if trial.failure]
            failure = " ".join([failure or "the tuning job failed", *reasons[-1:]])
        elif status == KILLED:
            failure = "the tuning job was stopped"
        billed = sum(int(run.data.tags.get("job.billed_seconds", 0)) for run in self._children.values())
        tags = tuning_tags(self._aws, job) | {"job.billed_seconds": str(billed)}
        tags |= {"mlflow.note.content": self._note(job, trials, best)} | ({"failure": failure} if failure else {})
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self._write_table(folder / "trials.csv", trials)
            client.log_artifact(run_id, str(folder / "trials.csv"))
            if best is not None:
                tags |= {"best": best.label, "best.run": self._children[best.name].info.run_id}
                self._write_best(folder, job, best, len(trials))
                client.log_artifact(run_id, str(folder / BEST))
            for name, value in tags.items():
                client.set_tag(run_id, name, value)
            if client.get_run(run_id).info.status != status:
                client.set_terminated(run_id, status)
        if best is not None:
            print(f"best: {best.label}, val_macro_f1 {best.value:.4f}, {self._shown(best)}")
            print(
                f"train it: mlflow artifacts download -r {run_id} -a {BEST} -d . && stocktake "
                f"{job.stage} --experiment {BEST}"
            )
        print(f"the run {run_id} is {status}; it was billed {billed} s", flush=True)

    def _find_children(self, trials: Sequence[Trial]) -> None:
        """The child runs, by their jobs' names; those that are missing are made."""
        folder = self._workspace / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".children.lock"):  # whoever stops it, follows it too
            children = self._client.search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{self._run_id}'", max_results=50_000
            )
            self._children |= {run.data.tags["job.name"]: run for run in children if "job.name" in run.data.tags}
            for trial in trials:
                if trial.name not in self._children:
                    self._children[trial.name] = self._create_child(trial)
                    print(f"trial={trial.number} started {self._shown(trial)}", flush=True)

    def _create_child(self, trial: Trial) -> Run:
        tags = job_tags(self._aws, find_job(self._aws, trial.name)) | {
            "mlflow.parentRunId": self._run_id,
            "stage": "trial",
            "trial": str(trial.number),
            "trial.stage": self._job.stage,
            "trial.state": "running",
        }
        run: Run = self._client.create_run(
            self._experiment, start_time=_milliseconds(trial.created), tags=tags, run_name=trial.label
        )
        for name, value in self._settings(trial).items():
            self._client.log_param(run.info.run_id, name, value)
        return run

    def _collect(self, trial: Trial) -> None:
        run_id = self._children[trial.name].info.run_id
        tags = {"trial.state": "complete" if trial.is_complete else "failed"}
        if trial.status == STOPPED:
            if find_tuning_job(self._aws, self._job.name).status in ("Stopping", STOPPED):
                tags = {"trial.state": "interrupted"}
            else:
                tags = {"trial.state": "pruned", "trial.reason": "stopped early by SageMaker: behind the other trials"}
        job = find_job(self._aws, trial.name)
        collect_results(self._aws, job, self._workspace, self._tracking, run_id=run_id, tags=tags, quiet=True)
        self._children[trial.name] = self._client.get_run(run_id)
        if self._children[trial.name].info.status == RUNNING:
            raise RuntimeError(f"the run {run_id} of {trial.label} is still {RUNNING}")

    def _log_best(self, trials: Sequence[Trial]) -> None:
        """The best value after each trial's end, at that moment: the same points, however often they are logged."""
        ended = sorted((trial for trial in trials if trial.has_ended), key=lambda trial: (trial.ended, trial.number))
        for step in range(self._ended + 1, len(ended) + 1):
            if (best := best_of(ended[:step])) is not None:
                moment = _milliseconds(ended[step - 1].ended)
                self._client.log_metric(self._run_id, _BEST_METRIC, best.value, moment, step)
        self._ended = len(ended)

    def _settings(self, trial: Trial) -> Mapping[str, Any]:
        return chosen_settings(self._space, trial.description["TunedHyperParameters"])

    def _shown(self, trial: Trial) -> str:
        return format_params(self._settings(trial))

    def _note(self, job: TuningJob, trials: Sequence[Trial], best: Trial | None) -> str:
        """The run's description."""
        states = [self._children[trial.name].data.tags.get("trial.state", trial.status) for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        line = f"{len(trials)} trials of {job.stage} ({counts}) by SageMaker's {job.config['Strategy']} search."
        if best is None:
            return line
        complete = [trial for trial in trials if trial.is_complete]
        rows = [(str(trial.number), [trial.value or 0.0], self._settings(trial)) for trial in complete]
        return f"{line} Best: {best.label}, in the artifacts as `{BEST}`.\n\n{best_table([METRIC], rows)}"

    def _write_table(self, path: Path, trials: Sequence[Trial]) -> None:
        columns = ["number", "state", METRIC, "seconds", *self._space.distributions, "reason", "run", "job"]
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            for trial in trials:
                child = self._children[trial.name]
                row = {"number": trial.number, "state": child.data.tags.get("trial.state"), METRIC: trial.value}
                row |= {"seconds": round((trial.ended - trial.created).total_seconds(), 1), "reason": trial.failure}
                table.writerow(row | {"run": child.info.run_id, "job": trial.name, **self._settings(trial)})

    def _write_best(self, folder: Path, job: TuningJob, best: Trial, count: int) -> None:
        """The best trial's own experiment under a header that says where it is from."""
        run_id = self._children[best.name].info.run_id
        experiment = Path(self._client.download_artifacts(run_id, EXPERIMENT, str(folder)))
        header = (
            f"# stocktake {job.stage} --experiment {BEST}\n#\n"
            f"# Trial {best.number} of {count} in {job.name}: {METRIC} {best.value:.4g}.\n"
        )
        (folder / BEST).write_text(header + experiment.read_text(encoding="utf-8"), encoding="utf-8")


def tuning_tags(aws: Aws, job: TuningJob) -> dict[str, str]:
    """What a run says about its tuning job."""
    return job_tags(aws, job) | {
        "stage": "tune",
        "job.state": job.step,
        "job.instance": f"{job.workers} x {job.instance_count} x {job.instance_type}",
        "job.strategy": str(job.config["Strategy"]),
    }


def _milliseconds(moment: datetime.datetime) -> int:
    return int(moment.timestamp() * 1000)
