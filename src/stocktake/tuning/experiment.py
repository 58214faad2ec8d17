"""A config as an experiment's file: what a trial found, ready for `--experiment`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stocktake.files import atomic_path

EXPERIMENT, BEST = "experiment.yaml", "best.yaml"
"""In a run's artifacts: a trial's own settings, and those of a search's best trial."""
LEFT_OUT = frozenset({"workspace", "tracking", "resume"})
"""Settings of the machine and the moment, not of the experiment."""

_PLAIN = re.compile(r"[A-Za-z](?:[\w./]*\w)?|\d{1,2}-\d{1,2}", re.ASCII)
_NOT_TEXT = frozenset({"y", "n", "null", "true", "false", "yes", "no", "on", "off", "nan", "inf", "infinity"})


def write_experiment(path: Path, config: Any, header_lines: Sequence[str]) -> None:
    """Write the settings of a config that differ from its class's defaults, beside the place and then moved there.

    Args:
        path: the YAML file; its folder is made when it is not there.
        config: any command's config. `LEFT_OUT` is not written. A root or list whose name is YAML for nothing, such
            as null or ~, is read back as none, as it is on the command line: write ./null.
        header_lines: stand first, as comments; the first one is the command, as in experiments/*.yaml.
    """
    comments = "".join(f"# {line}".rstrip() + "\n" for text in header_lines for line in text.splitlines() or [""])
    settings = _differing(config, type(config)(), LEFT_OUT)
    dumped = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000) if settings else ""
    with atomic_path(path) as beside:
        beside.write_text(comments + dumped, encoding="utf-8")


def _differing(config: Any, default: Any, left_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if field.name in left_out or value == usual:
            continue
        if dataclasses.is_dataclass(value):
            settings[field.name] = _differing(value, usual)
        else:
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings


class _Dumper(yaml.SafeDumper):
    """YAML whose text stays text for every reader: PyYAML leaves 1e3 bare, and YAML 1.2 readers see a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
