"""A search as SageMaker can do it: the strategy, the ranges of a space, and back from its choices to settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from stocktake.config import RemoteTrialConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import flat_settings, with_overrides
from stocktake.tuning.search_defaults import DEFAULT_SPACES, STAGES, TRIALS, choose_pruner, stage_config
from stocktake.tuning.space import Distribution, Space, find_space, parse_space

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
    space = find_space(config.space, DEFAULT_SPACES[config.stage], base)
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


# Ranges ---------------------------------------------------------------------------------------------------------------


def load_space(text: str, stage: str) -> Space:
    """The space of a tuning job, from the file that was uploaded for its trials.

    Raises:
        StocktakeError: the file holds none.
    """
    try:
        content = json.loads(text)
    except ValueError:
        raise StocktakeError(f"the tuning job's search space cannot be read: {text[:80]!r}") from None
    return parse_space(content, STAGES[stage](), "the tuning job's search space")


def names(space: Space) -> list[str]:
    """Of the hyperparameters that SageMaker chooses: all but those with one value, which AWS takes for no range."""
    return [
        name
        for name, one in space.distributions.items()
        if isinstance(one, CategoricalDistribution) or not one.single()
    ]


def parameter_ranges(space: Space) -> dict[str, list[dict[str, Any]]]:
    """The space as `ParameterRanges`.

    Raises:
        StocktakeError: choices that are the same as text.
    """
    ranges: dict[str, list[dict[str, Any]]] = {}
    for name in names(space):
        distribution = space.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            texts = [_text(choice) for choice in distribution.choices]
            if twice := next((text for text in texts if texts.count(text) > 1), None):
                raise StocktakeError(f"-P space: {name}: two choices are {twice} as text: keep one of them")
            ranges.setdefault("CategoricalParameterRanges", []).append({"Name": name, "Values": texts})
            continue
        high: float = distribution.high
        if isinstance(distribution, IntDistribution):
            # Every value of a stepped range gets `step` whole numbers, its own and those above: all are equally likely
            high += distribution.step - 1
        bounds = {"MinValue": _text(distribution.low), "MaxValue": _text(high)}
        scale = {"ScalingType": "Logarithmic" if distribution.log else "Linear"}
        kind = "IntegerParameterRanges" if isinstance(distribution, IntDistribution) else "ContinuousParameterRanges"
        ranges.setdefault(kind, []).append({"Name": name, **bounds, **scale})
    return ranges


def check_number(space: Space, static: Mapping[str, str]) -> None:
    """Raises StocktakeError for more hyperparameters than a training job may have."""
    count = len(names(space)) + len(static)
    if count > _MOST_NAMES:
        raise StocktakeError(f"{count} hyperparameters: a tuning job has {_MOST_NAMES} at most, tuned and fixed ones")
    if not names(space):
        raise StocktakeError("-P space: nothing in it varies: a tuning job needs a range")


def chosen_settings(space: Space, chosen: Mapping[str, str]) -> dict[str, Any]:
    """A trial's settings by their dotted names: what SageMaker has chosen.

    Args:
        space: of the search.
        chosen: texts by the names of `names`, and others, which are not looked at.

    Raises:
        StocktakeError: a name is missing, or a text is none of the space's.
    """
    try:
        return {name: _value(distribution, chosen.get(name)) for name, distribution in space.distributions.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise StocktakeError(f"the hyperparameters are not of this search's space: {error}") from None


def as_options(stage: str, settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    values = flat_settings(with_overrides(STAGES[stage](), settings))
    return [word for setting in settings for word in (f"--{setting}", _text(values[setting]))]


def _value(distribution: Distribution, chosen: str | None) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return {_text(choice): choice for choice in distribution.choices}[str(chosen)]
    if distribution.single():
        return distribution.low
    number = float(str(chosen))
    if isinstance(distribution, IntDistribution):
        low, step = distribution.low, distribution.step
        number = min(max(number, low), distribution.high + step - 1)
        return low + (round(number) - low) // step * step
    return min(max(number, distribution.low), distribution.high)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
