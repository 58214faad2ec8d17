"""The search space: which settings a study varies, within what bounds, and what holds only under a choice.

Written in YAML, by the dotted names that the command line has:

    lr: {log_uniform: [1.0e-4, 3.0e-3]}
    weight_decay: {uniform: [0.0, 0.2]}
    training.freeze_epochs: {integer: [0, 2]}          # also with log: true, or step: 2
    batch_size: {categorical: [16, 32, 64]}
    backbone:                                          # conditional: what stands under a choice holds only with it
      categorical:
        efficientnet_lite0: {image_size: {categorical: [96, 128]}}
        resnet18: {weights: {categorical: [none]}, training.head_lr_factor: {log_uniform: [1, 10]}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml
from optuna.trial import BaseTrial

from stocktake.errors import StocktakeError
from stocktake.tuning.config_overrides import (
    FIXED,
    Scalar,
    finite_number,
    fit_value,
    means,
    setting_type,
    single,
    takes,
    type_in_words,
    with_overrides,
    yaml_word,
)

_KINDS = ("uniform", "log_uniform", "integer", "categorical")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    name: str
    """What Optuna calls it: the setting, below a choice with the way there: `backbone=resnet18/image_size`."""
    setting: str
    low: float
    high: float
    log: bool = False
    step: int | None = None
    """The distance between whole numbers; None: fractions too."""

    def describe(self) -> dict[str, Any]:
        """As the YAML has it."""
        if self.step is None:
            return {"log_uniform" if self.log else "uniform": [self.low, self.high]}
        written: dict[str, Any] = {"integer": [self.low, self.high]}
        return written | ({"log": True} if self.log else {}) | ({"step": self.step} if self.step != 1 else {})

    def suggest(self, trial: BaseTrial) -> float:
        """The trial's value."""
        if self.step is None:
            # Optuna now and then returns a numpy number, which no YAML would take
            return float(trial.suggest_float(self.name, self.low, self.high, log=self.log))
        return trial.suggest_int(self.name, int(self.low), int(self.high), step=self.step, log=self.log)

    def find(self, value: object) -> list[float]:
        """A known value as Optuna's; none if it lies outside of the range."""
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return []
        if isinstance(value, bool) or not self.low <= number <= self.high:
            return []
        if self.step is None:
            return [number]
        return [int(number)] if number.is_integer() and (number - self.low) % self.step == 0 else []


@dataclass(frozen=True)
class Choice:
    """Some values, each with the settings that hold only under it."""

    name: str
    """What Optuna calls it, as for a range."""
    setting: str
    branches: tuple[tuple[Scalar, tuple[Dimension, ...]], ...]

    @property
    def choices(self) -> list[Scalar]:
        """The values."""
        return [choice for choice, _ in self.branches]

    def describe(self) -> dict[str, Any]:
        """As the YAML has it; choices in pairs with what holds under them, as JSON would turn keys into text."""
        return {"categorical": [[choice, _describe(inner)] for choice, inner in self.branches]}

    def suggest(self, trial: BaseTrial) -> Scalar:
        """The trial's value."""
        chosen: Scalar = trial.suggest_categorical(self.name, self.choices)
        return chosen

    def find(self, value: object) -> list[Scalar]:
        """A known value as Optuna's, none if it is no choice; the choice that is exactly it goes before its text's."""
        exact = [
            choice for choice in self.choices if choice == value and isinstance(choice, bool) == isinstance(value, bool)
        ]
        return (exact or [choice for choice in self.choices if isinstance(value, str) and means(value, choice)])[:1]

    def under(self, chosen: Scalar) -> tuple[Dimension, ...]:
        """What holds under a choice."""
        return next(inner for choice, inner in self.branches if choice == chosen)


Dimension: TypeAlias = Range | Choice


@dataclass(frozen=True)
class Space:
    """A checked search space. Two are equal when a study can go on from one with the other."""

    dimensions: tuple[Dimension, ...]
    """Sorted by setting: in which order a file has them changes nothing."""

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The trial's settings by their dotted names, only those that hold under its choices.

        A trial that has its values already, or is finished, keeps them.
        """
        settings: dict[str, Any] = {}
        waiting = [*self.dimensions]
        while waiting:
            dimension = waiting.pop(0)
            settings[dimension.setting] = value = dimension.suggest(trial)
            if isinstance(dimension, Choice):
                waiting += dimension.under(value)
        return settings

    def params(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Optuna's parameters for known settings, as `study.enqueue_trial` takes them.

        Args:
            settings: dotted setting -> value, or its text in an MLflow run: "0.001", "[0.001]", "none". Settings
                that the space does not vary are not looked at.

        Returns:
            None when a value lies outside of the space or is missing.
        """
        params: dict[str, Any] = {}
        waiting = [*self.dimensions]
        while waiting:
            dimension = waiting.pop(0)
            if dimension.setting not in settings:
                return None
            found = dimension.find(single(settings[dimension.setting]))
            if not found:
                return None
            params[dimension.name] = found[0]
            if isinstance(dimension, Choice):
                waiting += dimension.under(found[0])
        return params

    def highest(self, setting: str, least: float) -> float:
        """The largest number that a setting can have in a trial, `least` at least."""
        found = [one for one in self.all_dimensions() if one.setting == setting]
        values = [value for one in found for value in ([one.high] if isinstance(one, Range) else one.choices)]
        return max([least, *(float(value) for value in values if isinstance(value, int | float))])

    def all_dimensions(self) -> Iterator[Dimension]:
        """Every dimension, those that hold only under a choice too."""
        yield from _walk(self.dimensions)

    def to_json(self) -> str:
        """For a study to keep; `from_json` reads it."""
        return json.dumps(_describe(self.dimensions), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Space:
        """The space of `to_json`.

        Raises:
            StocktakeError: the text holds none.
        """
        try:
            return cls(_restored(json.loads(text), ""))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StocktakeError(f"the study holds no search space that can be read, but {text[:80]!r}") from None

    def difference(self, other: Space) -> str | None:
        """In words how this space is not the other one; None when it is."""
        mine, others = ({one.name: one for one in space.all_dimensions()} for space in (self, other))
        said = [f"{name} is new" for name in mine.keys() - others.keys()]
        said += [f"{name} is gone" for name in others.keys() - mine.keys()]
        for name in mine.keys() & others.keys():
            now, then = (_own_words(space[name]) for space in (mine, others))
            if now != then:
                said.append(f"{name} is {now}, it was {then}")
        return "; ".join(sorted(said)) or None


# Reading --------------------------------------------------------------------------------------------------------------


def read_space(path: Path, config: Any) -> Space:
    """The search space in a YAML file, checked against a command's config.

    Raises:
        StocktakeError: the file cannot be read, or is no space over the config's settings.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StocktakeError(f"the search space {path} cannot be read: {error}") from None
    return parse_space(content, config, str(path))


def parse_space(content: Any, config: Any, origin: str) -> Space:
    """The search space in YAML's content.

    Every bound and every choice is tried out: a config is built with it and with the choices above it.

    Args:
        content: what `yaml.safe_load` gives.
        config: the config whose settings are varied, with those that are not.
        origin: names the space in errors, as the file's path does.

    Raises:
        StocktakeError: a setting that does not exist or must not vary, a value that it cannot have, or no space.
    """
    if not isinstance(content, Mapping) or not content:
        raise StocktakeError(
            f"{origin} must hold settings to vary, such as `lr: {{log_uniform: [1.0e-4, 1.0e-2]}}`, not {content!r}"
        )
    return Space(_Reading(config, origin).dimensions(content, {}, ()))


@dataclass(frozen=True)
class _Reading:
    config: Any
    origin: str
    met: dict[str, list[tuple[tuple[str, Scalar], ...]]] = dataclasses.field(default_factory=dict)
    """Setting -> the ways of choices to where it stood: ((a choice's name, the value chosen), ...)."""

    _forms: ClassVar[dict[str, str]] = {
        "uniform": "uniform: [0.0, 0.2]",
        "log_uniform": "log_uniform: [1.0e-4, 1.0e-2]",
        "integer": "integer: [1, 8]",
        "categorical": "categorical: [16, 32]",
    }

    def dimensions(
        self, content: Mapping[Any, Any], chosen: Mapping[str, Any], way: tuple[tuple[str, Scalar], ...]
    ) -> tuple[Dimension, ...]:
        # Sorted: an order is what a random sampler would depend on.
        return tuple(
            self.dimension(setting, written, chosen, way)
            for setting, written in sorted(content.items(), key=lambda item: str(item[0]))
        )

    def dimension(
        self, setting: Any, written: Any, chosen: Mapping[str, Any], way: tuple[tuple[str, Scalar], ...]
    ) -> Dimension:
        if not isinstance(setting, str):
            raise StocktakeError(f"{self.origin}: {setting!r} is no setting; give one by its dotted name, such as lr")
        name = f"{_under(*way[-1])}{setting}" if way else setting
        at = f"{self.origin}: {name}"
        if setting.partition(".")[0] in FIXED:
            raise StocktakeError(
                f"{at} cannot be varied: the data and the run must stay the same in a study; "
                f"set --{setting} once for all trials"
            )
        annotation = setting_type(self.config, setting, f"{self.origin}: ")
        self.meet(setting, name, way)
        kinds = [kind for kind in _KINDS if isinstance(written, Mapping) and kind in written]
        if len(kinds) != 1:
            raise StocktakeError(
                f"{at} must hold one of {', '.join(_KINDS)}, such as `{self._forms['log_uniform']}`, not {written!r}"
            )
        kind = kinds[0]
        more = written.keys() - {kind, *({"log", "step"} if kind == "integer" else ())}
        if more:
            allowed = "log and step" if kind == "integer" else "nothing"
            raise StocktakeError(
                f"{at}: {', '.join(sorted(map(str, more)))} is not understood; beside {kind} {allowed} may stand"
            )
        if kind == "categorical":
            return self.choice(name, setting, annotation, written[kind], chosen, way)
        return self.range(name, setting, annotation, kind, written, chosen)

    def meet(self, setting: str, name: str, way: tuple[tuple[str, Scalar], ...]) -> None:
        """A setting may stand in several branches, but two values of it must not hold at once."""
        for other in self.met.get(setting, []):
            decided = dict(other)
            if all(decided.get(choice, value) == value for choice, value in way):
                twin = _under(*other[-1]) + setting if other else f"{setting} at the top"
                raise StocktakeError(f"{self.origin}: {name} and {twin} would hold at once: keep one of them")
        self.met.setdefault(setting, []).append(way)

    def range(
        self, name: str, setting: str, annotation: Any, kind: str, written: Mapping[str, Any], chosen: Mapping[str, Any]
    ) -> Range:
        at, given = f"{self.origin}: {name}", written[kind]
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
            raise StocktakeError(f"{at}: {kind} must hold two bounds, as in `{self._forms[kind]}`, not {given!r}")
        whole = kind == "integer"
        low, high = (self.bound(at, kind, value) for value in given)
        log, step = written.get("log", kind == "log_uniform"), written.get("step", 1 if whole else None)
        if not isinstance(log, bool):
            raise StocktakeError(f"{at}: log must be true or false, not {log!r}")
        if whole and (not isinstance(step, int) or isinstance(step, bool) or step < 1):
            raise StocktakeError(f"{at}: step must be a whole number from 1, not {step!r}")
        if low > high:
            raise StocktakeError(f"{at}: {kind} [{low:g}, {high:g}] has no value in it; give the lower bound first")
        if log and low <= 0:
            raise StocktakeError(
                f"{at}: {low:g} has no logarithm; begin above 0, or use {'no log' if whole else 'uniform'}"
            )
        if log and step not in (None, 1):
            raise StocktakeError(f"{at}: log and step {step} do not go together; drop one of them")
        if not whole and not takes(annotation, 0.5):
            raise StocktakeError(
                f"{at}: {kind} draws fractions, but it must be {type_in_words(annotation)}; use integer or categorical"
            )
        if step is not None:
            high = low + (high - low) // step * step  # the last one that is reached; Optuna would warn of another
        for value in (low, high):
            self.try_out(name, setting, value, chosen)
        return Range(name, setting, low, high, log, step)

    def bound(self, at: str, kind: str, value: Any) -> float:
        if kind == "integer":
            if not isinstance(value, int) or isinstance(value, bool):
                raise StocktakeError(f"{at}: {value!r} is no whole number, as the bounds of integer are")
            return value
        number = finite_number(value)
        if number is None:
            raise StocktakeError(f"{at}: {value!r} is no number, as the bounds of {kind} are")
        return number

    def choice(
        self,
        name: str,
        setting: str,
        annotation: Any,
        given: Any,
        chosen: Mapping[str, Any],
        way: tuple[tuple[str, Scalar], ...],
    ) -> Choice:
        at = f"{self.origin}: {name}"
        pairs: list[tuple[Any, Any]]
        if isinstance(given, Mapping):
            pairs = [*given.items()]
        elif isinstance(given, Sequence) and not isinstance(given, str):
            pairs = [(value, None) for value in given]
        else:
            pairs = []
        if not pairs:
            raise StocktakeError(
                f"{at}: categorical must hold choices, as in `{self._forms['categorical']}`, not {given!r}"
            )
        branches: list[tuple[Scalar, tuple[Dimension, ...]]] = []
        for value, inner in pairs:
            if value is not None and not isinstance(value, bool | int | float | str):
                raise StocktakeError(f"{at}: the choice {value!r} must be a single value")
            self.try_out(name, setting, value, chosen)
            choice: Scalar = single(fit_value(value, annotation))
            if any(choice == other for other, _ in branches):
                raise StocktakeError(f"{at}: the choice {yaml_word(choice)} is there twice; keep one")
            if inner is not None and not isinstance(inner, Mapping):
                raise StocktakeError(
                    f"{at}={yaml_word(choice)} must hold the settings that are varied only under it, not {inner!r}"
                )
            below = {**chosen, setting: choice}
            branches.append((choice, self.dimensions(inner or {}, below, (*way, (name, choice)))))
        return Choice(name, setting, tuple(branches))

    def try_out(self, name: str, setting: str, value: Any, chosen: Mapping[str, Any]) -> None:
        try:
            with_overrides(self.config, {**chosen, setting: value})
        except StocktakeError as error:
            raise StocktakeError(f"{self.origin}: {name}: {error}") from None


# Spaces and their texts -----------------------------------------------------------------------------------------------


def _under(name: str, choice: Scalar) -> str:
    """How the names begin of what holds only under a choice."""
    return f"{name}={yaml_word(choice)}/"


def _walk(dimensions: Sequence[Dimension]) -> Iterator[Dimension]:
    for dimension in dimensions:
        yield dimension
        if isinstance(dimension, Choice):
            for _, inner in dimension.branches:
                yield from _walk(inner)


def _describe(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    return {dimension.setting: dimension.describe() for dimension in dimensions}


def _own_words(dimension: Dimension) -> str:
    """A dimension without what holds under its choices."""
    if isinstance(dimension, Choice):
        return f"categorical [{', '.join(yaml_word(choice) for choice, _ in dimension.branches)}]"
    return " ".join(
        f"{key} {'[{:g}, {:g}]'.format(*value) if isinstance(value, list) else yaml_word(value)}"
        for key, value in dimension.describe().items()
    )


def _restored(described: Mapping[str, Any], way: str) -> tuple[Dimension, ...]:
    dimensions: list[Dimension] = []
    for setting, written in described.items():
        name = way + setting
        if "categorical" in written:
            branches = tuple(
                (choice, _restored(inner, _under(name, choice))) for choice, inner in written["categorical"]
            )
            dimensions.append(Choice(name, setting, branches))
        elif "integer" in written:
            low, high = written["integer"]
            dimensions.append(Range(name, setting, low, high, written.get("log", False), written.get("step", 1)))
        else:
            log = "log_uniform" in written
            low, high = written["log_uniform" if log else "uniform"]
            dimensions.append(Range(name, setting, low, high, log))
    return tuple(dimensions)
