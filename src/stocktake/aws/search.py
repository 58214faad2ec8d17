"""A search as SageMaker can do it: the strategy, the ranges of a space, and back from its choices to settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FixedTrial

from stocktake.config import RemoteTrialConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import Scalar, fit_value, setting_type
from stocktake.tuning.search_defaults import STAGES, TRIALS, StageConfig, choose_pruner, find_space, stage_config
from stocktake.tuning.space import Choice, Dimension, Range, Space

OF_THE_SEARCH = frozenset(one.name for one in dataclasses.fields(TuneConfig)) - {
    one.name for one in dataclasses.fields(RemoteTrialConfig)
}
"""Settings of `tune` that say how is searched: no trial is given them."""
_REFUSED = {
    "storage": "SageMaker keeps the search itself: leave it out",
    "resume": "it is a folder of this machine: name an earlier tuning job as warm_start in the backend config",
    "warm_start": 'earlier tuning jobs are named in the backend config: "warm_start": ["NAME"]',
    "timeout": "a tuning job ends after its trials, and each of them after max_run_seconds in the backend config",
}
_MOST_NAMES = 100
"""Hyperparameters of a training job."""


@dataclass(frozen=True)
class Search:
    """What `tune` is asked for."""

    stage: str
    space: Space
    strategy: str
    """Bayesian, Random or Hyperband."""
    stops_early: bool
    """Whether SageMaker stops trials that fall behind."""
    trials: int
    workers: int
    """Trials at a time."""
    max_epochs: int
    """The longest that a trial may train."""
    seed: int


def read_search(config: TuneConfig, parameters: Mapping[str, str]) -> Search:
    """What a tuning job is to do, from the settings of the local study.

    Args:
        config: of `tune`; its space is looked for from the current folder.
        parameters: those that were given.

    Raises:
        StocktakeError: a setting that SageMaker cannot do, with what to do instead.
    """
    for name, reason in _REFUSED.items():
        if name in parameters or getattr(config, name):
            raise StocktakeError(f"-P {name} cannot be given to a tuning job: {reason}")
    if len(config.objectives) > 1:
        raise StocktakeError(
            f"-P objectives=[{','.join(config.objectives)}]: a tuning job has one objective; leave it out, or search "
            "on this machine"
        )
    base = stage_config(config)
    space = find_space(config.space, config.stage, base)
    pruner, epochs = choose_pruner(config), int(space.highest("epochs", getattr(base, "epochs", 1)))
    if pruner == "hyperband" and epochs < 2:
        raise StocktakeError(
            f"-P pruner=hyperband weighs epochs, of which {config.stage} has {epochs} here: take another pruner"
        )
    trials = config.trials or TRIALS
    return Search(
        stage=config.stage,
        space=space,
        strategy="Hyperband" if pruner == "hyperband" else {"tpe": "Bayesian", "random": "Random"}[config.sampler],
        stops_early=pruner in ("asha", "median"),
        trials=trials,
        workers=min(config.workers, trials),
        max_epochs=epochs,
        seed=config.seed,
    )


def check_batches(config: TuneConfig, space: Space, processes: int) -> None:
    """Raises StocktakeError where a trial's processes could not share its batch out."""
    tuned = [one for one in space.all_dimensions() if one.setting == "batch_size"]
    choices = [choice for one in tuned if isinstance(one, Choice) for choice in one.choices]
    for size in choices if tuned else [config.batch_size]:
        if isinstance(size, int):
            dataclasses.replace(config, batch_size=size).check_batch(processes)


# Ranges ---------------------------------------------------------------------------------------------------------------


def names(space: Space) -> list[str]:
    """Of the hyperparameters that SageMaker chooses: a dimension's, `training.optimizer=adamw/lr` below a choice."""
    return [one.name for one in space.all_dimensions() if not _is_fixed(one)]


def parameter_ranges(space: Space) -> dict[str, list[dict[str, Any]]]:
    """The space as `ParameterRanges`.

    SageMaker knows no conditions: it chooses for all dimensions, and `chosen_settings` takes those that hold.

    Raises:
        StocktakeError: choices that are the same as text.
    """
    ranges: dict[str, list[dict[str, Any]]] = {
        "ContinuousParameterRanges": [],
        "IntegerParameterRanges": [],
        "CategoricalParameterRanges": [],
    }
    for one in space.all_dimensions():
        if _is_fixed(one):
            continue
        if isinstance(one, Choice):
            texts = [_text(choice) for choice in one.choices]
            if twice := next((text for text in texts if texts.count(text) > 1), None):
                raise StocktakeError(f"-P space: {one.name}: two choices are {twice} as text: keep one of them")
            ranges["CategoricalParameterRanges"].append({"Name": one.name, "Values": texts})
            continue
        # Every value of a stepped range gets `step` whole numbers, its own and those above: all are equally likely
        high = one.high if one.step is None else int(one.high) + one.step - 1
        bounds = {"MinValue": _text(one.low), "MaxValue": _text(high)}
        scale = {"ScalingType": "Logarithmic" if one.log else "Linear"}
        kind = "ContinuousParameterRanges" if one.step is None else "IntegerParameterRanges"
        ranges[kind].append({"Name": one.name, **bounds, **scale})
    return {kind: found for kind, found in ranges.items() if found}


def check_number(space: Space, static: Mapping[str, str]) -> None:
    """Raises StocktakeError for more hyperparameters than a training job may have."""
    count = len(names(space)) + len(static)
    if count > _MOST_NAMES:
        raise StocktakeError(f"{count} hyperparameters: a tuning job has {_MOST_NAMES} at most, tuned and fixed ones")
    if not names(space):
        raise StocktakeError("-P space: nothing in it varies: a tuning job needs a range")


def chosen_settings(space: Space, chosen: Mapping[str, str]) -> dict[str, Any]:
    """A trial's settings by their dotted names: what SageMaker has chosen, without what does not hold.

    Args:
        space: of the search.
        chosen: texts by the names of `names`, and others, which are not looked at.

    Raises:
        StocktakeError: a name is missing, or a text is none of the space's.
    """
    try:
        return space.suggest(FixedTrial({one.name: _value(one, chosen) for one in space.all_dimensions()}))
    except (KeyError, ValueError) as error:
        raise StocktakeError(f"the hyperparameters are not of this search's space: {error}") from None


def as_options(stage: str, settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    config: StageConfig = STAGES[stage]()
    options = []
    for setting, value in settings.items():
        options += [f"--{setting}", _text(fit_value(value, setting_type(config, setting)))]
    return options


def _is_fixed(dimension: Dimension) -> bool:
    """Whether it has one value only, which AWS would not take for a range."""
    return isinstance(dimension, Range) and dimension.low == dimension.high


def _value(dimension: Dimension, chosen: Mapping[str, str]) -> Scalar:
    if isinstance(dimension, Choice):
        return {_text(choice): choice for choice in dimension.choices}[chosen[dimension.name]]
    if _is_fixed(dimension):
        return dimension.low if dimension.step is None else int(dimension.low)
    number = min(max(float(chosen[dimension.name]), dimension.low), dimension.high + (dimension.step or 1) - 1)
    if dimension.step is None:
        return min(number, dimension.high)
    low, step = int(dimension.low), dimension.step
    return low + (round(number) - low) // step * step


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
