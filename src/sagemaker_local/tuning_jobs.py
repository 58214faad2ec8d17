"""Tuning jobs that search: optuna chooses hyperparameters, training jobs try them, the best is named."""

from __future__ import annotations

import json
import math
import secrets
import statistics
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ResourceNotFound, ValidationError
from moto.sagemaker.models import HyperParameterTuningJob, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter

from sagemaker_local import checks
from sagemaker_local.containers import Machine
from sagemaker_local.listings import page
from sagemaker_local.ranges import distributions_of
from sagemaker_local.training_jobs import TrainingJob, check_job, create_job

if TYPE_CHECKING:
    import optuna

OBJECTIVE_PARAMETER = "_tuning_objective_metric"
"""SageMaker gives it to every training job, beside the hyperparameters."""
_NAME_CHARACTERS = 32
_KINDS = {"Completed": "Completed", "Failed": "NonRetryableError", "Stopped": "Stopped"}
_LEAST_FOR_MEDIAN = 3
"""Jobs that must have ended before a running one is stopped for being worse than they were."""


class Trial:
    """One training job of the search."""

    def __init__(self, asked: optuna.trial.Trial, job: TrainingJob, chosen: dict[str, str]) -> None:
        self.asked, self.job, self.chosen = asked, job, chosen
        self.error_recorded = False


class TuningJob:
    """One search: what is told about it, and the thread that runs it."""

    def __init__(self, machine: Machine, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        self.name: str = request["HyperParameterTuningJobName"]
        self.arn = arn_formatter("hyper-parameter-tuning-job", self.name, backend.account_id, backend.region_name)
        self.tags: list[dict[str, str]] = request.get("Tags") or []
        self.config: dict[str, Any] = request["HyperParameterTuningJobConfig"]
        self.definition: dict[str, Any] = request["TrainingJobDefinition"]
        self.trials: list[Trial] = []
        self._machine, self._backend, self._request = machine, backend, request
        self._woken, self._stopping = threading.Event(), threading.Event()
        objective = self.config["HyperParameterTuningJobObjective"]
        self.metric: str = objective["MetricName"]
        self.maximizes = objective["Type"] == "Maximize"
        now = utcnow()
        parts = ("HyperParameterTuningJobName", "HyperParameterTuningJobConfig", "TrainingJobDefinition")
        self.facts: dict[str, Any] = {part: request[part] for part in parts} | {
            "HyperParameterTuningJobArn": self.arn,
            "HyperParameterTuningJobStatus": "InProgress",
            "Strategy": self.config["Strategy"],
            "ResourceLimits": self.config["ResourceLimits"],
            "CreationTime": now,
            "LastModifiedTime": now,
        }
        if request.get("WarmStartConfig"):
            self.facts["WarmStartConfig"] = request["WarmStartConfig"]

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def stop(self) -> None:
        """Ask it to end: its training jobs are stopped."""
        if self.facts["HyperParameterTuningJobStatus"] == "InProgress":
            self.facts |= {"HyperParameterTuningJobStatus": "Stopping", "LastModifiedTime": utcnow()}
            self._stopping.set()
            self._woken.set()

    def describe(self) -> dict[str, Any]:
        """As DescribeHyperParameterTuningJob answers."""
        trials = list(self.trials)
        states = Counter(_KINDS.get(trial.job.facts["TrainingJobStatus"], "InProgress") for trial in trials)
        objectives = Counter(self._objective_status(trial) for trial in trials)
        described = self.facts | {
            "TrainingJobStatusCounters": {
                kind: states[kind]
                for kind in ("Completed", "InProgress", "RetryableError", "NonRetryableError", "Stopped")
            },
            "ObjectiveStatusCounters": {kind: objectives[kind] for kind in ("Succeeded", "Pending", "Failed")},
        }
        scored = [(value, trial) for trial in trials if (value := self.value(trial)) is not None]
        if scored:
            best = (max if self.maximizes else min)(scored, key=lambda one: one[0])[1]
            described["BestTrainingJob"] = self.describe_trial(best)
        return described

    def describe_trial(self, trial: Trial) -> dict[str, Any]:
        """As ListTrainingJobsForHyperParameterTuningJob answers."""
        facts = trial.job.describe()
        parts = "TrainingJobName TrainingJobArn CreationTime TrainingStartTime TrainingEndTime TrainingJobStatus"
        described = {part: facts[part] for part in (*parts.split(), "FailureReason") if part in facts}
        described |= {"TunedHyperParameters": trial.chosen, "ObjectiveStatus": self._objective_status(trial)}
        value = self.value(trial)
        if value is not None:
            metric = {"MetricName": self.metric, "Value": value}
            described["FinalHyperParameterTuningJobObjectiveMetric"] = metric | {
                "Type": "Maximize" if self.maximizes else "Minimize"
            }
        return described

    def value(self, trial: Trial) -> float | None:
        """The objective of a trial that has ended well, or was stopped after it had one."""
        final = trial.job.metrics.final.get(self.metric)
        if final is None or not trial.job.has_ended or trial.job.facts["TrainingJobStatus"] == "Failed":
            return None
        return float(final["Value"]) if math.isfinite(final["Value"]) else None

    def _objective_status(self, trial: Trial) -> str:
        if not trial.job.has_ended:
            return "Pending"
        return "Failed" if self.value(trial) is None else "Succeeded"

    def _run(self) -> None:
        reason = ""
        try:
            self._search()
        except Exception as error:  # whatever it is must end the search: it would be in progress for ever
            reason = f"InternalServerError: {type(error).__name__}: {error}"
            for trial in self.trials:
                trial.job.stop()
        if not reason and not self._stopping.is_set() and all(self.value(trial) is None for trial in self.trials):
            reason = "All training jobs failed. Please take a look at the training jobs failures to get more details."
        status = "Stopped" if self._stopping.is_set() else "Failed" if reason else "Completed"
        now = utcnow()
        self.facts |= {"HyperParameterTuningEndTime": now, "LastModifiedTime": now}
        if reason:
            self.facts["FailureReason"] = reason
        self.facts["HyperParameterTuningJobStatus"] = status

    def _search(self) -> None:
        limits = self.config["ResourceLimits"]
        study = self._study()
        most, width = limits["MaxNumberOfTrainingJobs"], limits["MaxParallelTrainingJobs"]
        stops_early = (
            self.config.get("TrainingJobEarlyStoppingType") == "Auto" or self.config["Strategy"] == "Hyperband"
        )
        while True:
            for trial in self.trials:
                if trial.job.has_ended and not trial.error_recorded:
                    trial.error_recorded = True
                    value = self.value(trial)
                    study.tell(trial.asked, value, state=None if value is not None else _failed())
                elif self._stopping.is_set() or (stops_early and self._is_hopeless(trial)):
                    trial.job.stop()
            running = sum(not trial.error_recorded for trial in self.trials)
            if not running and (self._stopping.is_set() or len(self.trials) >= most):
                return
            if running < width and len(self.trials) < most and not self._stopping.is_set():
                self.trials.append(self._try(study))
                continue
            self._woken.wait(0.5)
            self._woken.clear()

    def _try(self, study: optuna.Study) -> Trial:
        asked = study.ask(distributions_of(self.config["ParameterRanges"]))
        chosen = {name: _text(value) for name, value in asked.params.items()}
        number = f"{len(self.trials) + 1:03d}"
        request = {
            part: value
            for part, value in self.definition.items()
            if part not in ("DefinitionName", "TuningObjective", "HyperParameterRanges", "StaticHyperParameters")
        }
        request |= {
            "TrainingJobName": f"{self.name}-{number}-{secrets.token_hex(4)}",
            "HyperParameters": {
                **(self.definition.get("StaticHyperParameters") or {}),
                **chosen,
                OBJECTIVE_PARAMETER: self.metric,
            },
            "Tags": self.tags,
        }
        job = create_job(self._machine, self._backend, request)
        job.facts["TuningJobArn"] = self.arn
        job.on_end = self._woken.set
        job.start()
        return Trial(asked, job, chosen)

    def _study(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        seed = self.config.get("RandomSeed", zlib.crc32(self.name.encode()))
        # Hyperband's brackets are left out: random choices, and the worse half of the running jobs is stopped early.
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
            if self.config["Strategy"] == "Bayesian"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        study = optuna.create_study(sampler=sampler, direction="maximize" if self.maximizes else "minimize")
        distributions = distributions_of(self.config["ParameterRanges"])
        for parent in (self._request.get("WarmStartConfig") or {}).get("ParentHyperParameterTuningJobs", []):
            there = self._backend.hyper_parameter_tuning_jobs[parent["HyperParameterTuningJobName"]]
            for trial in cast("TuningJob", there).trials:
                value = cast("TuningJob", there).value(trial)
                if value is not None and trial.asked.params.keys() == distributions.keys():
                    # Choices outside of this search's ranges teach it nothing.
                    fits = all(
                        distributions[name]._contains(distributions[name].to_internal_repr(choice))
                        for name, choice in trial.asked.params.items()
                    )
                    if fits:
                        study.add_trial(
                            optuna.trial.create_trial(
                                params=trial.asked.params, distributions=distributions, value=value
                            )
                        )
        return study

    def _is_hopeless(self, trial: Trial) -> bool:
        """SageMaker's median rule: worse than the median of what ended jobs had on average up to the same point."""
        values = list(trial.job.metrics.values.get(self.metric, []))
        others = [
            list(other.job.metrics.values[self.metric])
            for other in self.trials
            if other.error_recorded and self.metric in other.job.metrics.values
        ]
        if not values or len(others) < _LEAST_FOR_MEDIAN or trial.job.has_ended:
            return False
        median = statistics.median(statistics.fmean(other[: len(values)]) for other in others)
        best = max(values) if self.maximizes else min(values)
        return best < median if self.maximizes else best > median


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check(backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
    """Raises ValidationError or ResourceInUseException: AWS would refuse the search."""
    name, jobs = request["HyperParameterTuningJobName"], backend.hyper_parameter_tuning_jobs
    checks.check_new("Tuning job", name, cast("dict[str, Any]", jobs), name)
    checks.require(request, "TrainingJobDefinition", "HyperParameterTuningJobConfig.HyperParameterTuningJobObjective")
    checks.require(request, "HyperParameterTuningJobConfig.ParameterRanges")
    checks.require(request, "HyperParameterTuningJobConfig.ResourceLimits.MaxNumberOfTrainingJobs")
    config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    if config["Strategy"] not in ("Bayesian", "Random", "Hyperband"):
        raise ValidationError(message=f"Strategy {config['Strategy']} is not here: Bayesian, Random and Hyperband are.")
    metric = config["HyperParameterTuningJobObjective"]["MetricName"]
    metrics = definition["AlgorithmSpecification"].get("MetricDefinitions", [])
    if metric not in [one["Name"] for one in metrics]:
        raise ValidationError(
            message=f"A metric is required for this hyperparameter tuning job objective. Provide {metric} in the "
            "metric definitions."
        )
    distributions = distributions_of(config["ParameterRanges"])
    if not distributions:
        raise ValidationError(message="At least one hyperparameter range is required.")
    static = definition.get("StaticHyperParameters") or {}
    if both := sorted(static.keys() & distributions.keys()):
        raise ValidationError(message=f"Static and tuned hyperparameters must be disjoint: {', '.join(both)}.")
    for parent in (request.get("WarmStartConfig") or {}).get("ParentHyperParameterTuningJobs", []):
        there = jobs.get(parent["HyperParameterTuningJobName"])
        if there is None or "HyperParameterTuningEndTime" not in cast("TuningJob", there).facts:
            raise ValidationError(
                message=f"Parent {parent['HyperParameterTuningJobName']} is not there, or still runs."
            )
    check_job(backend, definition)


def operations(machine: Machine) -> dict[str, Callable[[SageMakerResponse], ActionResult]]:
    """Of SageMaker's API, by moto's names for them."""

    def create_hyper_parameter_tuning_job(response: SageMakerResponse) -> ActionResult:
        request, backend = response.params, response.sagemaker_backend
        _check(backend, request)
        job = TuningJob(machine, backend, request)
        backend.hyper_parameter_tuning_jobs[job.name] = cast("HyperParameterTuningJob", job)
        job.start()
        return ActionResult({"HyperParameterTuningJobArn": job.arn})

    def describe_hyper_parameter_tuning_job(response: SageMakerResponse) -> ActionResult:
        return ActionResult(_find(response).describe())

    def stop_hyper_parameter_tuning_job(response: SageMakerResponse) -> ActionResult:
        _find(response).stop()
        return EmptyResult()

    def list_hyper_parameter_tuning_jobs(response: SageMakerResponse) -> ActionResult:
        jobs = cast("dict[str, TuningJob]", response.sagemaker_backend.hyper_parameter_tuning_jobs)
        rows = [job.describe() for job in list(jobs.values())]
        return ActionResult(page(rows, response.params, "HyperParameterTuningJobSummaries", "HyperParameterTuningJob"))

    def list_training_jobs_for_hyper_parameter_tuning_job(response: SageMakerResponse) -> ActionResult:
        job = _find(response)
        rows = [job.describe_trial(trial) for trial in list(job.trials)]
        request = dict(response.params)
        if request.get("SortBy") == "FinalObjectiveMetricValue":
            # Of the jobs that have one, as AWS lists them.
            objective = "FinalHyperParameterTuningJobObjectiveMetric"
            rows = [row | {"Objective": row[objective]["Value"]} for row in rows if objective in row]
        return ActionResult(page(rows, request, "TrainingJobSummaries", "TrainingJob"))

    own = (
        create_hyper_parameter_tuning_job,
        describe_hyper_parameter_tuning_job,
        stop_hyper_parameter_tuning_job,
        list_hyper_parameter_tuning_jobs,
        list_training_jobs_for_hyper_parameter_tuning_job,
    )
    return {function.__name__: function for function in own}


def _find(response: SageMakerResponse) -> TuningJob:
    """Raises ResourceNotFound."""
    job = response.sagemaker_backend.hyper_parameter_tuning_jobs.get(response.params["HyperParameterTuningJobName"])
    if job is None:
        raise ResourceNotFound(message="Requested resource not found.")
    return cast("TuningJob", job)
