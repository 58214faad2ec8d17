"""The cache of arrays: whole or not at all, in any process, and never wrong values from a damaged file."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sqlite3
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stocktake.data.array_cache import ArrayCache
from stocktake.data.sqlite_file import DamagedFileError
from stocktake.errors import StocktakeError

SHAPE = (4, 5)
FORK = multiprocessing.get_context("fork")


def filled(value: int) -> npt.NDArray[np.uint8]:
    return np.full(SHAPE, value, dtype=np.uint8)


@pytest.fixture
def cache(tmp_path: Path) -> ArrayCache:
    return ArrayCache(tmp_path / "cache" / "arrays.sqlite", SHAPE, "uint8")


@given(st.dictionaries(st.text("0123456789abcdef", min_size=1, max_size=32), arrays(np.float32, SHAPE), max_size=5))
@settings(max_examples=10)
def test_what_is_stored_is_read_again(tmp_path_factory: pytest.TempPathFactory, stored: dict[str, npt.NDArray]) -> None:
    cache = ArrayCache(tmp_path_factory.mktemp("cache") / "arrays.sqlite", SHAPE, "float32")
    cache.add(stored)
    assert len(cache) == len(stored)
    read = cache.read(list(stored))
    assert read.shape == (len(stored), *SHAPE)
    for row, (key, array) in zip(read, stored.items(), strict=True):
        assert row.tobytes() == cache[key].tobytes() == array.tobytes()


def test_missing_keys_are_listed_once_and_in_order(cache: ArrayCache) -> None:
    cache.add({"b": filled(1)})
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]
    with pytest.raises(KeyError, match="a"):
        cache.read(["b", "a"])


def test_an_array_of_another_form_is_refused_and_nothing_is_stored(cache: ArrayCache) -> None:
    for wrong in (np.zeros((5, 4), dtype=np.uint8), np.zeros(SHAPE, dtype=np.int8)):
        with pytest.raises(ValueError, match="b is"):
            cache.add({"a": filled(1), "b": wrong})
    assert len(cache) == 0


def test_a_view_is_stored_by_its_values_and_read_as_a_copy(cache: ArrayCache) -> None:
    transposed = np.arange(20, dtype=np.uint8).reshape(5, 4).T
    cache.add({"a": transposed})
    cache["a"][:] = 0
    cache.read(["a"])[:] = 0
    assert (cache["a"] == transposed).all()


# Processes ------------------------------------------------------------------------------------------------------------


def add_many(cache: ArrayCache, numbers: range) -> None:
    for number in numbers:
        cache.add({str(number): filled(number)})


def test_two_processes_write_at_once(cache: ArrayCache) -> None:
    writers = [FORK.Process(target=add_many, args=(cache, range(start, 30, 2))) for start in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (cache.read([str(n) for n in range(30)])[:, 0, 0] == np.arange(30)).all()


def write_until_killed(cache: ArrayCache, started: Event) -> None:
    for number in range(10**9):
        cache.add({f"{number}-{part}": filled(number % 256) for part in range(50)})
        started.set()


def test_a_killed_writer_leaves_whole_additions_and_a_usable_cache(cache: ArrayCache) -> None:
    started = FORK.Event()
    writer = FORK.Process(target=write_until_killed, args=(cache, started))
    writer.start()
    assert started.wait(60)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join(60)
    assert len(cache) >= 50
    assert len(cache) % 50 == 0
    cache.add({"after": filled(9)})
    assert (cache["after"] == 9).all()
    assert (cache["0-49"] == 0).all()


def fill_the_disk(cache: ArrayCache, answer: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))  # what a full disk is to a writer
    try:
        for number in range(100_000):
            cache.add({f"{number}-{part}": filled(1) for part in range(500)})
    except StocktakeError as error:
        answer.send(str(error))


def test_a_full_disk_is_one_error_and_spoils_nothing(cache: ArrayCache) -> None:
    cache.add({"before": filled(5)})
    receiver, sender = FORK.Pipe()
    writer = FORK.Process(target=fill_the_disk, args=(cache, sender))
    writer.start()
    writer.join(60)
    assert receiver.poll()
    assert f"{cache.path} cannot be written" in receiver.recv()
    assert (cache["before"] == 5).all()
    assert (cache["0-0"] == 1).all()


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "zeroed", "another table"])
def test_a_damaged_file_is_begun_anew(cache: ArrayCache, damage: str) -> None:
    cache.add({str(number): filled(number) for number in range(200)})
    whole = cache.path.read_bytes()
    contents = {
        "garbage": b"no cache at all" * 1000,
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "zeroed": whole[:100] + bytes(len(whole) - 100),
        "another table": b"",
    }
    cache.path.write_bytes(contents[damage])
    if damage == "another table":
        with closing(sqlite3.connect(cache.path)) as connection, connection:
            connection.execute("CREATE TABLE arrays (something TEXT)")
    if damage != "empty":
        with pytest.raises(DamagedFileError, match=str(cache.path)):
            cache.read(["0", "199"])
    assert cache.missing(["0", "199"]) == ["0", "199"]
    cache.add({"0": filled(3)})
    assert (cache["0"] == 3).all()


def test_a_file_that_is_cut_while_it_is_read_is_one_error(tmp_path: Path) -> None:
    """In this very process: were the file mapped into memory, the kernel would end it here with SIGBUS."""
    cache = ArrayCache(tmp_path / "arrays.sqlite", (100_000,), "uint8")
    cache.add({str(number): np.full(100_000, number, dtype=np.uint8) for number in range(100)})
    assert cache["0"][0] == 0
    os.truncate(cache.path, cache.path.stat().st_size // 2)
    with pytest.raises(DamagedFileError, match=f"{cache.path} is damaged"):
        cache.read([str(number) for number in range(100)])


@pytest.mark.parametrize("offset", [0, 50_000, 99_999])
def test_damaged_values_are_never_given_out(tmp_path: Path, offset: int) -> None:
    cache = ArrayCache(tmp_path / "arrays.sqlite", (100_000,), "uint8")
    values = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    cache.add({"a": values, "b": 255 - values})
    content = bytearray(cache.path.read_bytes())
    around = values[max(0, offset - 20) : offset + 20].tobytes()
    position = content.find(around)
    assert position >= 0
    content[position + min(offset, 20)] ^= 1
    cache.path.write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match="array a"):
        cache.read(["b", "a"])
    assert (cache["b"] == 255 - values).all()
