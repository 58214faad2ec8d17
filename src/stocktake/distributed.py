"""The processes of a distributed job, as torchrun starts them: rank, process group, and a few collectives.

    with process_group(timeout=300) as world:  # torchrun has started world.size processes of this program
        with local_rank_zero_first():          # once on each machine
            prepare()
        folder = run_on_rank_zero(open_run)
        parts = gather(part)

A process outside of a job is rank 0 of 1: all of this then does nothing, and torch is not imported.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from stocktake.errors import StocktakeError

LAUNCHER = "STOCKTAKE_LAUNCHER"
"""Environment variable by which `stocktake ddp` gives the processes it starts the job's id."""
_BARRIER_TIMEOUT = timedelta(hours=2)
"""A barrier waits for work of one rank that may take long: preparing photos, evaluating, exporting."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a job, and which of them this one is. `World()` is a process outside of a job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on each machine."""
    nodes: int = 1
    restarts: int = 0
    """How many times torchrun has restarted the processes."""
    backend: str | None = None
    """gloo or nccl, inside of `process_group`."""


class PeerLostError(StocktakeError):
    """A collective failed because another process has ended or cannot be reached."""


class JobFailedError(StocktakeError):
    """A job of several processes has failed."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """exit_code: of the process that failed first."""
        super().__init__(message)
        self.exit_code = exit_code


_world = World()
_barrier_group: Any = None


def world_from_env() -> World:
    """The world that torchrun put into the environment.

    Raises:
        StocktakeError: the variables are no numbers, or contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size) or size % local_size:
        raise StocktakeError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} contradict each "
            "other: start the job with torchrun or stocktake ddp, with as many processes on each machine"
        )
    restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
    return World(rank, size, local_rank, local_size, size // local_size, restarts)


def world() -> World:
    """The world of the process group that this process is in."""
    return _world


def is_rank_zero() -> bool:
    """Whether this process prints, logs and writes."""
    return _world.rank == 0


@contextmanager
def process_group(*, timeout: float, expected: int | None = None) -> Iterator[World]:
    """Join the process group; barrier on exit. Within another such block, or in a single process, do nothing.

    An exception is recorded in torchrun's error file; torchrun then ends the other processes.

    Args:
        timeout: seconds that a collective waits for the other processes.
        expected: the number of processes that must have been started; None: any.

    Raises:
        StocktakeError: another number of processes was started, or they cannot reach each other.
        PeerLostError: another process ended.
    """
    global _world, _barrier_group
    if _world.size > 1:
        yield _world
        return
    with _errors_recorded():
        started = world_from_env()
        if expected not in (None, started.size):
            raise StocktakeError(
                f"--training.world_size {expected}, but the number of processes is {started.size}: "
                "give torchrun or stocktake ddp as many"
            )
        if started.size == 1:
            yield started
            return
        import torch.distributed as dist

        try:
            with _network_interface(started):
                _world = _join(started, timeout)
                _barrier_group = dist.new_group(backend="gloo", timeout=_BARRIER_TIMEOUT)
                yield _world
                barrier()
        except RuntimeError as error:
            if not _is_communication_error(error):
                raise
            raise PeerLostError(
                f"rank {started.rank} lost the connection to another process ({_first_line(error)})"
            ) from error
        finally:
            _world, _barrier_group = World(), None
            with suppress(Exception):
                dist.destroy_process_group()


def _join(started: World, timeout: float) -> World:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise StocktakeError(f"WORLD_SIZE={started.size}, but {missing[0]} is not set: start the job with torchrun")
    backend = choose_backend(started.local_size)
    if backend == "nccl":
        torch.cuda.set_device(started.local_rank)
    try:
        seconds = timedelta(seconds=timeout)
        store, rank, size = next(rendezvous("env://", started.rank, started.size, timeout=seconds))
        # torchrun's store may be that of the processes before a restart, with their addresses
        store = PrefixStore(f"attempt {started.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=seconds)
    except (RuntimeError, ValueError) as error:
        raise StocktakeError(
            f"rank {started.rank} does not reach the other {started.size - 1} processes through "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({_first_line(error)}): start the job on every "
            "machine, open the port, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them"
        ) from error
    return replace(started, backend=backend)


def choose_backend(processes: int) -> str:
    """nccl where each of `processes` on this machine has a GPU of its own, gloo where there is no GPU.

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


@contextmanager
def _network_interface(started: World) -> Iterator[None]:
    """Name the interface that leads to MASTER_ADDR, unless the user has: gloo would take that of the host's own name,
    which is often 127.0.1.1 or a network that the other machines do not see. On one machine it is the loopback."""
    import psutil

    local = "127.0.0.1"
    if started.nodes > 1:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # of a datagram socket: looks the route up, sends nothing
            local = probe.getsockname()[0]
    variables = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} - os.environ.keys()
    if started.nodes > 1 and local.startswith("127."):
        variables = set()
    for name, addresses in psutil.net_if_addrs().items():
        if local in [address.address for address in addresses]:
            os.environ.update(dict.fromkeys(variables, name))
    try:
        yield
    finally:
        for variable in variables:
            os.environ.pop(variable, None)


def barrier() -> None:
    """Wait until all processes have come here."""
    if _world.size > 1:
        import torch.distributed as dist

        dist.barrier(_barrier_group)


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block in one process of each machine, then in the others."""
    if _world.local_rank:
        barrier()
    yield
    if not _world.local_rank:
        barrier()
    barrier()


def run_on_rank_zero(compute: Callable[[], T]) -> T:
    """The result of `compute` on rank 0, for all; the others wait for it."""
    value = compute() if is_rank_zero() else None
    barrier()
    return broadcast(value)  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """Rank 0's value, for all; anything that can be pickled."""
    if _world.size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """Every process's value, by rank, for all."""
    if _world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def job_id() -> str | None:
    """Identifies the job on this machine; the same after a restart. None outside of a job."""
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        return os.environ.get(LAUNCHER) or f"{run_id}@{os.getppid()}"
    return None


def error_recorded() -> bool:
    """Whether this process's error is in the error file that `stocktake ddp` reads and prints."""
    return LAUNCHER in os.environ and Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).is_file()


@contextmanager
def _errors_recorded() -> Iterator[None]:
    """Write an exception into torchrun's error file, where there is one."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            with suppress(OSError):
                get_error_handler().record_exception(error)
        raise


def _is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective has failed. gloo raises plain RuntimeErrors, with its own source file in the text."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise StocktakeError(f"{name}={text} in the environment is no number: start the job with torchrun") from None
