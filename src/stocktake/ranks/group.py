"""What a process knows of the job that it has joined: who is alive, who failed, and when to end."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from stocktake.errors import StocktakeError
from stocktake.ranks.meeting import (
    PREFIX,
    address,
    below,
    choose_interface,
    connect,
    first_line,
    is_torchruns_store,
    shake_hands,
)
from stocktake.ranks.world import RankFailedError, World, choose_backend

T = TypeVar("T")

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 6.0
"""How long a process that lost the others looks for the reason."""
_DEAF_SECONDS = 10.0
"""A process that was told to end, and does not hear it, ends itself after this long."""


class Group:
    """What a process knows of the job that it has joined."""

    def __init__(self, there: World, timeout: float) -> None:
        self._timeout = timeout
        self.world = replace(there, backend=choose_backend(there.local_size))
        self._tcp = connect(there, timeout)
        self.name, self._processes, attempt = shake_hands(self._tcp, there, time.monotonic() + timeout)
        self.world = replace(self.world, attempt=max(there.attempt, attempt))
        self._store = below(f"{PREFIX}/{self.name}", self._tcp.clone())
        self._meetings = itertools.count()
        self._is_ending = False
        self._explained: BaseException | None = None
        self._pulse = Pulse(below(f"{PREFIX}/{self.name}", self._tcp.clone()), there.rank)
        self._start_collectives()

    def _start_collectives(self) -> None:
        import torch
        import torch.distributed as dist

        if self.world.backend == "nccl":
            torch.cuda.set_device(self.world.local_rank)
        self._chosen = choose_interface(self.world)
        try:
            dist.init_process_group(
                self.world.backend,
                # keys of its own: torch finds the addresses of an earlier attempt in torchrun's store otherwise
                store=below(f"{PREFIX}/{self.name}/torch", self._tcp),
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=timedelta(seconds=self._timeout),
            )
        except (RuntimeError, ValueError) as error:
            variable = "NCCL_SOCKET_IFNAME" if self.world.backend == "nccl" else "GLOO_SOCKET_IFNAME"
            raise StocktakeError(
                f"the {self.world.size} processes meet at {address()}, but {self.world.backend} does not get from one "
                f"to another ({first_line(error)}): set {variable} to the interface between the machines"
            ) from error

    # Waiting

    def meet(self) -> None:
        """Wait until all processes have come here, as long as they are alive.

        Raises:
            RankFailedError: one failed, or was silent for longer than the timeout.
        """
        turn = next(self._meetings)
        keys = [f"meeting {turn} {rank}" for rank in range(self.world.size)]
        beats, heard = [b""] * len(keys), [time.monotonic()] * len(keys)
        seconds = 0.002
        self._say(keys[self.world.rank], "")
        while True:
            # a store beyond a dead network does not answer: waiting for it in this thread would be for good
            awaited = self._ask(lambda: self._awaited(keys), self._timeout)
            if awaited is None:
                raise _StoreLostError
            if not awaited:
                return
            now = time.monotonic()
            for rank, beat in awaited.items():
                if beat != beats[rank]:
                    beats[rank], heard[rank] = beat, now
                if self.is_gone(rank) and rank in (self._ask(lambda: self._awaited(keys)) or {}):
                    raise RankFailedError(self._tell_failure(self._lost(rank)))
                if now - heard[rank] > self._timeout:
                    raise RankFailedError(self._tell_failure(self._silent(rank, self._timeout)))
            failure = self._ask(self._failure)
            if failure:
                raise RankFailedError(failure)
            time.sleep(seconds)
            seconds = min(_LOOK_SECONDS, 1.5 * seconds)

    def _awaited(self, keys: list[str]) -> dict[int, bytes]:
        """The processes whose keys are missing, with their latest beats."""
        if self._store.check(keys):
            return {}
        missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        return dict(zip(missing, self._beats(missing), strict=True))

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
                error = RankFailedError(f"the connection between the processes broke: {first_line(error)}")
        else:
            text = str(error) if isinstance(error, StocktakeError) else f"{type(error).__name__}: {first_line(error)}"
            self._tell_failure(f"{self._names(self.world.rank)} failed: {text}")
        self._explained = error
        return error

    def _cause(self, seconds: float, was_told: bool) -> BaseException | None:
        """Why the others are gone; None where they are not."""
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        before, began = self._ask(lambda: self._beats(others)), time.monotonic()
        while True:
            gone = [rank for rank in others if self.is_gone(rank)]  # before its last word is looked for
            failure = self._ask(self._failure)
            if failure:
                return RankFailedError(failure)
            ended = self._ask(lambda: [rank for rank in others if self._store.check([f"ended {rank}"])]) or []
            lost = [rank for rank in gone if rank not in ended]
            if lost and (before is not None or not was_told):
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
            return RankFailedError(f"{address()}, where the processes meet, is out of reach: machine or network gone")
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
        """What came first; empty as long as nothing has failed."""
        return bytes(self._store.get("failed")).decode() if self._store.check(["failed"]) else ""

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

        for variable in self._chosen:  # the next job of this process may be on other machines
            os.environ.pop(variable, None)
        if self._explained is None and not self._is_ending:
            dist.destroy_process_group()
            if not is_torchruns_store():  # the first process holds the store: it goes last
                self._ask(lambda: self._store.add("left", 1))
                deadline = time.monotonic() + 5
                while self.world.rank == 0 and time.monotonic() < deadline:
                    if self._ask(lambda: self._store.add("left", 0)) == self.world.size:
                        break
                    time.sleep(0.02)
        elif self.world.backend == "gloo":  # nccl would wait for those who are gone
            with suppress(Exception):
                dist.destroy_process_group()
        self._pulse.stop()


class Pulse(threading.Thread):
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
        self._ear, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
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
        for end in (self._ear, self.wakeup):
            os.close(end)


class _StoreLostError(Exception):
    """The store of keys does not answer."""


def _is_broken_connection(error: BaseException) -> bool:
    """Whether this is how a collective says that another process is gone. gloo has no class for it."""
    from torch.distributed import DistError

    text = str(error)
    words = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Broken pipe", "Timed out waiting")
    return isinstance(error, DistError | _StoreLostError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )
