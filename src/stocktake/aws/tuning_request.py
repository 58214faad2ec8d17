"""The request for a tuning job: a search, and the training job that each of its trials is."""

from __future__ import annotations

import datetime
import re
import secrets
from typing import Any

from stocktake.aws.parameters import Parameters
from stocktake.aws.request import PREFIX, TUNING_NAME, Inputs, check_request, definition, tags_of
from stocktake.aws.search import Search, check_number, names, parameter_ranges
from stocktake.aws.settings import JobSettings

PARENT = "STOCKTAKE_TUNING_RUN"
"""Variable of the training jobs: the tuning job's run in MLflow, which theirs are children of."""
METRIC = "val/macro_f1"
_EPOCH_LINE = r"val_macro_f1=([0-9.]+)"


def tuning_name() -> str:
    """The same of a tuning job, within AWS's 32 characters: stocktake-tune-260131-101502-1a2."""
    moment = datetime.datetime.now(datetime.UTC).strftime("%y%m%d-%H%M%S")
    return f"{PREFIX}tune-{moment}-{secrets.token_hex(2)[:3]}"


def is_tuning_name(name: str) -> bool:
    """Whether it is a tuning job's."""
    return re.fullmatch(TUNING_NAME, name) is not None


def tuning_job(
    name: str,
    settings: JobSettings,
    parameters: Parameters,
    search: Search,
    inputs: Inputs,
    *,
    run_id: str,
) -> dict[str, Any]:
    """What `create_hyper_parameter_tuning_job` is given.

    Its training jobs start what the image starts with `train`: a tuning job has no entry point. They keep their run
    to themselves; whoever watches the tuning job gives it to MLflow, as a child of `run_id`.

    Raises:
        StocktakeError: AWS would refuse it; names the setting.
    """
    check_number(search.space, parameters.hyperparameters)
    static = {key: value for key, value in parameters.hyperparameters.items() if key not in names(search.space)}
    defined = definition(settings, parameters, inputs, {PARENT: run_id}) | {"StaticHyperParameters": static}
    defined["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": METRIC, "Regex": _EPOCH_LINE}]
    if settings.spot:  # an interruption is what they are for; a trial below a name of its own, as all share the prefix
        defined["CheckpointConfig"] = {"S3Uri": f"{settings.place}/checkpoints/{name}"}
    limits = {"MaxNumberOfTrainingJobs": search.trials, "MaxParallelTrainingJobs": search.workers}
    config: dict[str, Any] = {
        "Strategy": search.strategy,
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": METRIC},
        "ResourceLimits": limits,
        "ParameterRanges": parameter_ranges(search.space),
        "TrainingJobEarlyStoppingType": "Auto" if search.stops_early else "Off",
        "RandomSeed": search.seed,
    }
    if search.strategy == "Hyperband":
        config["StrategyConfig"] = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": search.max_epochs}}
    request: dict[str, Any] = {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": config,
        "TrainingJobDefinition": defined,
        "Tags": tags_of(settings, parameters),
    }
    if settings.warm_start:
        parents = [{"HyperParameterTuningJobName": one} for one in settings.warm_start]
        request["WarmStartConfig"] = {
            "ParentHyperParameterTuningJobs": parents,
            "WarmStartType": settings.warm_start_type,
        }
    check_request(request, "CreateHyperParameterTuningJob")
    return request
