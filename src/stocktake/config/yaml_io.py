"""A config as an experiment's file: the settings that differ from the defaults, for `--experiment`."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stocktake.files import atomic_write

EXPERIMENT, BEST = "experiment.yaml", "best.yaml"
"""In a run's artifacts: a trial's own settings, and those of a search's best trial."""
LEFT_OUT = frozenset({"workspace", "tracking", "resume"})
"""Settings of the machine and the moment, not of the experiment."""


def write_experiment(path: Path, config: Any, header_lines: Sequence[str]) -> None:
    """Write the settings of a config that differ from its class's defaults.

    Args:
        path: the YAML file; its folder is made when it is not there.
        config: any command's config. `LEFT_OUT` is not written. A root or list whose name is YAML for nothing, such
            as null or ~, is read back as none, as it is on the command line: write ./null.
        header_lines: stand first, as comments; the first one is the command, as in experiments/*.yaml.
    """
    comments = "".join(f"# {line}".rstrip() + "\n" for text in header_lines for line in text.splitlines() or [""])
    settings = {name: value for name, value in _differing(config, type(config)()).items() if name not in LEFT_OUT}
    dumped = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000) if settings else ""
    atomic_write(path, comments + dumped)


def _differing(config: Any, default: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if value == usual:
            continue
        if dataclasses.is_dataclass(value):
            settings[field.name] = _differing(value, usual)
        else:
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings


class _Dumper(yaml.SafeDumper):
    """YAML 1.1 in which every text that a reader of YAML 1.2 could take for a number or a word is in quotes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_number_like = re.fullmatch(r"[-+.\d][\w.+]*|(?i:[yn]|nan|inf|infinity)", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if is_number_like else None)


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
