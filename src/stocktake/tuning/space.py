"""The search space: which settings a study varies, and within what bounds.

Written in YAML, by the dotted names that the command line has, as Optuna's `suggest_float`, `suggest_int` and
`suggest_categorical` take them:

    lr: {type: float, low: 1e-4, high: 3e-3, log: true}
    training.freeze_epochs: {type: int, low: 0, high: 4, step: 2}
    batch_size: {choices: [16, 32, 64]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import get_setting, with_overrides

Distribution: TypeAlias = FloatDistribution | IntDistribution | CategoricalDistribution

FIXED = frozenset(
    {"root", "list", "limit", "s3", "workspace", "tracking", "split", "task", "synthetic", "resume", "seed"}
)
"""Settings that say what the data and the run are: with them varied, trials could not be compared."""
_KEYS = {"float": {"type", "low", "high", "log"}, "int": {"type", "low", "high", "log", "step"}}
_EXAMPLE = "`{type: float, low: 1e-4, high: 1e-2, log: true}` or `{choices: [16, 32]}`"


@dataclass(frozen=True)
class Space:
    """A checked search space. Two are equal when a study can go on from one with the other."""

    distributions: Mapping[str, Distribution]
    """Setting -> Optuna's distribution, in alphabetical order: the order in a file changes nothing."""

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The trial's settings by their dotted names; a trial that has its values already keeps them."""
        settings: dict[str, Any] = {}
        for name, one in self.distributions.items():
            if isinstance(one, CategoricalDistribution):
                settings[name] = trial.suggest_categorical(name, one.choices)
            elif isinstance(one, IntDistribution):
                settings[name] = trial.suggest_int(name, one.low, one.high, step=one.step, log=one.log)
            else:  # Optuna now and then returns a numpy number, which YAML does not take
                settings[name] = float(trial.suggest_float(name, one.low, one.high, log=one.log))
        return settings

    def params_of(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Optuna's parameters for known settings, as `study.enqueue_trial` takes them.

        Args:
            settings: dotted setting -> value, or its text in an MLflow run: "0.001", "[0.001]", "None". Settings that
                the space does not vary are not looked at.

        Returns:
            None when a value lies outside of the space or is missing.
        """
        params: dict[str, Any] = {}
        for name, distribution in self.distributions.items():
            values = _matching(distribution, settings[name]) if name in settings else []
            if not values:
                return None
            params[name] = values[0]
        return params

    def highest(self, setting: str, default: float) -> float:
        """The largest number that a setting can have in a trial; `default` where the space does not vary it."""
        distribution = self.distributions.get(setting)
        if distribution is None:
            return default
        if isinstance(distribution, CategoricalDistribution):
            return max(float(value) for value in distribution.choices if isinstance(value, int | float))
        return distribution.high

    def to_dict(self) -> dict[str, Any]:
        """The content of its YAML file; `parse_space` reads it."""
        return {name: _describe(distribution) for name, distribution in self.distributions.items()}


def read_space(path: Path, config: Any) -> Space:
    """The search space in a YAML file, checked against a command's config.

    Raises:
        StocktakeError: the file cannot be read, or is no space over the config's settings.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise StocktakeError(f"the search space {path} cannot be read: {' '.join(str(error).split())}") from None
    return parse_space(content, config, str(path))


def find_space(name: str | None, default: Mapping[str, Any], config: Any) -> Space:
    """The search space of a file, or a stage's default one.

    Args:
        name: a path, or NAME of experiments/NAME.space.yaml; None: the default.
        default: content of a stage's default space.
        config: whose settings are varied.

    Raises:
        StocktakeError: no such file, or no space over the config's settings.
    """
    if name is None:
        return parse_space(default, config, "the default space")
    for path in (Path(name), Path("experiments") / f"{name}.space.yaml"):
        if path.is_file():
            return read_space(path, config)
    names = sorted(path.name.removesuffix(".space.yaml") for path in Path("experiments").glob("*.space.yaml"))
    raise StocktakeError(f"--space {name}: no such file; in experiments/ there are: {', '.join(names) or 'none'}")


def parse_space(content: Any, config: Any, origin: str) -> Space:
    """The search space in YAML's content. A config is built with every bound and every choice.

    Args:
        content: what `yaml.safe_load` gives.
        config: the config whose settings are varied, with those that are not.
        origin: names the space in errors, as the file's path does.

    Raises:
        StocktakeError: a setting that does not exist or must not vary, a value that it cannot have, or no space.
    """
    if not isinstance(content, Mapping) or not content:
        raise StocktakeError(f"{origin} must hold settings to vary, such as `lr: {_EXAMPLE}`, not {content!r}")
    distributions: dict[str, Distribution] = {}
    for setting, written in sorted(content.items(), key=lambda item: str(item[0])):
        if str(setting).partition(".")[0] in FIXED:
            raise StocktakeError(f"{origin}: {setting} must be the same for all trials: set --{setting} once")
        try:
            distributions[str(setting)] = _parse_distribution(str(setting), written, config)
        except (ValueError, TypeError, StocktakeError) as error:
            raise StocktakeError(f"{origin}: {setting}: {error}") from None
    return Space(distributions)


def _parse_distribution(setting: str, written: Any, config: Any) -> Distribution:
    if not isinstance(written, Mapping):
        raise TypeError(f"must be {_EXAMPLE}, not {written!r}")
    if written.keys() == {"choices"}:
        choices = written["choices"]
        if not isinstance(choices, list) or not choices or any(isinstance(value, list | dict) for value in choices):
            raise ValueError(f"choices must be a list of single values, not {choices!r}")
        values = [get_setting(with_overrides(config, {setting: choice}), setting) for choice in choices]
        if len({(type(value), value) for value in values}) < len(values):
            raise ValueError(f"a value is twice in the choices {choices!r}")
        return CategoricalDistribution(values)
    kind = written.get("type")
    unknown = written.keys() - _KEYS.get(str(kind), set())
    if kind not in _KEYS or unknown or not {"low", "high"} <= written.keys():
        raise ValueError(f"must be {_EXAMPLE}, not {dict(written)!r}")
    log = written.get("log", False)
    if not isinstance(log, bool):
        raise TypeError(f"log must be true or false, not {log!r}")
    distribution: FloatDistribution | IntDistribution
    if kind == "float":  # YAML 1.1, and so PyYAML, sees text in 1e-4
        distribution = FloatDistribution(float(written["low"]), float(written["high"]), log=log)
        if not (math.isfinite(distribution.low) and math.isfinite(distribution.high)):
            raise ValueError("low and high must be finite")
    else:
        low, high, step = written["low"], written["high"], written.get("step", 1)
        if any(type(value) is not int for value in (low, high, step)) or step < 1:
            raise ValueError("low, high and step of an int must be whole numbers, and step at least 1")
        distribution = IntDistribution(low, high - (high - low) % step, log=log, step=step)
    for bound in (distribution.low, distribution.high):
        value = get_setting(with_overrides(config, {setting: bound}), setting)
        if kind == "float" and not isinstance(value, float):
            raise ValueError("takes whole numbers: write type: int")
    return distribution


def _describe(distribution: Distribution) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"choices": list(distribution.choices)}
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    described: dict[str, Any] = {"type": kind, "low": distribution.low, "high": distribution.high}
    if distribution.log:
        described["log"] = True
    if distribution.step not in (None, 1):
        described["step"] = distribution.step
    return described


def _matching(distribution: Distribution, value: Any) -> list[Any]:
    """The parameter of a distribution that a value, or its text in MLflow, stands for; none outside of it."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and "," not in value:
        value = value.strip("[]()")
    number = _number(value)
    if isinstance(distribution, CategoricalDistribution):
        exact = [one for one in distribution.choices if type(one) is type(value) and one == value]
        return exact or [
            one
            for one in distribution.choices
            if str(one) == str(value) or (number is not None and _number(one) == number)
        ]
    if number is None or not distribution.low <= number <= distribution.high:
        return []
    if isinstance(distribution, FloatDistribution):
        return [number]
    return [int(number)] if (number - distribution.low) % distribution.step == 0 else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
