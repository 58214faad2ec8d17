"""Processes that have joined one group and do together what a test asks: started once, shared by many tests."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import pytest


def free_port() -> int:
    """One of this machine's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ProcessGroup:
    """`size` processes over gloo, each with one thread."""

    def __init__(self, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = spawn.Pipe()
            self._pipes.append(here)
            self._processes.append(spawn.Process(target=_serve, args=(rank, size, port, there), daemon=True))
            self._processes[-1].start()
            there.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(*arguments) in every process, at once; what they return, by rank.

        An argument that is a `ByRank` is another one for each. An exception of theirs is raised here.
        """
        place = (function.__module__, inspect.getfile(function), function.__name__)
        for rank, pipe in enumerate(self._pipes):
            pipe.send((*place, [one.values[rank] if isinstance(one, ByRank) else one for one in arguments]))
        ended = [pipe.recv() if pipe.poll(120) else (TimeoutError(f"rank {rank}"), "") for rank, pipe in self.each()]
        for value, trace in ended:
            if trace is not None:
                print(trace)
                raise value
        return [value for value, _ in ended]

    def each(self) -> list[tuple[int, Connection]]:
        return list(enumerate(self._pipes))

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


class ByRank:
    """An argument that differs by rank."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    here = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    from stocktake import distributed

    torch.set_num_threads(1)
    with distributed.process_group(timeout=60):
        while True:
            try:
                module, file, function, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((getattr(_module(module, file), function)(*arguments), None))
            except Exception as error:
                pipe.send((error, traceback.format_exc()))


def _module(name: str, file: str) -> ModuleType:
    """A test's module as pytest imports it, which no other process could find by its name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def pair() -> Iterator[ProcessGroup]:
    """Two processes of one group."""
    group = ProcessGroup(2)
    yield group
    group.end()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of a group: sums over threads are other sums."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
