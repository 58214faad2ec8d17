"""From a command line, an experiment's YAML or a file of settings to a settings object: one reader for all of them."""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from stocktake.config.settings import bound_error
from stocktake.errors import StocktakeError

T = TypeVar("T")

ALIASES = {"main": "ladder", "train": "finetune"}
"""Other names of commands: MLproject's entry point `main`, and `train`."""
NOT_IN_AN_EXPERIMENT = frozenset({"workspace", "tracking", "resume", "output", "export", "publish", "storage"})
"""Settings of the machine and the moment. An experiment's file cannot say where results go."""


def parse_arguments(config: type[T], arguments: Sequence[str], command: str) -> T:
    """Read a command's settings from its arguments.

    `--experiment FILE` is read first, so that the other options override it wherever they stand. A yes-or-no option
    alone is yes. Words before the first option are the photos of a command that takes photos. `--all_settings FILE`, by
    which a launcher hands everything to its processes, is an experiment that may also say where results go.

    Raises:
        StocktakeError: an unknown option, a value of the wrong type or out of bounds, an experiment that cannot be
            read.
    """
    free = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if free and "photos" in {field.name for field in dataclasses.fields(cast("Any", config))}:
        arguments = ["--photos", json.dumps(arguments[:free]), *arguments[free:]]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--experiment")
    first.add_argument("--all_settings")
    try:
        known, words = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise StocktakeError(f"{command}: {error} (stocktake {command} --help)") from None
    source = command
    if known.all_settings is not None:
        words = ["--experiment", known.all_settings, *words]
    if known.experiment is not None:
        path = find_experiment(known.experiment)
        source = f"{command} with {path}"
        if read_experiment(path, config):
            words = ["--experiment", str(path), *words]
    parser = _parser(config, command)
    parser.add_argument("--experiment", action="config", help="YAML of settings, such as experiments/quick.yaml.")
    parser.add_class_arguments(config, as_group=False)
    try:
        settings = parser.instantiate(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise StocktakeError(f"{source}: {_one_line(error, config)} (stocktake {command} --help)") from None
    return config(**{name: value for name, value in vars(settings).items() if name != "experiment"})


def read_settings(config: type[T], settings: Mapping[str, Any], source: str) -> T:
    """Make a settings object from the content of a file.

    Args:
        config: the dataclass.
        settings: field name -> value, nested as the dataclass is.
        source: names the file in errors.

    Raises:
        StocktakeError: an unknown name, a missing one, a value of the wrong type or out of bounds.
    """
    parser = _parser(config, source)
    parser.add_class_arguments(config, as_group=False)
    try:
        return config(**vars(parser.instantiate(parser.parse_object(dict(settings)))))
    except argparse.ArgumentError as error:
        raise StocktakeError(f"{source}: {_one_line(error, config)}") from None


def find_experiment(name: str) -> Path:
    """Find an experiment's file by its path, or by the name of a file in experiments/.

    Raises:
        StocktakeError: there is none.
    """
    for candidate in (Path(name), Path("experiments") / name, Path("experiments") / f"{name}.yaml"):
        with suppress(OSError):  # a name that no file can have
            if candidate.is_file():
                return candidate
    names = ", ".join(sorted(path.stem for path in Path("experiments").glob("*.yaml"))) or "none"
    raise StocktakeError(f"--experiment {name}: no such file; experiments/ holds {names}")


def read_experiment(path: Path, config: type) -> dict[str, Any]:
    """Read the settings of an experiment's file; an empty file is the defaults. The parser checks the values.

    Raises:
        StocktakeError: the file cannot be read, holds no settings, or says where results go.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except RecursionError:
        raise StocktakeError(f"--experiment {path} is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StocktakeError(f"--experiment {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise StocktakeError(f"--experiment {path} must hold settings, such as `epochs: 2`, not {settings!r}")
    for name in _groups(config):
        if not isinstance(settings.get(name, {}), dict):
            raise StocktakeError(f"--experiment {path}: {name} must hold settings, not {settings[name]!r}")
    for name in sorted(settings.keys() & NOT_IN_AN_EXPERIMENT):
        raise StocktakeError(f"--experiment {path}: {name} is not an experiment's to set: give --{name} instead")
    return settings


def _parser(config: type, command: str) -> Any:
    """jsonargparse's parser; its help shows examples as written and bounds in plain signs; a flag needs no value."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _expand_help(self, action: argparse.Action) -> str:
            return _ANNOTATED.sub(_plain_bounds, super()._expand_help(action))

    class Parser(ArgumentParser):
        def add_argument(self, *names: Any, **options: Any) -> Any:
            if options.get("type") is bool:
                options |= {"nargs": "?", "const": True}
            return super().add_argument(*names, **options)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return Parser(
        prog=f"stocktake {command}",
        description=summary(config),
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples(config)),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Formatter,
    )


def summary(config: type) -> str:
    """The first line of a settings class's docstring."""
    return (config.__doc__ or "").partition("\n")[0]


def examples(config: type) -> list[str]:
    """The command lines in a settings class's docstring: its lines that begin with `stocktake`."""
    return [line.strip() for line in (config.__doc__ or "").splitlines() if line.strip().startswith("stocktake ")]


_ANNOTATED = re.compile(r"Annotated\[([^,]+), FieldInfo\(.*?metadata=\[(.*?)\]\)\]")
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _plain_bounds(match: re.Match[str]) -> str:
    bounds = [f"{_SIGNS[name]} {value}" for name, value in re.findall(r"(ge|gt|le|lt)=([^)]+)", match[2])]
    return " ".join([match[1], ", ".join(bounds)])


def _one_line(error: argparse.ArgumentError, config: type) -> str:
    """What jsonargparse and pydantic say of a wrong value, in several lines, as one line that names the option."""
    text = str(error.message or error)
    if unknown := re.match(r"unrecognized arguments: (--[\w.]+)|Option '([\w.]+)'|Key '([\w.]+)'", text):
        name = next(filter(None, unknown.groups())).lstrip("-")
        close = difflib.get_close_matches(name, option_names(config), 1)
        return f"{name} is no setting" + (f"; did you mean {close[0]}?" if close else "")
    key = re.match(r'Parser key "([\w.]+)"', text)
    bound = re.search(r"Input should be [^\[\n]+", text)
    value = re.search(r"(?:Got|Given) value: (.*)", text)
    if key and bound and value:
        return f"--{key[1]} {value[1]} {bound_error(bound[0])}"
    return " ".join(text.split())


def option_names(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all settings of a class."""
    groups, names = _groups(config), []
    for field in dataclasses.fields(config):
        nested = groups.get(field.name)
        names += option_names(nested, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def _groups(config: Any) -> dict[str, Any]:
    """The fields that are settings themselves, with their classes."""
    factories: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(config)}
    return {name: factory for name, factory in factories.items() if dataclasses.is_dataclass(factory)}
