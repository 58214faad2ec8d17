"""A tuning job in MLflow: its run, and below it a child run for each trial, kept up to date until its end.

Everything is found again by tags, so that it can be begun anew at any time, by anybody, without anything twice.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.aws.connection import Aws
from stocktake.aws.jobs import COMPLETED, STOPPED, describe
from stocktake.aws.prices import Prices, told
from stocktake.aws.results import RUN_STATES, collect_results, job_tags
from stocktake.aws.search import chosen_settings
from stocktake.aws.tuning_jobs import TrialJob, TuningJob, best_of, describe_search, trials_of
from stocktake.aws.tuning_request import METRIC
from stocktake.config import TrackingConfig
from stocktake.config.yaml_io import BEST, EXPERIMENT
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import FAILED, KILLED, RUNNING
from stocktake.tracking.uploader import is_generated
from stocktake.tuning.search_defaults import TRAINED_BY
from stocktake.tuning.space import Space
from stocktake.tuning.study import best_table, format_params

if TYPE_CHECKING:
    from mlflow.entities import Run

_POLL_SECONDS = 2.0
_TRIALS_CSV = "trials.csv"
_EARLY = "stopped early by SageMaker: it fell behind the other trials"
_BEST_METRIC = "best/val_macro_f1"


def follow_search(
    aws: Aws,
    name: str,
    workspace: Path,
    tracking: TrackingConfig,
    prices: Prices | None,
    say: Callable[[str], None],
    *,
    poll_seconds: float = _POLL_SECONDS,
) -> TuningJob:
    """Wait for a tuning job's end; its runs are kept up to date, and a line is said for what happens.

    Raises:
        StocktakeError: AWS refuses, or MLflow does not have all of it at the end.
    """
    search = describe_search(aws, name)
    runs = SearchRuns(aws, search, workspace, tracking, prices, say)
    state, trouble = "", ""
    while True:
        search = describe_search(aws, name)
        trials = trials_of(aws, name)  # after it: of a job that has ended, these are all
        if search.step != state:
            state = search.step
            say(f"--- {name} {state}")
        try:
            runs.update(trials)
            if search.has_ended and all(trial.has_ended for trial in trials):
                runs.end(search, trials)
                return search
        except StocktakeError:
            raise
        except Exception as error:  # whatever a tracking server does, the job goes on
            if trouble != (trouble := brief(error)):
                say(f"warning: the runs in {runs.shown} could not be brought up to date: {trouble}")
            if search.has_ended:
                raise StocktakeError(
                    f"{name} has {search.status.lower()}, but {runs.shown} does not have all of it ({trouble}): "
                    f"`stocktake jobs --follow {name}` goes on with it"
                ) from None
        time.sleep(poll_seconds)


@dataclass
class SearchRuns:
    """The runs of one tuning job."""

    aws: Aws
    search: TuningJob
    workspace: Path
    tracking: TrackingConfig
    prices: Prices | None
    say: Callable[[str], None]
    _children: dict[str, Run] = field(default_factory=dict)
    """By their training jobs' names."""
    _logged: int = 0
    """Ended trials that the parent's figures count."""

    def __post_init__(self) -> None:
        """Raises StocktakeError: the job has no run, its space is gone, or the store cannot be used."""
        if self.search.run_id is None:
            raise StocktakeError(f"{self.search.name} has no run in MLflow: stocktake did not submit it")
        self._run_id: str = self.search.run_id
        self._space: Space = self.search.space(self.aws)
        self._connection = Connection(resolve(self.tracking))
        self._connection.open()
        try:
            with self._connection.bounded():
                run = self._client.get_run(self._run_id)
                if is_generated(run.info.run_name):
                    self._client.update_run(self._run_id, name="tune")
            self._experiment: str = run.info.experiment_id
        except Exception as error:
            raise StocktakeError(
                f"{self.shown} does not have the run {self._run_id} of {self.search.name} ({brief(error)}): give the "
                "--tracking.uri that it was submitted with"
            ) from None

    @property
    def shown(self) -> str:
        """The store, for a message."""
        return self._connection.shown

    @property
    def _client(self) -> Any:
        return self._connection.client

    def update(self, trials: list[TrialJob]) -> None:
        """A child run for every trial that has been begun, ended with its results if the trial has ended."""
        if any(trial.name not in self._children for trial in trials):
            self._find_children(trials)
        for trial in trials:
            child = self._children[trial.name]
            if trial.has_ended and child.info.status == RUNNING:
                self._bring_home(trial, child, trials)
        self._log_best(trials)

    def end(self, search: TuningJob, trials: list[TrialJob]) -> None:
        """The table of trials, the best one as an experiment, what it has cost, and the end."""
        client, run_id, best = self._client, self._run_id, best_of(trials)
        status, failure = RUN_STATES.get(search.status, KILLED), search.failure
        if status == FAILED:
            reasons = [f"{trial.label}: {trial.failure}" for trial in trials if trial.failure]
            failure = " ".join([failure or "the tuning job failed", *reasons[-1:]])
        elif status == KILLED:
            failure = "the tuning job was stopped"
        tags = self._parent_tags(search)
        tags |= {"mlflow.note.content": self._note(search, trials, best)} | ({"failure": failure} if failure else {})
        with self._connection.bounded(), tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self._write_table(folder / _TRIALS_CSV, trials)
            client.log_artifact(run_id, str(folder / _TRIALS_CSV))
            if best is not None:
                tags |= {"best": best.label, "best.run": self._children[best.name].info.run_id}
                self._write_best(folder, search, best, len(trials))
                client.log_artifact(run_id, str(folder / BEST))
            for name, value in tags.items():
                client.set_tag(run_id, name, value)
            if client.get_run(run_id).info.status != status:
                client.set_terminated(run_id, status, _milliseconds(search.ended) if search.ended else None)
        if best is not None:
            self.say(f"best: {best.label}, val_macro_f1 {best.value:.4f}, {format_params(self._settings(best))}")
            self.say(
                f"train it: mlflow artifacts download -r {run_id} -a {BEST} -d . && mlflow run . -e finetune "
                f"-P experiment={BEST}"
                if search.stage == "finetune"
                else f"train it: mlflow artifacts download -r {run_id} -a {BEST} -d . && stocktake "
                f"{TRAINED_BY[search.stage]} --experiment {BEST}"
            )
        self.say(
            f"the run {run_id} is {status}; it was billed {tags.get('job.billed_seconds', '0')} s, "
            f"{tags.get('job.cost', 'unknown cost')}"
        )

    def _find_children(self, trials: list[TrialJob]) -> None:
        """The child runs, by their jobs' names; those that are missing are made."""
        folder = self.workspace / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".children.lock"), self._connection.bounded():  # whoever stops it, watches it too
            there = self._client.search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{self._run_id}'", max_results=50_000
            )
            self._children |= {run.data.tags["job.name"]: run for run in there if "job.name" in run.data.tags}
            for trial in trials:
                if trial.name not in self._children:
                    self._children[trial.name] = self._create(trial)
                    self.say(f"trial={trial.number} begun {format_params(self._settings(trial))}")

    def _create(self, trial: TrialJob) -> Run:
        from mlflow.entities import Param

        tags = job_tags(self.aws, describe(self.aws, trial.name), self.prices) | {
            "mlflow.parentRunId": self._run_id,
            "stage": "trial",
            "trial": str(trial.number),
            "trial.stage": self.search.stage,
            "trial.state": "running",
        }
        run: Run = self._client.create_run(
            self._experiment, start_time=_milliseconds(trial.created), tags=tags, run_name=trial.label
        )
        params = [Param(name, str(value)) for name, value in self._settings(trial).items()]
        self._client.log_batch(run.info.run_id, params=params)
        return run

    def _bring_home(self, trial: TrialJob, child: Run, trials: list[TrialJob]) -> None:
        state = {COMPLETED: "complete" if trial.is_complete else "failed", STOPPED: "pruned"}.get(
            trial.status, "failed"
        )
        tags = {"trial.state": state}
        job = describe(self.aws, trial.name)
        if trial.status == STOPPED:
            by_us = describe_search(self.aws, self.search.name).status in ("Stopping", STOPPED)
            tags |= {"trial.state": "interrupted"} if by_us else {"trial.reason": _EARLY}
        run_id = child.info.run_id

        def say(line: str) -> None:
            if ": uploaded " not in line:  # of every trial, which has a line of its own below
                self.say(line)

        arrival = collect_results(
            self.aws, job, self.workspace, self.tracking, self.prices, say, run_id=run_id, more_tags=tags
        )
        with self._connection.bounded():
            self._children[trial.name] = self._client.get_run(run_id)
        if self._children[trial.name].info.status == RUNNING:
            raise RuntimeError(f"the run {run_id} of {trial.label} is still {RUNNING}")
        ended = f"failed: {trial.failure}" if arrival.status == FAILED else tags["trial.state"]
        value = "" if trial.value is None else f" val_macro_f1={trial.value:.4f}"
        best = best_of(trials)
        ahead = f" best={best.value:.4f} (trial {best.number})" if best else ""
        self.say(f"trial={trial.number} {ended}{value}{ahead} {format_params(self._settings(trial))}")

    def _log_best(self, trials: list[TrialJob]) -> None:
        """The best value after each trial's end, at that moment: the same points, however often they are logged."""
        from mlflow.entities import Metric

        ended = sorted((trial for trial in trials if trial.has_ended), key=lambda trial: (trial.ended, trial.number))
        points = []
        for step in range(self._logged + 1, len(ended) + 1):
            if (best := best_of(ended[:step])) is not None and best.value is not None:
                points.append(Metric(_BEST_METRIC, best.value, _milliseconds(ended[step - 1].ended), step))
        if points:
            with self._connection.bounded():
                self._client.log_batch(self._run_id, metrics=points)
        self._logged = len(ended)

    def _settings(self, trial: TrialJob) -> dict[str, Any]:
        return chosen_settings(self._space, trial.chosen)

    def _parent_tags(self, search: TuningJob) -> dict[str, str]:
        """What the trials were billed, by their runs."""
        tags = search_tags(self.aws, search)
        billed = [run.data.tags.get("job.billed_seconds") for run in self._children.values()]
        seconds = sum(float(one) for one in billed if one)
        tags["job.billed_seconds"] = f"{seconds:.0f}"
        if self.prices is not None and (cost := self.prices.billed(search.instance_type, 1, seconds)) is not None:
            tags["job.cost"] = told(cost)
        return tags

    def _note(self, search: TuningJob, trials: list[TrialJob], best: TrialJob | None) -> str:
        """The run's description."""
        states = [self._children[trial.name].data.tags.get("trial.state", trial.status) for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        line = f"{len(trials)} trials of {search.stage} ({counts}) by SageMaker's {search.strategy} search."
        if best is None:
            return line
        rows = [(str(one.number), [one.value or 0.0], self._settings(one)) for one in trials if one.is_complete]
        return f"{line} Best: {best.label}, in the artifacts as `{BEST}`.\n\n{best_table([METRIC], rows)}"

    def _write_table(self, path: Path, trials: list[TrialJob]) -> None:
        names = sorted({name for trial in trials for name in self._settings(trial)})
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["number", "state", METRIC, "seconds", *names, "reason", "run", "job"])
            for trial in trials:
                child, settings = self._children[trial.name], self._settings(trial)
                seconds = round((trial.ended - trial.created).total_seconds(), 1)
                table.writerow(
                    [trial.number, child.data.tags.get("trial.state"), trial.value, seconds]
                    + [settings.get(name) for name in names]
                    + [trial.failure, child.info.run_id, trial.name]
                )

    def _write_best(self, folder: Path, search: TuningJob, best: TrialJob, count: int) -> None:
        """The best trial's own experiment under a header that says where it is from."""
        run_id = self._children[best.name].info.run_id
        own = Path(self._client.download_artifacts(run_id, EXPERIMENT, str(folder)))
        header = (
            f"# stocktake {TRAINED_BY[search.stage]} --experiment {BEST}\n#\n"
            f"# Trial {best.number} of {count} in {search.name}: {METRIC} {best.value:.4g}.\n"
        )
        (folder / BEST).write_text(header + own.read_text(encoding="utf-8"), encoding="utf-8")


def search_tags(aws: Aws, search: TuningJob) -> dict[str, str]:
    """What the run says about its tuning job."""
    return {
        "stage": "tune",
        "job.name": search.name,
        "job.arn": search.arn,
        "job.state": search.step,
        "job.logs": search.log_link(aws.region),
        "job.instance": f"{search.workers} x {search.instance_count} x {search.instance_type}",
        "job.spot": str(search.is_spot).lower(),
        "job.strategy": search.strategy,
    }


def _milliseconds(moment: Any) -> int:
    return int(moment.timestamp() * 1000)
