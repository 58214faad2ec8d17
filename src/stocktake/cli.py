"""`stocktake COMMAND`: from the words of a command line to the command's function.

A command's modules are imported when it runs, so that help is instant.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stocktake import __version__, distributed
from stocktake.config.aws import JobConfig, JobsConfig, RemoteTrialConfig
from stocktake.config.data import DataConfig
from stocktake.config.parser import ALIASES, examples, parse_arguments, summary
from stocktake.config.runs import CompareConfig, EdaConfig, EvaluateConfig, SyncConfig, TrackingConfig
from stocktake.config.serving import DeployConfig, PredictConfig, ServeConfig
from stocktake.config.training import DdpConfig, LadderConfig, TuneConfig
from stocktake.config.versions import PromoteConfig, RegisterConfig, RegistryConfig, RollbackConfig
from stocktake.errors import StocktakeError
from stocktake.machine import share_the_machine
from stocktake.stages.table import STAGES

_EXTRAS = dict.fromkeys(("boto3", "botocore", "obstore", "sagemaker", "webdataset"), "aws")
"""What brings a library that may be missing; the others come with serving and training."""


@dataclass(frozen=True)
class Command:
    """A row of the table of commands."""

    config: type
    """Its settings; the docstring is the command's help."""
    function: str
    """MODULE:FUNCTION in stocktake.commands."""
    is_distributed: bool = False
    """Whether torchrun may run it in several processes."""


COMMANDS = {
    "ladder": Command(LadderConfig, "ladder:ladder"),
    "data": Command(DataConfig, "data:data"),
    "eda": Command(EdaConfig, "eda:eda"),
    **{name: Command(stage.config, "train:train", stage.is_distributed) for name, stage in STAGES.items()},
    "ddp": Command(DdpConfig, "ddp:ddp"),
    "tune": Command(TuneConfig, "tune:tune"),
    "remote_trial": Command(RemoteTrialConfig, "remote_trial:remote_trial"),
    "evaluate": Command(EvaluateConfig, "evaluate:evaluate"),
    "compare": Command(CompareConfig, "compare:compare"),
    "register": Command(RegisterConfig, "register:register"),
    "promote": Command(PromoteConfig, "promote:promote"),
    "rollback": Command(RollbackConfig, "rollback:rollback"),
    "registry": Command(RegistryConfig, "registry:registry"),
    "serve": Command(ServeConfig, "serve:serve"),
    "deploy": Command(DeployConfig, "deploy:deploy"),
    "predict": Command(PredictConfig, "predict:predict"),
    "sync": Command(SyncConfig, "sync:sync"),
    "jobs": Command(JobsConfig, "jobs:jobs"),
    "job": Command(JobConfig, "job:job"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    The exit code is 0 on success, 2 for an error that the user can mend (one line says how), 1 for a job that failed,
    130 on Ctrl-C. `--debug` shows the traceback of an error instead of its line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    share_the_machine()
    try:
        run(words)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        exit_code, message = _explain(error, words[0] if words else "")
        if debug or exit_code is None:
            raise
        if message and not distributed.error_recorded():
            print(f"stocktake: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(exit_code)
    sys.exit(0)


def _explain(error: BaseException, command: str) -> tuple[int | None, str | None]:
    """The exit code and the line for an error; no exit code for an error of the program itself."""
    match error:
        case distributed.JobFailedError():
            return error.exit_code, str(error)
        case StocktakeError():
            return 2, str(error)
        case ModuleNotFoundError(name=str(module)) if module.partition(".")[0] != "stocktake":
            extras = _EXTRAS.get(module.partition(".")[0], "serving,training")
            return 2, f"{command} needs {module}, which is not installed: pip install 'stocktake[{extras}]'"
        case BrokenPipeError() if _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
            return 128 + signal.SIGPIPE, None
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            return 2, f"cannot write {error.filename or ''}: {error.strerror}; choose another --workspace"
        case KeyboardInterrupt():
            return 130, None if distributed.LAUNCHER in os.environ else "interrupted"
    return None, None


def _output_is_closed() -> bool:
    """Whether the reader of stdout is gone, as in `stocktake jobs --follow NAME | grep -m1 epoch=1`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def run(arguments: Sequence[str]) -> object:
    """Parse and run; what the command's function returns.

    Raises:
        StocktakeError: no such command or option, or a value that does not fit.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return None
    if arguments[0] == "--version":
        print(f"stocktake {__version__}")
        return None
    name = ALIASES.get(arguments[0], arguments[0])
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], 1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise StocktakeError(f"{arguments[0]!r} is no command: {hint} (stocktake --help)")
    processes = distributed.world_from_env().size
    if processes > 1 and not COMMANDS[name].is_distributed:
        raise StocktakeError(f"{name} runs in one process, not {processes}: torchrun is for stocktake train")
    settings = parse(name, arguments[1:])
    if (split := getattr(settings, "split", None)) is not None and split.like is not None:
        from stocktake.registry.lineage import file_of_splits

        tracking = getattr(settings, "tracking", None) or TrackingConfig()
        split.like = file_of_splits(split.like, tracking, Path(settings.workspace))
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(f"stocktake.commands.{module}"), function)(settings)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Read the settings of the command of that name.

    Raises:
        StocktakeError: an unknown option, or a value that does not fit.
    """
    return parse_arguments(COMMANDS[name].config, arguments, name)


def overview() -> str:
    """All commands, a line each."""
    lines = ["stocktake: count the items in a warehouse bin from one photo; find where the record is wrong.", ""]
    lines += ["usage: stocktake COMMAND [--option value ...] [--debug]", "", "commands:"]
    for name, command in COMMANDS.items():
        aliases = "".join(f" (also: {alias})" for alias, target in ALIASES.items() if target == name)
        lines.append(f"  {name:10} {summary(command.config)}{aliases}")
    lines += ["", "examples:", *(f"  {examples(command.config)[0]}" for command in COMMANDS.values())]
    lines += ["", "stocktake COMMAND --help lists a command's options; --debug shows the traceback of an error."]
    return "\n".join(lines)
