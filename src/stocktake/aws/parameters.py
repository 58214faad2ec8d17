"""What `-P name=value` becomes in a job: checked by the command's own parser, then hyperparameters and channels."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.aws.settings import JobSettings
from stocktake.config.parser import ALIASES, find_experiment, parse_arguments, read_experiment
from stocktake.config.runs import EdaConfig, RunConfig
from stocktake.config.training import DdpConfig, LadderConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.stages.table import STAGES

if TYPE_CHECKING:  # it imports optuna
    from stocktake.aws.tuning_spec import TuningSpec

COMMAND = "command"
"""The hyperparameter that names the command."""
CHANNEL = "channel:"
"""Begins the value of a hyperparameter that is a file of a channel: channel:files/NAME."""
TUNE = "tune"
JOBS: dict[str, type[RunConfig]] = {
    "ladder": LadderConfig,
    "eda": EdaConfig,
    **{name: stage.config for name, stage in STAGES.items()},
    "ddp": DdpConfig,
    TUNE: TuneConfig,
}
"""The commands that run as jobs."""
SPACE = "search-space.json"
"""The search space of a tuning job, in the channel `files`."""
DISTRIBUTED = (*(name for name, stage in STAGES.items() if stage.is_distributed), "ddp")
"""Those that several processes may run together."""
_FILES = ("list", "weights")
_ELSEWHERE = {
    "tracking.uri": "the job's server is tracking_uri in the backend config",
    "tracking.registry_uri": "the job's server is tracking_uri in the backend config",
    "resume": "it is a folder of this machine; an interrupted spot job goes on by itself",
    "nnodes": "the instances of a job are instance_count in the backend config",
    "node_rank": "the instances of a job are instance_count in the backend config",
    "rendezvous": "the instances of a job find each other",
}


@dataclass(frozen=True)
class Parameters:
    """A checked command, as a job gets it."""

    command: str
    hyperparameters: dict[str, str]
    """The command and its parameters, an experiment's file among them, without root and workspace."""
    root: str | None
    """s3://bucket/prefix, or None for the synthetic one."""
    workspace: Path
    """Where the run folder is collected to."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content of this machine's files that the job needs, by their names in the channel `files`."""
    original_paths: dict[str, str] = field(default_factory=dict)
    """Settings that are paths, as the user gave them: the job has others."""
    tuning: TuningSpec | None = None
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
    if settings.instance_count > 1 and command not in DISTRIBUTED:
        raise StocktakeError(
            f"backend config: instance_count {settings.instance_count}: {command} runs on one instance; "
            f"{' and '.join(DISTRIBUTED)} on several"
        )
    if settings.warm_start and command != TUNE:
        raise StocktakeError(f"backend config: warm_start is for -e {TUNE}: leave it out")
    for name, reason in _ELSEWHERE.items():
        if name in parameters and not (command == TUNE and name == "resume"):
            raise StocktakeError(f"-P {name} cannot be given to a job: {reason}")
    files: dict[str, bytes] = {}
    tuning = None
    with contextlib.chdir(project):
        words = [word for name, value in parameters.items() for word in (f"--{name}", value)]
        config: Any = parse_arguments(JOBS[command], words, command)
        values = {**_experiment_settings(parameters, command), **parameters}
        if command == TUNE:
            from stocktake.aws.tuning_spec import SEARCH_SETTINGS, read_tuning_spec

            tuning = read_tuning_spec(config, parameters)
            files[SPACE] = json.dumps(tuning.space.to_dict()).encode()
            values = {name: value for name, value in values.items() if name not in SEARCH_SETTINGS}
        elif command in DISTRIBUTED:
            config.check_batch(settings.instance_count * getattr(config, "nproc", 1))
    for name in ("experiment", "root", "workspace"):
        values.pop(name, None)
    if config.root and not config.root.startswith("s3://"):
        raise StocktakeError(
            f"-P root={config.root}: a job reads s3:// addresses only: publish the root "
            f"(`stocktake data --root {config.root} --publish s3://...`) and give that address"
        )
    original_paths = {"root": config.root} if config.root else {}
    for name in _FILES:
        value = str(getattr(config, name, None) or "")
        content = _content(project / value) if value else None
        if content is not None:
            files[Path(value).name], original_paths[name] = content, value
            values[name] = f"{CHANNEL}files/{Path(value).name}"
        elif value and name == "list":
            raise StocktakeError(f"--list {value} cannot be read: there is no such file in {project}")
    return Parameters(
        command, {COMMAND: command, **values}, config.root, project / config.workspace, files, original_paths, tuning
    )


def as_arguments(hyperparameters: Mapping[str, str], data: Path) -> tuple[str, list[str]]:
    """The command and its arguments, in the job. A training job of a tuning job is one trial of it.

    Args:
        hyperparameters: of the job; what SageMaker's tuner adds begins with an underscore and is left out.
        data: folder of the input channels.

    Raises:
        StocktakeError: no command is among them, or what the tuner has chosen is not of the search space.
    """
    command = hyperparameters.get(COMMAND, "")
    if command not in JOBS:
        raise StocktakeError(f"the hyperparameter {COMMAND} is {command!r}: it must be one of {', '.join(JOBS)}")
    chosen: list[str] = []
    tuned: list[str] = []
    if command == TUNE:
        from stocktake.aws.tuning_spec import as_options, chosen_settings, load_space, tuned_names

        stage = hyperparameters.get("stage", "finetune")
        space = load_space((data / "files" / SPACE).read_text(encoding="utf-8"), stage)
        chosen, tuned = as_options(stage, chosen_settings(space, hyperparameters)), tuned_names(space)
        command = "remote_trial"
    arguments = []
    for name, value in hyperparameters.items():
        if name == COMMAND or name in tuned or name.startswith(("_", "sagemaker_")):
            continue
        if value.startswith(CHANNEL):
            value = str(data / value.removeprefix(CHANNEL))
        arguments += [f"--{name}", value]
    return command, [*arguments, *chosen]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:  # such as a name that no file can have
        return None


def _experiment_settings(parameters: Mapping[str, str], command: str) -> dict[str, str]:
    """The settings of the experiment's file by their dotted names, as text: the job does not have the file."""
    if "experiment" not in parameters:
        return {}
    return dict(_flat(read_experiment(find_experiment(parameters["experiment"]), JOBS[command])))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return flat
