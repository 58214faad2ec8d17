"""A config with other settings, by their dotted names; checked like those of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from stocktake.errors import StocktakeError

Config = TypeVar("Config")
Scalar: TypeAlias = bool | int | float | str | None

FIXED = frozenset(
    {"root", "list", "limit", "s3", "workspace", "tracking", "split", "task", "synthetic", "resume", "seed"}
)
"""Settings that say what the data and the run are: with them varied, trials could not be compared."""


def with_overrides(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of a config with some settings replaced; the config's own checks run again.

    Args:
        config: any of the command's configs.
        settings: dotted setting -> value. One number for a setting that takes several stands for itself alone.

    Raises:
        StocktakeError: there is no such setting, or it cannot have that value.
    """
    changes: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        annotation = setting_type(config, setting)
        try:
            fitted = fit_value(value, annotation)
        except ValueError:
            raise StocktakeError(f"{setting} must be {type_in_words(annotation)}, not {value!r}") from None
        group, _, rest = setting.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = fitted
        else:
            changes[setting] = fitted
    changes |= {group: with_overrides(getattr(config, group), inner) for group, inner in groups.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def setting_type(config: Any, setting: str, origin: str = "") -> Any:
    """The type of a setting, from its config's fields."""
    kind: Any = type(config)
    for part in setting.split("."):
        kind = _types(kind).get(part)
    if kind is None:
        known = [*_settings(type(config))]
        close = [name for name in known if name.rpartition(".")[2] == setting.rpartition(".")[2]]
        close = close or difflib.get_close_matches(setting, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
        raise StocktakeError(f"{origin}{setting} is no setting of {type(config).__name__}: {hint}")
    if dataclasses.is_dataclass(kind):
        names = [f"{setting}.{field.name}" for field in dataclasses.fields(kind)]
        raise StocktakeError(f"{origin}{setting} is a group of settings: name one of {', '.join(names)}")
    return kind


@cache
def _types(kind: Any) -> dict[str, Any]:
    """Field -> type, of a config's class; nothing of any other. Kept: every value that is tried out asks for them."""
    return get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _settings(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings that may vary."""
    for name, annotation in _types(kind).items():
        if dataclasses.is_dataclass(annotation):
            yield from _settings(annotation, f"{prefix}{name}.")
        elif (prefix + name).partition(".")[0] not in FIXED:
            yield prefix + name


def fit_value(value: Any, annotation: Any) -> Any:
    """The value as a field of this type has it; ValueError if it cannot."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            if takes(argument, value):
                return fit_value(value, argument)
        raise ValueError
    if origin is tuple:
        several = [*value] if isinstance(value, list | tuple) else [value]
        wanted = arguments[:1] * len(several) if arguments[1:] == (...,) else arguments
        return tuple(fit_value(one, argument) for one, argument in zip(several, wanted, strict=True))
    if origin is Literal:
        fits = isinstance(value, str) and value in arguments
    elif annotation is float:
        value = finite_number(value)
        fits = value is not None
    elif annotation is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:  # bool, str, NoneType
        fits = isinstance(value, annotation)
    if not fits:
        raise ValueError
    return value


def takes(annotation: Any, value: Any) -> bool:
    try:
        fit_value(value, annotation)
    except ValueError:
        return False
    return True


def type_in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_in_words(argument) for argument in arguments)
    if origin is tuple:
        return f"{type_in_words(arguments[0])}, or several"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text (in quotes, if YAML sees more)",
    }
    return words.get(annotation, "null")


# Values and their texts -----------------------------------------------------------------------------------------------


def finite_number(value: Any) -> float | None:
    """A finite number. As text too: YAML 1.1, and so PyYAML, sees none in 1e-4, only in 1.0e-4."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def single(value: Any) -> Any:
    """What stands alone in a list, a tuple or the text of one; any other value as it is."""
    if isinstance(value, str) and value.startswith(("[", "(")) and value.endswith(("]", ")")):
        inner = value[1:-1].strip().removesuffix(",")
        return value if "," in inner else inner.strip("'\"")
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def means(text: str, choice: Scalar) -> bool:
    """Whether MLflow's text of a parameter stands for the choice."""
    if choice is None or isinstance(choice, bool):
        return text.lower() in (str(choice).lower(), yaml_word(choice))
    return not isinstance(choice, str) and finite_number(text) == choice


def yaml_word(value: Scalar) -> str:
    """A value as YAML would have it."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
