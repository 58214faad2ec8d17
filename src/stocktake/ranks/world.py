"""Who a process is, as torchrun says in the environment, and how a job fails."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from stocktake.errors import StocktakeError

LAUNCHER = "STOCKTAKE_LAUNCHER"
"""Set in the environment of processes that `stocktake ddp` has started."""


@dataclass(frozen=True)
class World:
    """The processes of a job, and which of them this one is. `World()` is a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine, and on every other."""
    node: int = 0
    """Which machine."""
    nodes: int = 1
    attempt: int = 0
    """How many times torchrun has begun again."""
    backend: str | None = None
    """gloo or nccl, once joined."""


class RankFailedError(StocktakeError):
    """Another process of the job failed or was lost, and this one cannot go on without it."""


class JobFailedError(StocktakeError):
    """A job of several processes has failed."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """exit_code: of the process that failed first; 2 when a user can mend it, 1 otherwise."""
        super().__init__(message)
        self.exit_code = exit_code


def world_from_env() -> World:
    """The world as torchrun put it into the environment, whether or not it was joined.

    Raises:
        StocktakeError: the variables contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = number("RANK"), number("WORLD_SIZE")
    local_rank, local_size = number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", size)
    nodes = number("GROUP_WORLD_SIZE", max(1, size // max(1, local_size)))
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        raise StocktakeError(
            f"RANK={rank} LOCAL_RANK={local_rank} is no process of WORLD_SIZE={size} LOCAL_WORLD_SIZE={local_size}: "
            "start the job with torchrun or stocktake ddp"
        )
    if local_size * nodes != size:
        raise StocktakeError(
            f"WORLD_SIZE={size} is not {nodes} machines with {local_size} processes each: start as many on each machine"
        )
    node = number("GROUP_RANK", rank // local_size)
    return World(rank, size, local_rank, local_size, node, nodes, number("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> str | None:
    """Names the job that torchrun runs: the same after a restart, another one for another job."""
    return job_of(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def job_of(launcher: int, run_id: str | None = None) -> str:
    """The name of the job of a launching process of this machine."""
    return f"{run_id or os.environ['TORCHELASTIC_RUN_ID']}@{socket.gethostname()}:{launcher}"


def choose_backend(processes: int) -> str:
    """How that many processes of a machine talk: by nccl where each has a GPU of its own, by gloo where there is none.

    Raises:
        StocktakeError: there are fewer GPUs than processes.
    """
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise StocktakeError(
            f"{processes} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: start one a GPU, or set "
            'CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    return "nccl"


def error_recorded() -> bool:
    """Whether this process's error lies where `stocktake ddp` reads it, who tells it in one line for all of them."""
    return LAUNCHER in os.environ and Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).is_file()


def number(name: str, missing: int | None = None) -> int:
    """A variable of the environment; StocktakeError where it is no number."""
    text = os.environ.get(name)
    if text is None and missing is not None:
        return missing
    try:
        return int(str(text))
    except ValueError:
        raise StocktakeError(f"{name}={text} in the environment is no number: start the job with torchrun") from None
