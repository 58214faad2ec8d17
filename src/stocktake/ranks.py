"""The processes of a distributed job: who this one is, how they join, agree, wait for each other and fail together.

    with joined(timeout=300) as world:      # torchrun has started world.size processes of this program
        with leaders_first():               # once a machine, however long it takes
            prepare()
        folder = from_first(open_run)       # done by rank 0, known to all
        parts = gather(part)

Rank is asked here and nowhere else. A process that nobody joined is alone and the first: all of this is then nothing,
and torch is not imported.

The processes talk in two ways: by torch's collectives, which break when one of them is gone, and through a store of
keys (of torchrun, or of rank 0), by which they say why they leave, and wait for each other longer than a collective
does.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from stocktake.errors import StocktakeError

T = TypeVar("T")
LAUNCHER = "STOCKTAKE_LAUNCHER"
"""Set in the environment of processes that `stocktake ddp` has started."""

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 6.0
"""How long a process that lost the others looks for the reason."""
_DEAF_SECONDS = 10.0
"""A process that was told to end, and does not hear it, ends itself after this long."""
_PREFIX = "stocktake"


class RankFailedError(StocktakeError):
    """Another process of the job failed or was lost, and this one cannot go on without it."""


class JobFailedError(StocktakeError):
    """A job of several processes has failed."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """exit_code: of the process that failed first; 2 when a user can mend it, 1 otherwise."""
        super().__init__(message)
        self.exit_code = exit_code


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


@dataclass(frozen=True)
class _Process:
    rank: int
    node: int
    host: str
    pid: int
    nonce: str


# Who am I -------------------------------------------------------------------------------------------------------------


def launched() -> World:
    """The world as torchrun put it into the environment, whether or not it was joined.

    Raises:
        StocktakeError: the variables contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
    nodes = _number("GROUP_WORLD_SIZE", max(1, size // max(1, local_size)))
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        raise StocktakeError(
            f"RANK={rank} LOCAL_RANK={local_rank} is no process of WORLD_SIZE={size} LOCAL_WORLD_SIZE={local_size}: "
            "start the job with torchrun or stocktake ddp"
        )
    if local_size * nodes != size:
        raise StocktakeError(
            f"WORLD_SIZE={size} is not {nodes} machines with {local_size} processes each: start as many on each machine"
        )
    node = _number("GROUP_RANK", rank // local_size)
    return World(rank, size, local_rank, local_size, node, nodes, _number("TORCHELASTIC_RESTART_COUNT", 0))


def world() -> World:
    """The world that this process has joined."""
    return _world


def is_first() -> bool:
    """Whether this is the process that prints, logs and writes; a process alone is."""
    return world().rank == 0


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


def _number(name: str, missing: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and missing is not None:
        return missing
    try:
        return int(str(text))
    except ValueError:
        raise StocktakeError(f"{name}={text} in the environment is no number: start the job with torchrun") from None


# Together -------------------------------------------------------------------------------------------------------------


@contextmanager
def joined(*, timeout: float, expected: int | None = None) -> Iterator[World]:
    """Be one of the job's processes for the length of the block; at its end all wait for all, however long it takes.

    An exception of one process ends them all: it is told to torchrun, and the others get a RankFailedError that
    names it. SIGTERM is a KeyboardInterrupt. In a block within the block, or without torchrun, this is nothing.

    Args:
        timeout: seconds that a process is waited for, to come and in every step.
        expected: how many processes there must be; None: any number.

    Raises:
        StocktakeError: another number of processes was started, too few came, or they cannot reach each other.
        RankFailedError: another process failed.
    """
    global _group, _world
    if _group is not None:
        yield _world
        return
    with _told_to_torchrun():
        there = launched()
        if expected not in (None, there.size):
            raise StocktakeError(
                f"--training.world_size {expected}, but {there.size} process{'es were' * (there.size > 1)}"
                f"{' was' * (there.size == 1)} started: give torchrun or stocktake ddp as many"
            )
        if there.size == 1:
            _world = there
            try:
                yield there
            finally:
                _world = World()
            return
        _group = _Group(there, timeout)
        _world = _group.world
        try:
            with _group.heeding_signals():
                try:
                    yield _world
                    _group.meet()
                except BaseException as error:
                    _raise_explained(_group, error)
        finally:
            _group.leave()
            _group, _world = None, World()


@contextmanager
def explained() -> Iterator[None]:
    """Turn an exception that is only a consequence into the RankFailedError that names its cause.

    For blocks that tell somebody about their exception before `joined` sees it.
    """
    try:
        yield
    except BaseException as error:
        if _group is None:
            raise
        _raise_explained(_group, error)


@contextmanager
def leaders_first() -> Iterator[None]:
    """The block is run by one process of each machine, then by the others.

    Raises:
        RankFailedError: a leader failed, or was silent for longer than the timeout.
    """
    if _group is None:
        yield
        return
    if _group.world.local_rank == 0:
        yield
        _group.meet()
    else:
        _group.meet()
        yield
    _group.meet()


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` gives on the first process, for all; the others wait for it as long as it takes."""
    if _group is None:
        return compute()
    value = compute() if is_first() else None
    _group.meet()
    given: T = broadcast(value)  # type: ignore[assignment]
    return given


def broadcast(value: T) -> T:
    """The first process's value, for all; anything that can be pickled."""
    if _group is None:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every process's value, by rank, for all."""
    if _group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _group.world.size
    dist.all_gather_object(values, value)
    return values


def is_told() -> bool:
    """Whether this process's error lies where `stocktake ddp` reads it, who tells it in one line for all of them."""
    return LAUNCHER in os.environ and Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).is_file()


def is_gone(rank: int) -> bool:
    """Whether the process of that rank is dead; False where it is on another machine, or there is none."""
    return _group is not None and _group.is_gone(rank)


# The group ------------------------------------------------------------------------------------------------------------


class _Group:
    """What a process knows of the job that it has joined."""

    def __init__(self, there: World, timeout: float) -> None:
        self._timeout = timeout
        self.world = replace(there, backend=choose_backend(there.local_size))
        self._tcp = _connect(there, timeout)
        self.name, self._processes, attempt = _shake_hands(self._tcp, there, time.monotonic() + timeout)
        self.world = replace(self.world, attempt=max(there.attempt, attempt))
        self._store = _below(f"{_PREFIX}/{self.name}", self._tcp.clone())
        self._meetings = itertools.count()
        self._is_ending = False
        self._explained: BaseException | None = None
        self._pulse = _Pulse(_below(f"{_PREFIX}/{self.name}", self._tcp.clone()), there.rank)
        self._start_collectives()

    def _start_collectives(self) -> None:
        import torch
        import torch.distributed as dist

        if self.world.backend == "nccl":
            torch.cuda.set_device(self.world.local_rank)
        _choose_interface(self.world)
        try:
            dist.init_process_group(
                self.world.backend,
                # keys of its own: torch finds the addresses of an earlier attempt in torchrun's store otherwise
                store=_below(f"{_PREFIX}/{self.name}/torch", self._tcp),
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=timedelta(seconds=self._timeout),
            )
        except (RuntimeError, ValueError) as error:
            variable = "NCCL_SOCKET_IFNAME" if self.world.backend == "nccl" else "GLOO_SOCKET_IFNAME"
            raise StocktakeError(
                f"the {self.world.size} processes meet at {_address()}, but {self.world.backend} does not get from one "
                f"to another ({_first_line(error)}): set {variable} to the interface between the machines"
            ) from error

    # Waiting

    def meet(self) -> None:
        """Wait until all processes have come here, as long as they are alive.

        Raises:
            RankFailedError: one failed, or was silent for longer than the timeout.
        """
        size, turn = self.world.size, next(self._meetings)
        keys = [f"meeting {turn} {rank}" for rank in range(size)]
        self._store.set(keys[self.world.rank], "")
        beats, heard = [b""] * size, [time.monotonic()] * size
        seconds = 0.002
        while not self._store.check(keys):
            if self._store.check(["failed"]):
                raise RankFailedError(self._failure())
            if seconds >= _LOOK_SECONDS:
                awaited = [rank for rank in range(size) if not self._store.check([keys[rank]])]
                now = time.monotonic()
                for rank, beat in zip(awaited, self._beats(awaited), strict=True):
                    if beat != beats[rank]:
                        beats[rank], heard[rank] = beat, now
                    if self.is_gone(rank) and not self._store.check([keys[rank]]):
                        raise RankFailedError(self._tell_failure(self._lost(rank)))
                    if now - heard[rank] > self._timeout:
                        raise RankFailedError(self._tell_failure(self._silent(rank, self._timeout)))
            time.sleep(seconds)
            seconds = min(_LOOK_SECONDS, 1.5 * seconds)

    def _beats(self, ranks: list[int]) -> list[bytes]:
        return list(self._store.multi_get([f"beat {rank}" for rank in ranks]))

    # Failing

    def explain(self, error: BaseException) -> BaseException:
        """The error itself, or the one that names another process's failure as its cause; tells the others."""
        self._is_ending = True
        if error is self._explained or isinstance(error, RankFailedError):
            return error
        was_told = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        if was_told or _is_broken_connection(error):
            found = self._cause(_LOOK_SECONDS if was_told else _SILENT_SECONDS, was_told)
            if found is not None:
                error = found
            elif was_told:
                self._say(f"ended {self.world.rank}", "")
            else:
                error = RankFailedError(f"the connection between the processes broke: {_first_line(error)}")
        else:
            text = str(error) if isinstance(error, StocktakeError) else f"{type(error).__name__}: {_first_line(error)}"
            self._tell_failure(f"{self._names(self.world.rank)} failed: {text}")
        self._explained = error
        return error

    def _cause(self, seconds: float, was_told: bool) -> BaseException | None:
        """Why the others are gone; None where they are not."""
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        before, began = self._ask(lambda: self._beats(others)), time.monotonic()
        while True:
            gone = [rank for rank in others if self.is_gone(rank)]  # before its last word is looked for
            if self._ask(lambda: self._store.check(["failed"])):
                return RankFailedError(self._ask(self._failure) or "another process failed")
            ended = self._ask(lambda: [rank for rank in others if self._store.check([f"ended {rank}"])]) or []
            lost = [rank for rank in gone if rank not in ended]
            if lost and before is not None:
                return RankFailedError(self._tell_failure(self._lost(lost[0])))
            if ended and not was_told:
                return KeyboardInterrupt(f"{self._names(ended[0])} was told to end")
            if time.monotonic() > began + seconds:
                break
            time.sleep(_LOOK_SECONDS)
        if was_told:
            return None
        after = self._ask(lambda: self._beats(others))
        if before is None or after is None:
            return RankFailedError(f"{_address()}, where the processes meet, is out of reach: machine or network gone")
        silent = [rank for rank, one, other in zip(others, before, after, strict=True) if one == other]
        if silent:
            return RankFailedError(self._tell_failure(self._silent(silent[0], time.monotonic() - began)))
        return None

    def is_gone(self, rank: int) -> bool:
        """Whether a process of this machine is dead."""
        import psutil

        one = self._processes[rank]
        if (one.node, one.host) != (self.world.node, socket.gethostname()):
            return False
        try:
            return bool(psutil.Process(one.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
        except psutil.NoSuchProcess:
            return True

    def _names(self, rank: int) -> str:
        one = self._processes[rank]
        return f"rank {rank} (process {one.pid}{f' on {one.host}' if self.world.nodes > 1 else ''})"

    def _lost(self, rank: int) -> str:
        return f"{self._names(rank)} ended without a word: killed, or out of memory"

    def _silent(self, rank: int, seconds: float) -> str:
        return f"{self._names(rank)} is silent for {seconds:.0f} s: its machine or the network to it is gone"

    def _tell_failure(self, text: str) -> str:
        """Say it to all, unless another failure came first; the first one."""
        given = self._ask(lambda: self._store.compare_set("failed", "", text))
        return text if given is None else bytes(given).decode()

    def _failure(self) -> str:
        return bytes(self._store.get("failed")).decode()

    def _say(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def _ask(self, question: Callable[[], T], seconds: float = 3.0) -> T | None:
        """The store's answer; None when it does not come. A store beyond a dead network never answers."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(Exception):
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
        return answers[0] if answers else None

    # Ending

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT is a KeyboardInterrupt, unless the process is ending already."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heed(number: int, _frame: FrameType | None) -> None:
            self._pulse.heeded.set()
            if not self._is_ending:
                self._is_ending = True
                raise KeyboardInterrupt(signal.Signals(number).name)

        before = {number: signal.signal(number, heed) for number in (signal.SIGTERM, signal.SIGINT)}
        waker = signal.set_wakeup_fd(self._pulse.wakeup, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self) -> None:
        """Close what can be closed."""
        import torch.distributed as dist

        if self._explained is None and not self._is_ending:
            dist.destroy_process_group()
            if not _is_torchruns_store():  # the first process holds the store: it goes last
                self._ask(lambda: self._store.add("left", 1))
                deadline = time.monotonic() + 5
                while is_first() and time.monotonic() < deadline:
                    if self._ask(lambda: self._store.add("left", 0)) == self.world.size:
                        break
                    time.sleep(0.02)
        elif self.world.backend == "gloo":  # nccl would wait for those who are gone
            with suppress(Exception):
                dist.destroy_process_group()
        self._pulse.stop()


class _Pulse(threading.Thread):
    """Shows the others that this process is alive, and ends it when it is to end and cannot hear that.

    Python hears a signal only between two of its own instructions: never in a collective that waits for somebody who
    is gone. And a launcher that is killed cannot tell its processes to end.
    """

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(daemon=True, name="pulse")
        self.heeded = threading.Event()
        self._store = store
        self._key = f"beat {rank}"
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopped = False
        self._ear, self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._store.set(self._key, "0")
        self.start()

    def run(self) -> None:
        """Beat, and listen."""
        for beat in itertools.count(1):
            ready, _, _ = select.select([self._ear], [], [], _BEAT_SECONDS)
            if self._stopped:
                return
            if ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._ear, 64)):
                threading.Thread(target=self._end_the_deaf, daemon=True).start()
            if self._launcher not in (None, os.getppid()):
                self._launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            with suppress(Exception):  # a store that is gone is noticed by those who need it
                self._store.set(self._key, str(beat))

    def _end_the_deaf(self) -> None:
        if not self.heeded.wait(_DEAF_SECONDS):
            os._exit(128 + signal.SIGTERM)

    def stop(self) -> None:
        """Beat no more."""
        self._stopped = True
        os.write(self.wakeup, b"\0")
        self.join(2)


_group: _Group | None = None
"""The one that this process has joined."""
_world = World()


def _raise_explained(group: _Group, error: BaseException) -> None:
    cause = group.explain(error)
    if cause is error:
        raise error
    raise cause from error


# Meeting --------------------------------------------------------------------------------------------------------------


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _is_torchruns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _below(prefix: str, store: Any) -> Any:
    """The keys of a store that begin with a prefix."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(prefix, store)


def _connect(there: World, timeout: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's, or else held by rank 0."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise StocktakeError(f"WORLD_SIZE={there.size}, but {missing[0]} is not set: start the job with torchrun")
    holds = there.rank == 0 and not _is_torchruns_store()
    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT"),
            is_master=holds,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise StocktakeError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on this machine: give another --master-port, "
                "or none"
            ) from None
        raise StocktakeError(
            f"rank {there.rank} does not reach {_address()} ({_first_line(error)}): is the first machine's job "
            "started, and its port open?"
        ) from None


def _shake_hands(tcp: Any, there: World, deadline: float) -> tuple[str, list[_Process], int]:
    """A name that only these very processes know, who they are, and which attempt it is.

    torchrun's store outlives an attempt, so that what lies in it may be of processes that are dead. Each process says
    hello under a word of its own; the first one names the group of those that it found, again when one is new, until
    each has seen itself in it.
    """
    store = _below(_PREFIX, tcp)
    me = _Process(there.rank, there.node, socket.gethostname(), os.getpid(), uuid.uuid4().hex)
    mine = json.dumps(asdict(me))
    store.set(f"hello {there.rank}", mine)
    attempt = int(store.add("attempts", 1)) - 1 if there.rank == 0 else 0
    found: list[str] = []
    name, acknowledged = "", ""
    while True:
        came = [rank for rank in range(there.size) if store.check([f"hello {rank}"])]
        if there.rank == 0 and len(came) == there.size:
            hellos = [bytes(hello).decode() for hello in store.multi_get([f"hello {rank}" for rank in came])]
            if hellos != found:
                found, name = hellos, uuid.uuid4().hex[:12]
                store.set("group", json.dumps({"name": name, "hellos": found, "attempt": attempt}))
            if store.add(f"seen {name}", 0) == there.size - 1:
                store.set(f"go {name}", "")
                break
        elif there.rank and store.check(["group"]):
            group = json.loads(store.get("group"))
            if group["hellos"][there.rank : there.rank + 1] == [mine] and group["name"] != acknowledged:
                found, acknowledged, attempt = group["hellos"], group["name"], group["attempt"]
                store.add(f"seen {acknowledged}", 1)
            if acknowledged and store.check([f"go {acknowledged}"]):
                name = acknowledged
                break
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(there.size) if rank not in came)
            raise StocktakeError(
                f"{len(came)} of {there.size} processes came to {_address()} in time"
                f"{f'; rank {missing} did not' * bool(missing)}: start them all, or wait longer with "
                "--training.collective_timeout"
            )
        time.sleep(0.02)
    return name, [_Process(**json.loads(hello)) for hello in found], attempt


def _choose_interface(there: World) -> None:
    """Name the network interface by which the processes talk, unless the user has.

    gloo asks for the machine's own name, which is often 127.0.1.1, or a network that the other machines do not see.
    """
    import psutil

    local = "127.0.0.1"
    if there.nodes > 1:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing: asks for the way
            local = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if local in [address.address for address in addresses]:
            if there.nodes == 1:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            elif not local.startswith("127."):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether this is how a collective says that another process is gone. gloo has no class for it."""
    from torch.distributed import DistError

    text = str(error)
    words = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Broken pipe", "Timed out waiting")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _told_to_torchrun() -> Iterator[None]:
    """torchrun shows the error that it finds in TORCHELASTIC_ERROR_FILE."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            with suppress(OSError):
                get_error_handler().record_exception(error)
        raise
