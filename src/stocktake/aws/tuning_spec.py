"""A search as SageMaker can do it: the strategy, the ranges of a space, and back from its choices to settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from stocktake.config.aws import RemoteTrialConfig
from stocktake.config.training import TuneConfig
from stocktake.errors import StocktakeError
from stocktake.stages.table import STAGES, stage_config
from stocktake.tuning.config_overrides import flat_settings, with_overrides
from stocktake.tuning.space import Distribution, Space, find_space, parse_space
from stocktake.tuning.study import TRIALS, choose_pruner

SEARCH_SETTINGS = frozenset(field.name for field in dataclasses.fields(TuneConfig)) - {
    field.name for field in dataclasses.fields(RemoteTrialConfig)
}
"""Settings of `tune` that say how to search: no trial gets them."""
_REFUSED = {
    "storage": "SageMaker keeps the search itself: leave it out",
    "study": "SageMaker keeps the search itself: leave it out",
    "resume": "it is a folder of this machine: name an earlier tuning job as warm_start in the backend config",
    "warm_start": 'earlier tuning jobs are named in the backend config: "warm_start": ["NAME"]',
    "timeout": "a tuning job ends after its trials, and each of them after max_run_seconds in the backend config",
    "objectives": "a tuning job has one objective, macro_f1: leave it out, or search on this machine",
}


@dataclass(frozen=True)
class TuningSpec:
    """What `tune` is asked for."""

    space: Space
    ranges: dict[str, list[dict[str, Any]]]
    """The space as `ParameterRanges`."""
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


def read_tuning_spec(config: TuneConfig, parameters: Mapping[str, str]) -> TuningSpec:
    """What a tuning job is to do, from the settings of the local study.

    Args:
        config: of `tune`; its space is looked for from the current folder.
        parameters: those that the user gave.

    Raises:
        StocktakeError: a setting that SageMaker cannot do, with what to do instead.
    """
    default = TuneConfig()
    for name, reason in _REFUSED.items():
        if getattr(config, name) != getattr(default, name) or (name in parameters and name != "objectives"):
            raise StocktakeError(f"-P {name} cannot be given to a tuning job: {reason}")
    base = stage_config(config)
    space = find_space(config.space, STAGES[config.stage].search_space, base)
    if not tuned_names(space):
        raise StocktakeError("-P space: nothing in it varies: a tuning job needs a range")
    pruner, epochs = choose_pruner(config), int(space.highest("epochs", getattr(base, "epochs", 1)))
    if pruner == "hyperband" and epochs < 2:
        raise StocktakeError(
            f"-P pruner=hyperband weighs epochs, of which {config.stage} has {epochs} here: take another pruner"
        )
    trials = config.trials or TRIALS
    return TuningSpec(
        space=space,
        ranges=parameter_ranges(space),
        strategy="Hyperband" if pruner == "hyperband" else {"tpe": "Bayesian", "random": "Random"}[config.sampler],
        stops_early=pruner in ("asha", "median"),
        trials=trials,
        workers=min(config.workers, trials),
        max_epochs=epochs,
        seed=config.seed,
    )


def load_space(text: str, stage: str) -> Space:
    """The space of a tuning job, from the file that was uploaded for its trials.

    Raises:
        StocktakeError: the file holds none.
    """
    try:
        content = json.loads(text)
    except ValueError:
        raise StocktakeError(f"the tuning job's search space cannot be read: {text[:80]!r}") from None
    return parse_space(content, STAGES[stage].config(), "the tuning job's search space")


def tuned_names(space: Space) -> list[str]:
    """The settings that SageMaker chooses: all but those with one value, which AWS does not take for a range."""
    return [
        name
        for name, distribution in space.distributions.items()
        if isinstance(distribution, CategoricalDistribution) or not distribution.single()
    ]


def parameter_ranges(space: Space) -> dict[str, list[dict[str, Any]]]:
    """The space as `ParameterRanges`.

    Raises:
        StocktakeError: choices that are the same as text.
    """
    ranges: dict[str, list[dict[str, Any]]] = {}
    for name in tuned_names(space):
        distribution = space.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            texts = [_text(choice) for choice in distribution.choices]
            if len(set(texts)) < len(texts):
                raise StocktakeError(f"-P space: {name}: two of {', '.join(texts)} are the same as text: keep one")
            ranges.setdefault("CategoricalParameterRanges", []).append({"Name": name, "Values": texts})
            continue
        kind, high = "ContinuousParameterRanges", float(distribution.high)
        if isinstance(distribution, IntDistribution):
            # Every value of a stepped range gets `step` whole numbers, its own and those above: all are equally likely
            kind, high = "IntegerParameterRanges", distribution.high + distribution.step - 1
        bounds = {"MinValue": _text(distribution.low), "MaxValue": _text(high)}
        scale = {"ScalingType": "Logarithmic" if distribution.log else "Linear"}
        ranges.setdefault(kind, []).append({"Name": name, **bounds, **scale})
    return ranges


def chosen_settings(space: Space, chosen: Mapping[str, str]) -> dict[str, Any]:
    """A trial's settings by their dotted names.

    Args:
        space: of the search.
        chosen: texts by the names of `tuned_names`, as SageMaker chose them; others are not looked at.

    Raises:
        StocktakeError: a name is missing, or a text is none of the space's.
    """
    try:
        return {name: _value(distribution, chosen.get(name)) for name, distribution in space.distributions.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise StocktakeError(f"the hyperparameters are not of this search's space: {error}") from None


def as_options(stage: str, settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    values = flat_settings(with_overrides(STAGES[stage].config(), settings))
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
