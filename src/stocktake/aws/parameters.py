"""What `-P name=value` becomes in a job: checked here as on this machine, then hyperparameters and input channels."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake import config as configs
from stocktake.aws.settings import JobSettings
from stocktake.config.parser import ALIASES, find_experiment, parse_arguments, read_experiment
from stocktake.errors import StocktakeError

if TYPE_CHECKING:  # it brings optuna
    from stocktake.aws.search import Search

COMMAND = "command"
"""The hyperparameter that names the command."""
CHANNEL = "channel:"
"""Begins the value of a hyperparameter that is a file of a channel: channel:files/NAME."""
TUNE = "tune"
JOBS: dict[str, type[configs.RunConfig]] = {
    "ladder": configs.LadderConfig,
    "eda": configs.EdaConfig,
    "majority": configs.MajorityConfig,
    "classical": configs.ClassicalConfig,
    "frozen": configs.FrozenConfig,
    "finetune": configs.FinetuneConfig,
    "ddp": configs.DdpConfig,
    TUNE: configs.TuneConfig,
}
"""The commands that run as jobs."""
SPACE = "search-space.json"
"""The search's space, in the channel `files`."""
_DISTRIBUTED = ("finetune", "ddp")
_FILES = ("list", "weights")
_ELSEWHERE = {
    "tracking.uri": "the job's server is tracking_uri in the backend config",
    "tracking.registry_uri": "the job's server is tracking_uri in the backend config",
    "resume": "it is a folder of this machine; an interrupted spot job goes on by itself",
    "nnodes": "the machines of a job are instance_count in the backend config",
    "node_rank": "the machines of a job are instance_count in the backend config",
    "rendezvous": "the machines of a job find each other",
}


@dataclass(frozen=True)
class Parameters:
    """A command that was checked, as a job gets it."""

    command: str
    hyperparameters: dict[str, str]
    """The command and its parameters, an experiment's file among them, without root and workspace."""
    root: str | None
    """As it was given: s3://, a folder, or none for the synthetic one."""
    workspace: Path
    """Where the run folder comes home to."""
    files: dict[str, Path | bytes] = field(default_factory=dict)
    """Files of this machine that the job needs, or their content, by their names in the channel `files`."""
    given_paths: dict[str, str] = field(default_factory=dict)
    """Settings that are paths, as they were given: the job has others."""
    search: Search | None = None
    """What a tuning job is to do; None for a training job."""


def read_parameters(
    project: Path, entry_point: str, parameters: Mapping[str, str], settings: JobSettings
) -> Parameters:
    """Check a command's parameters by its own parser, with paths relative to the project, as `mlflow run` has them.

    Raises:
        StocktakeError: a command that is no job, an unknown parameter, a value that does not fit.
    """
    command = ALIASES.get(entry_point, entry_point)
    if command not in JOBS:
        raise StocktakeError(f"-e {entry_point} does not run as a job: those that do are {', '.join(JOBS)}")
    for name, reason in _ELSEWHERE.items():
        if name in parameters and not (command == TUNE and name == "resume"):
            raise StocktakeError(f"-P {name} cannot be given to a job: {reason}")
    with contextlib.chdir(project):
        words = [word for name, value in parameters.items() for word in (f"--{name}", value)]
        config: Any = parse_arguments(JOBS[command], words, command)
        given = {**_experiment(parameters, command), **parameters}
    given.pop("experiment", None)
    given.pop("root", None)
    given.pop("workspace", None)
    if command not in _DISTRIBUTED and settings.instance_count > 1:
        raise StocktakeError(
            f"instance_count {settings.instance_count}: {command} runs on one machine; {' and '.join(_DISTRIBUTED)} "
            "on several"
        )
    if settings.warm_start and command != TUNE:
        raise StocktakeError(f"warm_start in the backend config is for -e {TUNE}: leave it out")
    processes = settings.instance_count * getattr(config, "nproc", 1)
    files: dict[str, Path | bytes] = {}
    search = None
    if command == TUNE:
        from stocktake.aws.search import OF_THE_SEARCH, read_search

        with contextlib.chdir(project):
            search = read_search(config, parameters)
        files[SPACE] = json.dumps(search.space.to_dict()).encode()
        given = {name: value for name, value in given.items() if name not in OF_THE_SEARCH}
    elif command in _DISTRIBUTED:
        config.check_batch(processes)
    given_paths = {"root": config.root} if config.root else {}
    for name in _FILES:
        path = project / str(getattr(config, name, None) or "")
        with contextlib.suppress(OSError):  # such as a name that no file can have
            if path.is_file():
                files[path.name], given_paths[name] = path, str(getattr(config, name))
                given[name] = f"{CHANNEL}files/{path.name}"
        if name == "list" and config.list and path.name not in files:
            raise StocktakeError(f"--list {config.list} cannot be read: there is no such file in {project}")
    return Parameters(
        command, {COMMAND: command, **given}, config.root, project / config.workspace, files, given_paths, search
    )


def as_arguments(hyperparameters: Mapping[str, str], data: Path) -> tuple[str, list[str]]:
    """The command and its arguments, in the job. A training job of a tuning job is one trial of it.

    Args:
        hyperparameters: of the job; what SageMaker's tuner adds begins with an underscore and is left out.
        data: folder of the input channels.

    Raises:
        StocktakeError: no command is among them, or what the tuner has chosen is not of the search's space.
    """
    command = hyperparameters.get(COMMAND, "")
    if command not in JOBS:
        raise StocktakeError(f"the hyperparameter {COMMAND} is {command!r}: it must be one of {', '.join(JOBS)}")
    chosen: list[str] = []
    if command == TUNE:
        from stocktake.aws.search import as_options, chosen_settings, load_space, names

        stage = hyperparameters.get("stage", "finetune")
        space = load_space((data / "files" / SPACE).read_text(encoding="utf-8"), stage)
        chosen = as_options(stage, chosen_settings(space, hyperparameters))
        tuned = names(space)
        hyperparameters = {name: value for name, value in hyperparameters.items() if name not in tuned}
        command = "remote_trial"
    arguments = []
    for name, value in hyperparameters.items():
        if name == COMMAND or name.startswith(("_", "sagemaker_")):
            continue
        if value.startswith(CHANNEL):
            value = str(data / value.removeprefix(CHANNEL))
        arguments += [f"--{name}", value]
    return command, [*arguments, *chosen]


def _experiment(parameters: Mapping[str, str], command: str) -> dict[str, str]:
    """The settings of the experiment's file by their dotted names, as text: the job has not got the file."""
    if "experiment" not in parameters:
        return {}
    path = find_experiment(parameters["experiment"])
    return dict(_flat(read_experiment(path, JOBS[command])))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return flat
