"""`stocktake job`: a command inside a training container, by SageMaker's contract of folders.

    input/config/hyperparameters.json   the command and its parameters
    input/config/resourceconfig.json    the machines
    input/data/bins/                    the root
    checkpoints/runs/                   run folders; synchronised with S3, and there again after an interruption
    checkpoints/JOB/runs/               the same in a trial of a tuning job, whose trials share one place in S3
    output/data/runs/                   the same without the weights, for the way home
    output/failure                      why it failed, in a line
    model/                              the MLflow model

In a training job of a tuning job the command is one trial with what SageMaker has chosen. It keeps its run to itself.

The command runs in a process of its own, so that this one is left to tell what became of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import stocktake
from stocktake.aws.parameters import COMMAND, TUNE, as_arguments
from stocktake.aws.request import BINS, HOSTS
from stocktake.config import DdpConfig, JobConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import resolve
from stocktake.tracking.attached_run import attached_run_id
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import FINISHED, LocalRun

# As ddp and rung have them, whose imports (torch) this process does not need: it only waits.
PROGRAM = (sys.executable, str(Path(stocktake.__file__).parent))
MODEL = "model"
PORT = 29_400
"""Where the machines of a job meet, on the first one."""
_REASON_LENGTH = 1000  # SageMaker cuts it off at 1,024
_TERMINATED = 128 + signal.SIGTERM
JOB_NAME = "TRAINING_JOB_NAME"
"""Variable by which SageMaker tells a container its job's name."""


@dataclass(frozen=True)
class Machines:
    """The machines of a job, and which of them this one is."""

    hosts: tuple[str, ...]
    rank: int
    interface: str | None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this one keeps the run."""
        return self.rank == 0


def job(config: JobConfig) -> None:
    """Run the command of the hyperparameters; its results lie where SageMaker collects them, also when it fails.

    Raises:
        StocktakeError: the job was put together wrongly.
        SystemExit: the command's exit code, if it is not 0.
    """
    base = Path(config.base or os.environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
    try:
        machines = read_machines(_read(base, "resourceconfig"))
        workspace = _workspace(base)
        words = _command(base, workspace, machines)
        print(f"machine {machines.rank + 1} of {len(machines.hosts)}: stocktake {' '.join(words)}", flush=True)
        code, reason = _run(words, _variables(machines))
        if machines.is_rank_zero:
            collect(workspace / "runs", base)
    except StocktakeError as error:
        _write_failure(base, str(error))
        raise
    if code == _TERMINATED:
        sys.exit(code)
    if code:
        _write_failure(base, reason)
        sys.exit(code)


def read_machines(resources: Mapping[str, Any]) -> Machines:
    """The machines as SageMaker says; StocktakeError where they are not as many as were asked for."""
    hosts = tuple(sorted(resources["hosts"], key=lambda host: (len(host), host)))
    asked = int(os.environ.get(HOSTS) or len(hosts))
    if len(hosts) != asked:
        raise StocktakeError(f"the job has {len(hosts)} machines ({', '.join(hosts)}), not the {asked} it asked for")
    return Machines(hosts, hosts.index(resources["current_host"]), resources.get("network_interface_name"))


def unfinished_run(runs: Path) -> Path | None:
    """The run that an interruption left behind, if it has a checkpoint to go on from. Others are begun again."""
    found = None
    for path in sorted(runs.glob("*/run.json")):
        folder = LocalRun.open(path.parent)
        if folder.state.status == FINISHED or folder.state.parent is not None:
            continue
        if (path.parent / "checkpoints" / "last.ckpt").is_file():
            found = path.parent
        elif folder.state.attach_run_id == attached_run_id():
            shutil.rmtree(path.parent)  # interrupted before its first checkpoint: nothing in it is worth a second run
    return found


def collect(runs: Path, base: Path) -> None:
    """Copy what goes home with the job's output: the run folders without their checkpoints, and the model."""
    data, model = base / "output" / "data", base / "model"
    # Renamed when whole: a container that is killed meanwhile leaves no half run, but its checkpoints.
    beside = shutil.copytree(runs, base / "work" / "home", ignore=shutil.ignore_patterns(".*", "checkpoints", "*.ckpt"))
    data.mkdir(parents=True, exist_ok=True)
    beside.rename(data / "runs")
    chosen = _model_folder(runs)
    if chosen is not None:
        shutil.copytree(chosen, model, dirs_exist_ok=True)


def _command(base: Path, workspace: Path, machines: Machines) -> list[str]:
    """The command line of this machine."""
    hyperparameters = {name: str(value) for name, value in _read(base, "hyperparameters").items()}
    data = base / "input" / "data"
    command, arguments = as_arguments(hyperparameters, data)
    is_trial = hyperparameters[COMMAND] == TUNE
    if (data / BINS).is_dir():
        arguments += ["--root", str(data / BINS)]
    arguments += ["--workspace", str(workspace)]
    if is_trial:
        arguments += ["--tracking.offline", "true"]
    elif machines.is_rank_zero and (trouble := _tracking_trouble()) is not None:
        print(f"{trouble}: the results go home with the job's output", flush=True)
        arguments += ["--tracking.offline", "true"]
    if command not in ("finetune", "ddp", "remote_trial"):
        return [command, *arguments]
    if (earlier := unfinished_run(workspace / "runs")) is not None:
        if machines.is_rank_zero:
            print(f"going on with {earlier.name} after an interruption", flush=True)
        arguments += ["--resume", str(earlier)]
    if is_trial:
        return [command, *arguments]
    return _distributed(command, arguments, hyperparameters, machines)


def _distributed(
    command: str, arguments: list[str], hyperparameters: Mapping[str, str], machines: Machines
) -> list[str]:
    """The command, as one of ddp where there is more than one process: torchrun's agent runs on every machine."""
    default = max(1, len([*Path("/dev").glob("nvidia[0-9]*")]))
    if command == "ddp":
        default = DdpConfig.nproc
    nproc, nnodes = int(hyperparameters.get("nproc", default)), len(machines.hosts)
    asked = hyperparameters.get("training.world_size")
    if asked not in (None, "null", str(nproc * nnodes)):
        raise StocktakeError(
            f"--training.world_size {asked}, but the job has {nnodes} machines with {nproc} processes each: change "
            "instance_count, instance_type or nproc"
        )
    if nproc * nnodes == 1 and command != "ddp":
        return [command, *arguments]
    if "nproc" not in hyperparameters:
        arguments = [*arguments, "--nproc", str(nproc)]
    if nnodes > 1:
        meeting = f"{machines.hosts[0]}:{PORT}"
        arguments += ["--nnodes", str(nnodes), "--node_rank", str(machines.rank), "--rendezvous", meeting]
    return ["ddp" if command == "finetune" else command, *arguments]


def _run(words: list[str], variables: Mapping[str, str]) -> tuple[int, str]:
    """Run `stocktake WORDS`, whose output is seen as it comes; SIGTERM is handed on to it.

    Returns:
        Its exit code, _TERMINATED after a SIGTERM, and if it is not 0 the reason in a line.
    """
    process = subprocess.Popen(
        [*PROGRAM, *words], env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    last = ""
    with _handed_on(process) as is_terminated:
        for line in process.stderr or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            last = line.strip() or last
        code = process.wait()
    if is_terminated and code:
        return _TERMINATED, "SIGTERM"
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return 128 - code, f"{words[0]} was killed by {signal.Signals(-code).name}{memory}"
    return code, last.removeprefix("stocktake: ") or f"{words[0]} ended with exit code {code}"


@contextmanager
def _handed_on(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C go on to the process; yields the signals that came."""
    came: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workspace(base: Path) -> Path:
    """A workspace whose run folders are checkpoints, and whose caches are not."""
    inside = Path("checkpoints")
    if _read(base, "hyperparameters").get(COMMAND) == TUNE:
        inside /= os.environ.get(JOB_NAME, "trial")
    workspace = base / "work"
    workspace.mkdir(parents=True, exist_ok=True)
    (base / inside / "runs").mkdir(parents=True, exist_ok=True)
    if not (workspace / "runs").is_symlink():
        (workspace / "runs").symlink_to(Path("..") / inside / "runs")
    return workspace


def _variables(machines: Machines) -> dict[str, str]:
    if machines.interface is None or len(machines.hosts) == 1:
        return {}
    return {f"{library}_SOCKET_IFNAME": machines.interface for library in ("GLOO", "NCCL")}


def _tracking_trouble() -> str | None:
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
    """The model of the job's run: a ladder's is that of its best rung."""
    folders = [LocalRun.open(path.parent) for path in runs.glob("*/run.json")]
    tops = sorted((one for one in folders if one.state.parent is None), key=lambda one: one.state.start_ms)
    if not tops:
        return None
    top = tops[-1]
    of_best = [
        one for one in folders if one.state.parent == top.path.name and one.tags.get("stage") == top.tags.get("best")
    ]
    found = [one.path / "models" / MODEL for one in (top, *of_best)]
    return next((path for path in found if (path / "MLmodel").is_file()), None)


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
