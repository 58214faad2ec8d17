"""Tuning jobs that search: optuna chooses hyperparameters, training jobs try them, the best is named."""

from __future__ import annotations

import json
import math
import secrets
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from moto.core.responses import ActionResult
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import HyperParameterTuningJob, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local.context import EmulatorContext
from sagemaker_local.jobs import Job, JobError, Operations, check_new, job_operations
from sagemaker_local.listings import page
from sagemaker_local.service_model import require
from sagemaker_local.training_jobs import TrainingJob, check_request, create_job

if TYPE_CHECKING:
    import optuna

OBJECTIVE_PARAMETER = "_tuning_objective_metric"
"""SageMaker gives it to every training job, beside the hyperparameters."""
_OBJECTIVE = "FinalHyperParameterTuningJobObjectiveMetric"
_STATES = {"Completed": "Completed", "Failed": "NonRetryableError", "Stopped": "Stopped"}
_LEAST_FOR_MEDIAN = 3
"""Jobs that must have ended before a running one is stopped for being worse than they were."""
_LOGARITHMIC_FROM = 100
"""Ratio of a range's bounds from which ScalingType Auto is logarithmic."""


@dataclass
class Trial:
    """One training job of the search."""

    trial: optuna.trial.Trial
    job: TrainingJob
    hyperparameters: dict[str, str]
    """Those that were chosen."""
    reported: int = 0
    """Values that optuna knows."""
    is_recorded: bool = False
    """True once optuna knows its end."""


class TuningJob(Job):
    """One search."""

    KIND: ClassVar[str] = "HyperParameterTuningJob"
    ARN_KIND: ClassVar[str] = "hyper-parameter-tuning-job"

    def __init__(self, context: EmulatorContext, backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
        super().__init__(context, backend, request)
        self.config: dict[str, Any] = request["HyperParameterTuningJobConfig"]
        self.trials: list[Trial] = []
        objective = self.config["HyperParameterTuningJobObjective"]
        self.metric: str = objective["MetricName"]
        self.maximizes = objective["Type"] == "Maximize"
        self.description |= {name: self.config[name] for name in ("Strategy", "ResourceLimits")}

    def describe(self) -> dict[str, Any]:
        """Return DescribeHyperParameterTuningJob's answer."""
        trials = list(self.trials)
        states = Counter(_STATES.get(trial.job.status, "InProgress") for trial in trials)
        objectives = Counter(self._objective_status(trial) for trial in trials)
        described = super().describe() | {
            "TrainingJobStatusCounters": {
                state: states[state]
                for state in ("Completed", "InProgress", "RetryableError", "NonRetryableError", "Stopped")
            },
            "ObjectiveStatusCounters": {state: objectives[state] for state in ("Succeeded", "Pending", "Failed")},
        }
        values = [(value, trial) for trial in trials if (value := self.value(trial)) is not None]
        if values:
            best = (max if self.maximizes else min)(values, key=lambda pair: pair[0])[1]
            described["BestTrainingJob"] = self.describe_trial(best)
        return described

    def describe_trial(self, trial: Trial) -> dict[str, Any]:
        """Return a row of ListTrainingJobsForHyperParameterTuningJob's answer."""
        job = trial.job.describe()
        members = "TrainingJobName TrainingJobArn CreationTime TrainingStartTime TrainingEndTime TrainingJobStatus"
        described = {member: job[member] for member in (*members.split(), "FailureReason") if member in job}
        described |= {"TunedHyperParameters": trial.hyperparameters, "ObjectiveStatus": self._objective_status(trial)}
        value = self.value(trial)
        if value is not None:
            kind = "Maximize" if self.maximizes else "Minimize"
            described[_OBJECTIVE] = {"MetricName": self.metric, "Value": value, "Type": kind}
        return described

    def value(self, trial: Trial) -> float | None:
        """Return the objective of a trial that has completed, or was stopped after it had one."""
        final = trial.job.metrics.final.get(self.metric)
        if final is None or trial.job.status not in ("Completed", "Stopped"):
            return None
        return float(final["Value"]) if math.isfinite(final["Value"]) else None

    def _objective_status(self, trial: Trial) -> str:
        if not trial.job.has_ended:
            return "Pending"
        return "Failed" if self.value(trial) is None else "Succeeded"

    def run(self) -> str:
        """Search; when that is not possible, stop the training jobs."""
        try:
            self._search()
        except BaseException:
            for trial in self.trials:
                trial.job.stop()
            raise
        if self._stopping.is_set():
            return "Stopped"
        if all(self.value(trial) is None for trial in self.trials):
            raise JobError(
                "All training jobs failed. Please take a look at the training jobs failures to get more details."
            )
        return "Completed"

    def _search(self) -> None:
        from optuna.trial import TrialState

        limits = self.config["ResourceLimits"]
        most, parallel = limits["MaxNumberOfTrainingJobs"], limits["MaxParallelTrainingJobs"]
        study = self._study()
        early = self.config.get("TrainingJobEarlyStoppingType") == "Auto" or self.config["Strategy"] == "Hyperband"
        while True:
            for trial in [trial for trial in self.trials if not trial.is_recorded]:
                has_ended = trial.job.has_ended
                is_hopeless = self._is_hopeless(trial)
                if has_ended:
                    trial.is_recorded = True
                    value = self.value(trial)
                    study.tell(trial.trial, value, state=TrialState.FAIL if value is None else None)
                elif self._stopping.is_set() or (early and is_hopeless):
                    trial.job.stop()
            running = sum(not trial.is_recorded for trial in self.trials)
            is_over = self._stopping.is_set() or len(self.trials) >= most
            if is_over and not running:
                return
            if running < parallel and not is_over:
                self.trials.append(self._try(study))
                continue
            self._woken.wait(0.5)
            self._woken.clear()

    def _try(self, study: optuna.Study) -> Trial:
        trial = study.ask(distributions_of(self.config["ParameterRanges"]))
        chosen = {name: value if isinstance(value, str) else json.dumps(value) for name, value in trial.params.items()}
        definition = dict(self._request["TrainingJobDefinition"])
        static = definition.pop("StaticHyperParameters", None) or {}
        request = definition | {
            "TrainingJobName": f"{self.name}-{len(self.trials) + 1:03d}-{secrets.token_hex(4)}",
            "HyperParameters": static | chosen | {OBJECTIVE_PARAMETER: self.metric},
            "Tags": self.tags,
        }
        job = create_job(self._context, self._backend, request)
        job.description["TuningJobArn"] = self.arn
        job.on_end = self._woken.set
        job.start()
        return Trial(trial, job, chosen)

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
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_LEAST_FOR_MEDIAN)
        study = optuna.create_study(
            sampler=sampler, pruner=pruner, direction="maximize" if self.maximizes else "minimize"
        )
        distributions = distributions_of(self.config["ParameterRanges"])
        for name in _parents(self._request):
            parent = cast("TuningJob", self._backend.hyper_parameter_tuning_jobs[name])
            for earlier in parent.trials:
                params, value = earlier.trial.params, parent.value(earlier)
                # Choices outside this search's ranges teach it nothing.
                if (
                    value is not None
                    and params.keys() == distributions.keys()
                    and all(
                        distribution._contains(distribution.to_internal_repr(params[name]))
                        for name, distribution in distributions.items()
                    )
                ):
                    study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
        return study

    def _is_hopeless(self, trial: Trial) -> bool:
        """Report what a trial has measured; True if it is worse than the median of the ended ones at that point."""
        values = trial.job.metrics.values.get(self.metric, [])
        for step in range(trial.reported, len(values)):
            if math.isfinite(values[step]):
                trial.trial.report(values[step], step)
        trial.reported = len(values)
        return not trial.job.has_ended and trial.trial.should_prune()


def distributions_of(ranges: dict[str, Any]) -> dict[str, Any]:
    """Return optuna's distributions of a request's ParameterRanges.

    Raises:
        ValidationError: bounds that are none.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    kinds: list[tuple[str, Any, Any]] = [
        ("IntegerParameterRanges", int, IntDistribution),
        ("ContinuousParameterRanges", float, FloatDistribution),
    ]
    for kind, convert, distribution in kinds:
        for bounds in ranges.get(kind, []):
            try:
                low, high = convert(bounds["MinValue"]), convert(bounds["MaxValue"])
                scale = bounds.get("ScalingType", "Auto")
                is_log = scale == "Logarithmic" or (scale == "Auto" and low > 0 and high / low >= _LOGARITHMIC_FROM)
                distributions[bounds["Name"]] = distribution(low, high, log=is_log)
            except ValueError as error:
                raise ValidationError(message=f"Invalid range of hyperparameter {bounds['Name']}: {error}") from None
    for choices in ranges.get("CategoricalParameterRanges", []):
        distributions[choices["Name"]] = CategoricalDistribution(choices["Values"])
    return distributions


def operations(context: EmulatorContext) -> Operations:
    """Return this module's operations of SageMaker's API."""

    def create(backend: SageMakerModelBackend, request: dict[str, Any]) -> TuningJob:
        _check(backend, request)
        job = TuningJob(context, backend, request)
        backend.hyper_parameter_tuning_jobs[job.name] = cast("HyperParameterTuningJob", job)
        return job

    own, find = job_operations(TuningJob, create)

    def list_training_jobs_for_hyper_parameter_tuning_job(response: SageMakerResponse) -> ActionResult:
        job: TuningJob = find(response)
        rows = [job.describe_trial(trial) for trial in list(job.trials)]
        if response.params.get("SortBy") == "FinalObjectiveMetricValue":
            # Of the jobs that have one, as AWS lists them.
            rows = [row | {"Objective": row[_OBJECTIVE]["Value"]} for row in rows if _OBJECTIVE in row]
        return ActionResult(page(rows, response.params, "TrainingJobSummaries", "TrainingJob"))

    own["list_training_jobs_for_hyper_parameter_tuning_job"] = list_training_jobs_for_hyper_parameter_tuning_job
    return own


def _parents(request: dict[str, Any]) -> list[str]:
    parents = (request.get("WarmStartConfig") or {}).get("ParentHyperParameterTuningJobs", [])
    return [parent["HyperParameterTuningJobName"] for parent in parents]


def _check(backend: SageMakerModelBackend, request: dict[str, Any]) -> None:
    """Raise ValidationError or ResourceInUseException if AWS would refuse the search."""
    jobs = backend.hyper_parameter_tuning_jobs
    check_new("Tuning job", request["HyperParameterTuningJobName"], jobs)
    require(request, "TrainingJobDefinition", "HyperParameterTuningJobConfig.HyperParameterTuningJobObjective")
    require(request, "HyperParameterTuningJobConfig.ParameterRanges")
    require(request, "HyperParameterTuningJobConfig.ResourceLimits.MaxNumberOfTrainingJobs")
    config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
    metric = config["HyperParameterTuningJobObjective"]["MetricName"]
    metrics = definition["AlgorithmSpecification"].get("MetricDefinitions", [])
    if metric not in [defined["Name"] for defined in metrics]:
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
    for name in _parents(request):
        if name not in jobs or not cast("TuningJob", jobs[name]).has_ended:
            raise ValidationError(message=f"Parent {name} does not exist or still runs.")
    check_request(backend, definition)
