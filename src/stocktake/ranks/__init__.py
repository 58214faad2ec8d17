"""The processes of a distributed job: who this one is, how they join, agree, wait for each other and fail together.

    with joined(timeout=300) as world:      # torchrun has started world.size processes of this program
        with local_rank_zero_first():               # once a machine, however long it takes
            prepare()
        folder = run_on_rank_zero(open_run)       # done by rank 0, known to all
        parts = gather(part)

Rank is asked here and nowhere else. A process that nobody joined is alone and the first: all of this is then nothing,
and torch is not imported.

The processes talk in two ways: by torch's collectives, which break when one of them is gone, and through a store of
keys (of torchrun, or of rank 0), by which they say why they leave, and wait for each other longer than a collective
does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from stocktake.errors import StocktakeError
from stocktake.ranks.group import Group
from stocktake.ranks.world import (
    LAUNCHER,
    JobFailedError,
    RankFailedError,
    World,
    choose_backend,
    error_recorded,
    job,
    job_of,
    world_from_env,
)

__all__ = [
    "LAUNCHER",
    "JobFailedError",
    "RankFailedError",
    "World",
    "broadcast",
    "choose_backend",
    "error_recorded",
    "gather",
    "is_gone",
    "is_rank_zero",
    "job",
    "job_of",
    "joined",
    "local_rank_zero_first",
    "run_on_rank_zero",
    "with_root_cause",
    "world",
    "world_from_env",
]

T = TypeVar("T")

_group: Group | None = None
"""The one that this process has joined."""
_world = World()


def world() -> World:
    """The world that this process has joined."""
    return _world


def is_rank_zero() -> bool:
    """Whether this is the process that prints, logs and writes; a process alone is."""
    return world().rank == 0


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
        there = world_from_env()
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
        _group = Group(there, timeout)
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
def with_root_cause() -> Iterator[None]:
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
def local_rank_zero_first() -> Iterator[None]:
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


def run_on_rank_zero(compute: Callable[[], T]) -> T:
    """What `compute` gives on the first process, for all; the others wait for it as long as it takes."""
    if _group is None:
        return compute()
    value = compute() if is_rank_zero() else None
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


def is_gone(rank: int) -> bool:
    """Whether the process of that rank is dead; False where it is on another machine, or there is none."""
    return _group is not None and _group.is_gone(rank)


def _raise_explained(group: Group, error: BaseException) -> None:
    cause = group.explain(error)
    if cause is error:
        raise error
    raise cause from error


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
