"""The store of arrays: whole or not at all, in any process, past any size."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stocktake.data import array_cache
from stocktake.data.array_cache import ArrayCache
from stocktake.errors import StocktakeError

SHAPE = (4, 5)
SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")


def filled(value: int) -> npt.NDArray[np.uint8]:
    return np.full(SHAPE, value, dtype=np.uint8)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ArrayCache]:
    yield ArrayCache(tmp_path / "store", SHAPE, "uint8")
    array_cache._close_all()


@given(st.dictionaries(st.text("0123456789abcdef", min_size=1, max_size=32), arrays(np.float32, SHAPE), max_size=5))
@settings(max_examples=25)
def test_what_is_stored_is_read_again(tmp_path_factory: pytest.TempPathFactory, stored: dict[str, npt.NDArray]) -> None:
    cache = ArrayCache(tmp_path_factory.mktemp("store"), SHAPE, "float32")
    cache.add(stored)
    assert len(cache) == len(stored)
    read = cache.read(list(stored))
    assert read.shape == (len(stored), *SHAPE)
    for row, (key, array) in zip(read, stored.items(), strict=True):
        assert row.tobytes() == cache[key].tobytes() == array.tobytes()
    array_cache._close_all()


def test_missing_keys_are_told_once_and_in_order(cache: ArrayCache) -> None:
    cache.add({"b": filled(1)})
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]
    with pytest.raises(KeyError, match="a"):
        cache["a"]
    with pytest.raises(KeyError, match="a"):
        cache.read(["b", "a"])


def test_an_array_of_another_form_is_refused_and_nothing_is_stored(cache: ArrayCache) -> None:
    for wrong in (np.zeros((5, 4), dtype=np.uint8), np.zeros(SHAPE, dtype=np.int8)):
        with pytest.raises(ValueError, match="b is"):
            cache.add({"a": filled(1), "b": wrong})
    assert len(cache) == 0


def test_an_array_that_is_a_view_is_stored_by_its_values(cache: ArrayCache) -> None:
    turned = np.arange(20, dtype=np.uint8).reshape(5, 4).T
    cache.add({"a": turned})
    assert (cache["a"] == turned).all()


def test_what_was_read_can_be_changed_without_changing_the_store(cache: ArrayCache) -> None:
    cache.add({"a": filled(7)})
    cache["a"][:] = 0
    cache.read(["a"])[:] = 0
    assert (cache["a"] == 7).all()


def test_a_store_grows_past_its_first_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "_FIRST_MAP", 2**16)
    cache = ArrayCache(tmp_path / "store", (1000,), "uint8")
    for start in range(0, 400, 100):
        cache.add({str(n): np.full(1000, n % 256, dtype=np.uint8) for n in range(start, start + 100)})
    array_cache._close_all()  # and is found whole when opened again
    assert len(cache) == 400
    assert (cache.read([str(n) for n in range(400)])[:, 0] == np.arange(400) % 256).all()


def add_many(cache: ArrayCache, first_map: int, numbers: range) -> None:
    array_cache._FIRST_MAP = first_map
    for number in numbers:
        cache.add({str(number): np.full(cache.shape, number % 256, dtype=np.uint8)})


def test_two_processes_write_at_once_and_the_store_grows_under_both(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "store", (2000,), "uint8")
    writers = [SPAWN.Process(target=add_many, args=(cache, 2**15, range(i, 300, 2))) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (cache.read([str(n) for n in range(300)])[:, 0] == np.arange(300) % 256).all()


def test_a_store_that_another_process_let_grow_is_read_and_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_cache, "_FIRST_MAP", 2**15)
    cache = ArrayCache(tmp_path / "store", (2000,), "uint8")
    add_many(cache, 2**15, range(1))
    writer = SPAWN.Process(target=add_many, args=(cache, 2**15, range(1, 100)))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert (cache.read([str(n) for n in range(100)])[:, 0] == np.arange(100)).all()
    add_many(cache, 2**15, range(100, 200))
    assert len(cache) == 200
    array_cache._close_all()


def check_and_add(cache: ArrayCache) -> None:
    assert (cache["parent"] == 1).all()
    cache.add({"child": filled(2)})


@pytest.mark.parametrize("context", [FORK, SPAWN], ids=["fork", "spawn"])
def test_a_store_in_use_is_usable_in_a_child_and_after_it(
    context: multiprocessing.context.BaseContext, cache: ArrayCache
) -> None:
    cache.add({"parent": filled(1)})
    child = context.Process(target=check_and_add, args=(cache,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert (cache["parent"] == 1).all()
    assert (cache["child"] == 2).all()


def write_until_killed(cache: ArrayCache, started: Event) -> None:
    for number in range(10**9):
        cache.add({f"{number}-{part}": filled(number % 256) for part in range(50)})
        started.set()


def test_a_killed_writer_leaves_whole_additions_and_a_usable_store(cache: ArrayCache) -> None:
    started = SPAWN.Event()
    writer = SPAWN.Process(target=write_until_killed, args=(cache, started))
    writer.start()
    assert started.wait(60)
    time.sleep(0.05)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join(60)
    assert len(cache) >= 50
    assert len(cache) % 50 == 0
    cache.add({"after": filled(9)})
    assert (cache["after"] == 9).all()
    assert (cache["0-49"] == 0).all()


def test_threads_may_be_the_first_to_open_a_store(cache: ArrayCache) -> None:
    cache.add({"a": filled(3)})
    for _ in range(20):
        array_cache._close_all()
        together = threading.Barrier(8)

        def first(_: int, together: threading.Barrier = together) -> bool:
            together.wait()
            return bool((cache["a"] == 3).all())

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(first, range(8)))


def fill_the_disk(cache: ArrayCache, said: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))  # what a full disk is to a writer
    try:
        for number in range(100_000):
            cache.add({str(number): filled(1)})
    except StocktakeError as error:
        said.send(str(error))


def test_a_full_disk_ends_in_words_and_spoils_nothing(cache: ArrayCache) -> None:
    cache.add({"before": filled(5)})
    here, there = SPAWN.Pipe()
    writer = SPAWN.Process(target=fill_the_disk, args=(cache, there))
    writer.start()
    writer.join(60)
    assert here.poll()
    assert f"{cache.folder} cannot be written" in here.recv()
    assert (cache["before"] == 5).all()
    assert (cache["0"] == 1).all()


def test_a_damaged_store_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(b"no store at all" * 1000)
    with pytest.raises(StocktakeError, match=f"{tmp_path}/store .*delete"):
        ArrayCache(tmp_path / "store", SHAPE, "uint8").missing(["a"])
