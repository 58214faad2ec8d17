"""A config with some settings replaced, named as on the command line and checked by the same parser."""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from stocktake.config.parser import read_settings
from stocktake.errors import StocktakeError

Config = TypeVar("Config")


def with_overrides(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of a config with some settings replaced; the config's own checks run again.

    Args:
        config: any of the command's configs.
        settings: dotted setting -> value. A single number stands for a list of one where a setting takes several.

    Raises:
        StocktakeError: there is no such setting, or it cannot have that value.
    """
    values = flat_settings(config)
    for setting, value in settings.items():
        if setting not in values:
            close = [name for name in values if name.rpartition(".")[2] == setting.rpartition(".")[2]]
            close = close or difflib.get_close_matches(setting, values, 1) or list(values)
            raise StocktakeError(f"{type(config).__name__} has no setting {setting}; did you mean {', '.join(close)}?")
        takes_several = isinstance(values[setting], list) and not isinstance(value, list | tuple)
        values[setting] = [value] if takes_several else value
    kind: type[Config] = type(config)
    return read_settings(kind, values, kind.__name__)


def get_setting(config: Any, setting: str) -> Any:
    """The value of a setting by its dotted name; of a list of one, what stands in it."""
    value = operator.attrgetter(setting)(config)
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def flat_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a config by their dotted names, tuples as lists."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            settings |= flat_settings(value, f"{prefix}{field.name}.")
        else:
            settings[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return settings
