"""Arrays of one shape by content hash, on disk: prepared photos, backbone features.

LMDB holds them: memory-mapped, so that processes share one copy; safe to kill at any moment; one writer at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from stocktake.errors import StocktakeError

_FIRST_MAP = 64 * 2**20


class ArrayCache:
    """A store of arrays that all have one shape and one type. Can be handed to other processes."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Open or create.

        Args:
            folder: where the store lies; on a local disk (LMDB's locks do not work on network drives).
            shape: of every array.
            dtype: of every array.
        """
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._size = int(np.prod(shape)) * self.dtype.itemsize

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not stored, each once, in the order given."""
        with self._begin() as reading:
            return [key for key in dict.fromkeys(keys) if len(reading.get(key.encode()) or b"") != self._size]

    def add(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Store arrays, all of them or (killed on the way) none.

        Raises:
            StocktakeError: the disk is full.
        """
        for key, array in arrays.items():
            if array.shape != self.shape or array.dtype != self.dtype:
                raise ValueError(f"{key} is {array.dtype}{array.shape}, not {self.dtype}{self.shape}")
        while True:
            try:
                with self._begin(write=True) as writing:
                    for key, array in arrays.items():
                        writing.put(key.encode(), np.ascontiguousarray(array).data)
            except lmdb.MapFullError:
                environment = self._environment()
                environment.set_mapsize(2 * environment.info()["map_size"])
            except lmdb.Error as error:
                raise StocktakeError(f"{self.folder} cannot be written: {error}") from None
            else:
                return

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        """A copy of one array, (*shape); KeyError when it is not stored."""
        with self._begin() as reading:
            stored = reading.get(key.encode())
            if stored is None:
                raise KeyError(key)
            return np.frombuffer(stored, dtype=self.dtype).reshape(self.shape).copy()

    def read(self, keys: Sequence[str]) -> npt.NDArray[Any]:
        """(n, *shape) in the order of the keys; KeyError when one is not stored."""
        found = np.empty((len(keys), *self.shape), dtype=self.dtype)
        with self._begin() as reading:
            for row, key in enumerate(keys):
                stored = reading.get(key.encode())
                if stored is None:
                    raise KeyError(key)
                found[row] = np.frombuffer(stored, dtype=self.dtype).reshape(self.shape)
        return found

    def __len__(self) -> int:
        """How many arrays are stored."""
        with self._begin() as reading:
            return int(reading.stat()["entries"])

    def _begin(self, write: bool = False) -> lmdb.Transaction:
        try:
            return self._environment().begin(write=write, buffers=True)
        except lmdb.MapResizedError:  # another process let the store grow
            self._environment().set_mapsize(0)
            return self._environment().begin(write=write, buffers=True)

    def _environment(self) -> lmdb.Environment:
        folder = str(self.folder.resolve())
        with _opening:
            if folder not in _opened:
                _opened[folder] = _open(Path(folder))
            return _opened[folder]


def _open(folder: Path) -> lmdb.Environment:
    data = folder / "data.mdb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size = max(_FIRST_MAP, 2 * data.stat().st_size if data.exists() else 0)
        return lmdb.open(str(folder), map_size=size, readahead=False)
    except OSError as error:
        raise StocktakeError(f"{folder} cannot be written: {error.strerror}") from None
    except lmdb.Error as error:
        raise StocktakeError(f"{folder} cannot be used ({error}): delete it, it will be filled anew") from None


_opened: dict[str, lmdb.Environment] = {}
"""LMDB wants a store opened once in a process."""
_opening = threading.Lock()


def _close_all() -> None:
    while _opened:
        _opened.popitem()[1].close()


def _before_fork() -> None:
    _opening.acquire()
    _close_all()


if hasattr(os, "register_at_fork"):  # and never carried across a fork: both sides open it again
    os.register_at_fork(before=_before_fork, after_in_parent=_opening.release, after_in_child=_opening.release)
