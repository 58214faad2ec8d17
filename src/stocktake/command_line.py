"""What can be asked for: one table from a command's name to its function, its config and its examples; its parser.

MLproject's entry points bear the same names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocktake import config
from stocktake.errors import StocktakeError


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    config: type
    function: str
    examples: tuple[str, ...]
    is_distributed: bool = False
    """Whether torchrun may run it in several processes."""
    words: str | None = None
    """The setting, a list, that words before the first option belong to."""


COMMANDS = {
    "ladder": Command(
        config.LadderConfig,
        "ladder:ladder",
        (
            "stocktake ladder",
            "stocktake ladder --root ../bins --task 0-5 --epochs 12",
            "stocktake ladder --experiment experiments/quick.yaml --rungs '[majority,frozen]'",
        ),
    ),
    "data": Command(
        config.DataConfig,
        "data:data",
        (
            "stocktake data --root ../bins",
            "stocktake data --root ../bins --split.fractions '[0.7,0.2,0.1]' --split.by id",
            "stocktake data --root ../bins --list file_list.json --export imagefolder",
            "stocktake data --root s3://aft-vbi-pds --plan true",
            "stocktake data --root s3://aft-vbi-pds --task 1-5 --limit 5000 --s3.resize 256",
            "stocktake data --root s3://aft-vbi-pds --list file_list.json --publish s3://my-bucket/bins",
        ),
    ),
    "eda": Command(config.EdaConfig, "eda:eda", ("stocktake eda --root ../bins --task 0-5",)),
    "majority": Command(config.MajorityConfig, "majority:majority", ("stocktake majority --root ../bins",)),
    "classical": Command(
        config.ClassicalConfig,
        "classical:classical",
        ("stocktake classical --root ../bins --classical.components 120 --classical.c 10",),
    ),
    "frozen": Command(
        config.FrozenConfig,
        "frozen:frozen",
        ("stocktake frozen --root ../bins --image_size 224", "stocktake frozen --backbone resnet50"),
    ),
    "finetune": Command(
        config.FinetuneConfig,
        "finetune:finetune",
        (
            "stocktake finetune --root ../bins --epochs 12 --lr 5e-4 --training.augment flip",
            "stocktake finetune --backbone resnet34 --weights resnet34-b627a593.pth",
            "stocktake finetune --root ../bins --resume workspace/runs/finetune-1a2b3c",
        ),
        is_distributed=True,
    ),
    "ddp": Command(
        config.DdpConfig,
        "ddp:ddp",
        (
            "stocktake ddp --nproc 2 --root ../bins --epochs 12",
            "stocktake ddp --nproc 8 --max_restarts 2 --batch_size 512 --experiment experiments/quick.yaml",
            "stocktake ddp --nproc 8 --nnodes 2 --node_rank 0 --rendezvous 10.0.0.1:29500",
        ),
    ),
    "tune": Command(
        config.TuneConfig,
        "tune:tune",
        (
            "stocktake tune --root ../bins --trials 20 --workers 2",
            "stocktake tune --root ../bins --stage frozen --objectives '[macro_f1,latency]' --pruner none",
            "stocktake tune --space my.space.yaml --timeout 3600 --warm_start 3",
            "stocktake tune --resume workspace/runs/tune-1a2b3c --trials 40",
        ),
    ),
    "trial": Command(
        config.TrialConfig,
        "trial:trial",
        ("stocktake trial --study workspace/runs/tune-1a2b3c --number 3",),
        is_distributed=True,
    ),
    "remote_trial": Command(
        config.RemoteTrialConfig,
        "remote_trial:remote_trial",
        ("stocktake remote_trial --stage frozen --root ../bins --image_size 96 --tracking.offline true",),
        is_distributed=True,
    ),
    "evaluate": Command(
        config.EvaluateConfig,
        "evaluate:evaluate",
        ("stocktake evaluate --model models:/stocktake@candidate --root ../bins --on test",),
    ),
    "compare": Command(
        config.CompareConfig, "compare:compare", ("stocktake compare", "stocktake compare --stage finetune --best 10")
    ),
    "register": Command(
        config.RegisterConfig,
        "register:register",
        ("stocktake register --run workspace/runs/frozen-1a2b3c", "stocktake register --run frozen-wide"),
    ),
    "promote": Command(
        config.PromoteConfig,
        "promote:promote",
        (
            "stocktake promote",
            "stocktake promote --version 3 --gate.min_gain 0.01 --gate.max_latency_ms 20",
            "stocktake promote --version 3 --to challenger",
            "stocktake promote --version 3 --force --reason urgent",
        ),
    ),
    "rollback": Command(config.RollbackConfig, "rollback:rollback", ("stocktake rollback --reason drift",)),
    "registry": Command(
        config.RegistryConfig, "registry:registry", ("stocktake registry", "stocktake registry --format json")
    ),
    "serve": Command(
        config.ServeConfig,
        "serve:serve",
        (
            "stocktake serve",
            "stocktake serve --model workspace/runs/frozen-1a2b3c/model --server.port 0 --server.page true",
        ),
    ),
    "deploy": Command(
        config.DeployConfig,
        "deploy:deploy",
        (
            "stocktake deploy --root ../bins",
            "stocktake deploy --model models:/stocktake/3 --name trial --server.port 0 --server.workers 2",
        ),
    ),
    "predict": Command(
        config.PredictConfig,
        "predict:predict",
        (
            "stocktake predict shelf.jpg",
            "stocktake predict photos/ --endpoint bins --format jsonl --output counts.jsonl",
            "stocktake predict records.csv --model models:/stocktake/3 --format csv",
        ),
        words="photos",
    ),
    "rehearse": Command(
        config.RehearseConfig,
        "rehearse:rehearse",
        ("stocktake rehearse", "stocktake rehearse --port 5000 --grace 2"),
    ),
    "sync": Command(
        config.SyncConfig, "sync:sync", ("stocktake sync", "stocktake sync --tracking.uri http://host:5000")
    ),
    "jobs": Command(
        config.JobsConfig,
        "jobs:jobs",
        (
            "stocktake jobs",
            "stocktake jobs --follow stocktake-finetune-20260131-101502-1a2b3c",
            "stocktake jobs --follow stocktake-tune-260131-101502-1a2",
            "stocktake jobs --stop stocktake-finetune-20260131-101502-1a2b3c",
        ),
    ),
    "job": Command(config.JobConfig, "job:job", ("stocktake job",)),
}
ALIASES = {"main": "ladder", "train": "finetune"}
_EXPERIMENT = "--experiment"


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The config of a command from its arguments.

    The experiment comes first, so that the other options override it wherever they stand.

    Raises:
        StocktakeError: an unknown option or a value of the wrong type.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    summary = (command.config.__doc__ or "").splitlines()[0]
    examples = "\n".join(f"  {example}" for example in command.examples)
    parser = ArgumentParser(
        prog=f"stocktake {name}",
        description=summary,
        epilog=f"examples:\n{examples}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_help_formatter(),
    )
    parser.add_argument(_EXPERIMENT, action="config", help="YAML of settings, such as experiments/quick.yaml.")
    parser.add_class_arguments(command.config, as_group=False)
    free = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if command.words and free:
        arguments = [f"--{command.words}", json.dumps(arguments[:free]), *arguments[free:]]
    words = _with_values(arguments, command.config)
    experiment = _take(words, _EXPERIMENT)
    read = ""
    if experiment is not None:
        path = find_experiment(experiment)
        read = f" with {path}"
        if read_experiment(path, command.config):
            words = [_EXPERIMENT, str(path), *words]
    from argparse import ArgumentError

    try:
        parsed = parser.parse_args(words)
        settings = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        reason = " ".join(str(error.message or error).split())
        raise StocktakeError(f"{name}{read}: {reason} (stocktake {name} --help)") from None
    return command.config(**{key: value for key, value in vars(settings).items() if key != "experiment"})


def find_experiment(given: str) -> Path:
    """The file of an experiment: a path, or the name of a file in experiments/.

    Raises:
        StocktakeError: there is none.
    """
    candidates = [Path(given), Path("experiments") / given, Path("experiments") / f"{given}.yaml"]
    for candidate in candidates:
        with suppress(OSError):  # such as a name that no file can have
            if candidate.is_file():
                return candidate
    there = ", ".join(sorted(path.stem for path in Path("experiments").glob("*.yaml"))) or "none"
    raise StocktakeError(f"--experiment {given}: no such file; in experiments/ there are: {there}")


def read_experiment(path: Path, config: type) -> dict[str, Any]:
    """The settings in an experiment's file; none at all is the defaults. The parser checks each of them.

    Raises:
        StocktakeError: the file cannot be read, or holds no settings.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StocktakeError(f"--experiment {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise StocktakeError(f"--experiment {path} must hold settings, such as `epochs: 2`, not {settings!r}")
    for group in (part.name for part in dataclasses.fields(config) if dataclasses.is_dataclass(part.default_factory)):
        if not isinstance(settings.get(group, {}), dict):
            raise StocktakeError(f"--experiment {path}: {group} must hold settings, not {settings[group]!r}")
    return settings


def _with_values(words: Sequence[str], config: type) -> list[str]:
    """The words, with `true` after a yes-or-no option that is given alone: --force."""
    flags = {f"--{one.name}" for one in dataclasses.fields(config) if one.type == "bool"}
    with_values: list[str] = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        with_values += [word, "true"] if word in flags and following.startswith("--") else [word]
    return with_values


def _take(words: list[str], option: str) -> str | None:
    """Remove an option from the words; its value, the last one if it is there more than once."""
    value = None
    index = 0
    while index < len(words):
        if words[index] == option and index + 1 < len(words):
            value = words[index + 1]
            del words[index : index + 2]
        elif words[index].startswith(f"{option}="):
            value = words.pop(index).partition("=")[2]
        else:
            index += 1
    return value


def _help_formatter() -> type:
    """jsonargparse's help, with the examples left as they are written."""
    import argparse

    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return Formatter
