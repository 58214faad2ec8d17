"""`stocktake job`: a command inside a training container, by SageMaker's contract of folders.

    input/config/hyperparameters.json   the command and its parameters
    input/config/resourceconfig.json    the instances
    input/data/bins/                    the root
    checkpoints/runs/                   run folders; synchronised with S3, and there again after an interruption
    checkpoints/JOB/runs/               the same in a trial of a tuning job, whose trials share one place in S3
    output/data/runs/                   the same without the weights: the job's output
    output/failure                      why it failed, in a line
    model/                              the MLflow model

In a training job of a tuning job the command is one trial with what SageMaker has chosen; it does not log to MLflow.
The command runs in a process of its own, so that this one can report how it ended, even if it is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stocktake
from stocktake.aws.parameters import COMMAND, DISTRIBUTED, TUNE, as_arguments
from stocktake.aws.request import BINS, INSTANCE_COUNT
from stocktake.config.aws import JobConfig
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import DdpConfig
from stocktake.errors import StocktakeError
from stocktake.signals import forward_signals
from stocktake.tracking.addresses import resolve
from stocktake.tracking.attached_run import attached_run_id
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import FINISHED, LocalRun

# As commands.ddp has it, whose import of torch this process does not need: it only waits.
PROGRAM = (sys.executable, str(Path(stocktake.__file__).parent))
MODEL = "model"
PORT = 29_400
"""Of the rendezvous, on the first instance."""
_REASON_LENGTH = 1000  # SageMaker cuts it off at 1,024
_TERMINATED = 128 + signal.SIGTERM
JOB_NAME = "TRAINING_JOB_NAME"
"""Variable by which SageMaker tells a container its job's name."""


@dataclass(frozen=True)
class Instances:
    """The instances of a job, and which of them this one is."""

    hosts: tuple[str, ...]
    rank: int
    interface: str | None


def job(config: JobConfig) -> None:
    """Run the command of the hyperparameters; its results are where SageMaker collects them, also when it fails.

    Raises:
        StocktakeError: the job was put together wrongly.
        SystemExit: the command's exit code, if it is not 0.
    """
    base = Path(config.base or os.environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
    try:
        instances = read_instances(_read(base, "resourceconfig"))
        workspace = _workspace(base)
        words = _command(base, workspace, instances)
        print(f"instance {instances.rank + 1} of {len(instances.hosts)}: stocktake {' '.join(words)}", flush=True)
        code, reason = _run(words, _variables(instances))
        if instances.rank == 0:
            collect(workspace / "runs", base)
    except StocktakeError as error:
        _write_failure(base, str(error))
        raise
    if code and code != _TERMINATED:
        _write_failure(base, reason)
    if code:
        sys.exit(code)


def read_instances(resources: Mapping[str, Any]) -> Instances:
    """The instances as SageMaker says; StocktakeError where they are not as many as were asked for."""
    hosts = tuple(sorted(resources["hosts"], key=lambda host: (len(host), host)))
    expected = int(os.environ.get(INSTANCE_COUNT) or len(hosts))
    if len(hosts) != expected:
        raise StocktakeError(f"the job has {len(hosts)} instances ({', '.join(hosts)}), not {expected}")
    return Instances(hosts, hosts.index(resources["current_host"]), resources.get("network_interface_name"))


def unfinished_run(runs: Path) -> Path | None:
    """The run that an interruption left behind, if it has a checkpoint to go on from. Others are begun again."""
    resumable = None
    for path in sorted(runs.glob("*/run.json")):
        run = LocalRun.open(path.parent)
        if run.state.status == FINISHED or run.state.parent is not None:
            continue
        if (path.parent / "checkpoints" / "last.ckpt").is_file():
            resumable = path.parent
        elif run.state.attach_run_id == attached_run_id():
            shutil.rmtree(path.parent)  # interrupted before its first checkpoint: it has nothing worth a second run
    return resumable


def collect(runs: Path, base: Path) -> None:
    """Copy what the job's output holds: the run folders without their checkpoints, and the model."""
    data = base / "output" / "data"
    # Renamed when whole: a container that is killed meanwhile leaves no half run, but its checkpoints.
    copy = shutil.copytree(runs, base / "work" / "output", ignore=shutil.ignore_patterns(".*", "checkpoints", "*.ckpt"))
    data.mkdir(parents=True, exist_ok=True)
    copy.rename(data / "runs")
    if (model := _model_folder(runs)) is not None:
        shutil.copytree(model, base / "model", dirs_exist_ok=True)


def _command(base: Path, workspace: Path, instances: Instances) -> list[str]:
    """The command line of this instance."""
    hyperparameters = {name: str(value) for name, value in _read(base, "hyperparameters").items()}
    data = base / "input" / "data"
    command, arguments = as_arguments(hyperparameters, data)
    if (data / BINS).is_dir():
        arguments += ["--root", str(data / BINS)]
    arguments += ["--workspace", str(workspace)]
    is_trial = hyperparameters[COMMAND] == TUNE
    failure = None if is_trial or instances.rank else _tracking_failure()
    if failure is not None:
        print(f"{failure}: the results come with the job's output", flush=True)
    if is_trial or failure is not None:
        arguments += ["--tracking.offline", "true"]
    if command not in (*DISTRIBUTED, "remote_trial"):
        return [command, *arguments]
    if (run := unfinished_run(workspace / "runs")) is not None:
        print(f"resuming {run.name} after an interruption", flush=True)
        arguments += ["--resume", str(run)]
    return [command, *arguments] if is_trial else _distributed(command, arguments, hyperparameters, instances)


def _distributed(
    command: str, arguments: list[str], hyperparameters: Mapping[str, str], instances: Instances
) -> list[str]:
    """The command, as ddp where there is more than one process: torchrun's agent runs on every instance."""
    default = DdpConfig.nproc if command == "ddp" else max(1, len([*Path("/dev").glob("nvidia[0-9]*")]))
    nproc, nnodes = int(hyperparameters.get("nproc", default)), len(instances.hosts)
    world_size = hyperparameters.get("training.world_size")
    if world_size not in (None, "null", str(nproc * nnodes)):
        raise StocktakeError(
            f"--training.world_size {world_size}, but the job has {nnodes} instances with {nproc} processes each: "
            "change instance_count, instance_type or nproc"
        )
    if nproc * nnodes == 1 and command != "ddp":
        return [command, *arguments]
    if "nproc" not in hyperparameters:
        arguments = [*arguments, "--nproc", str(nproc)]
    if nnodes > 1:
        rendezvous = f"{instances.hosts[0]}:{PORT}"
        arguments += ["--nnodes", str(nnodes), "--node_rank", str(instances.rank), "--rendezvous", rendezvous]
    return ["ddp", *arguments]


def _run(words: list[str], variables: Mapping[str, str]) -> tuple[int, str]:
    """Run `stocktake WORDS`; its output is passed through, and SIGTERM passed on to it.

    Returns:
        Its exit code, _TERMINATED after a SIGTERM, and if it is not 0 the reason in a line.
    """
    process = subprocess.Popen(
        [*PROGRAM, *words], env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    last_line = ""
    with forward_signals(process) as signals:
        for line in process.stderr or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            last_line = line.strip() or last_line
        code = process.wait()
    if signals and code:
        return _TERMINATED, "SIGTERM"
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return 128 - code, f"{words[0]} was killed by {signal.Signals(-code).name}{memory}"
    return code, last_line.removeprefix("stocktake: ") or f"{words[0]} ended with exit code {code}"


def _workspace(base: Path) -> Path:
    """A workspace whose run folders are in the checkpoints, and whose caches are not."""
    inside = Path("checkpoints")
    if _read(base, "hyperparameters").get(COMMAND) == TUNE:
        inside /= os.environ.get(JOB_NAME, "trial")
    workspace = base / "work"
    workspace.mkdir(parents=True, exist_ok=True)
    (base / inside / "runs").mkdir(parents=True, exist_ok=True)
    if not (workspace / "runs").is_symlink():
        (workspace / "runs").symlink_to(Path("..") / inside / "runs")
    return workspace


def _variables(instances: Instances) -> dict[str, str]:
    if instances.interface is None or len(instances.hosts) == 1:
        return {}
    return {f"{library}_SOCKET_IFNAME": instances.interface for library in ("GLOO", "NCCL")}


def _tracking_failure() -> str | None:
    """Why the run cannot be logged while the job runs; None if it can."""
    from stocktake.tracking.uploader import get_run

    uri, run_id = os.environ.get("MLFLOW_TRACKING_URI"), attached_run_id()
    if not uri:
        return "no tracking server"
    try:
        connection = Connection(resolve(TrackingConfig(uri=uri)))
        connection.open()
        if run_id and get_run(connection, run_id) is None:
            return f"the tracking server {connection.shown} does not have the run {run_id}"
    except Exception as error:  # whatever it is, training goes on without
        return brief(error)
    return None


def _model_folder(runs: Path) -> Path | None:
    """The model of the job's run: a ladder's is that of its best stage."""
    folders = [LocalRun.open(path.parent) for path in runs.glob("*/run.json")]
    tops = [run for run in folders if run.state.parent is None]
    if not tops:
        return None
    top = max(tops, key=lambda run: run.state.start_ms)
    children = [run for run in folders if run.state.parent == top.folder.name]
    best = [run for run in children if run.tags.get("stage") == top.tags.get("best")]
    models = [run.folder / "models" / MODEL for run in (top, *best)]
    return next((model for model in models if (model / "MLmodel").is_file()), None)


def _read(base: Path, name: str) -> dict[str, Any]:
    path = base / "input" / "config" / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StocktakeError(f"{path} cannot be read ({error}): `stocktake job` is for training containers") from None
    if not isinstance(content, dict):
        raise StocktakeError(f"{path} holds no settings")
    return content


def _write_failure(base: Path, reason: str) -> None:
    path = base / "output" / "failure"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(reason.split())[:_REASON_LENGTH], encoding="utf-8")
