"""Arrays of one shape by content hash, on disk: prepared photos, backbone features.

An SQLite file holds them: additions are whole or not made, any number of processes read it, and nothing is mapped into
memory, so that a truncated file is an error that can be caught. Each array has a checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from stocktake.data.sqlite_file import DamagedFileError, rows_or_new, transaction

_TABLE = "CREATE TABLE IF NOT EXISTS arrays (key TEXT PRIMARY KEY, checksum INTEGER NOT NULL, data BLOB NOT NULL)"


class ArrayCache:
    """Arrays that all have one shape and one type. Can be handed to other processes."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Nothing is opened before the first use.

        Args:
            path: of the file; its name should say what made the arrays, such as the version of the preprocessing.
            shape: of every array.
            dtype: of every array.
        """
        self.path = path.absolute()
        self.shape = shape
        self.dtype = np.dtype(dtype)

    def fill_lock(self) -> FileLock:
        """The lock to hold while missing arrays are computed, so that one process computes them."""
        return FileLock(f"{self.path}.lock")

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not stored, each once, in order. A damaged file is replaced by an empty one."""
        stored = {key for (key,) in rows_or_new(self.path, _TABLE, "SELECT key FROM arrays")}
        return [key for key in dict.fromkeys(keys) if key not in stored]

    def add(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Store arrays, all of them or (killed on the way) none.

        Raises:
            StocktakeError: the file cannot be written.
            DamagedFileError: it is damaged.
        """
        for key, array in arrays.items():
            if array.shape != self.shape or array.dtype != self.dtype:
                raise ValueError(f"{key} is {array.dtype}{array.shape}, not {self.dtype}{self.shape}")
        rows = [(key, zlib.crc32(data := array.tobytes()), data) for key, array in arrays.items()]
        with transaction(self.path, _TABLE) as connection:
            connection.executemany("INSERT OR REPLACE INTO arrays VALUES (?, ?, ?)", rows)

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        """A copy of one array, (*shape); errors as `read`."""
        array: npt.NDArray[Any] = self.read([key])[0]
        return array

    def read(self, keys: Sequence[str]) -> npt.NDArray[Any]:
        """(n, *shape) in the order of the keys.

        Raises:
            KeyError: an array is not stored.
            DamagedFileError: the file or an array in it is damaged.
        """
        arrays = np.empty((len(keys), *self.shape), dtype=self.dtype)
        with transaction(self.path, _TABLE) as connection:
            for row, key in enumerate(keys):
                stored = connection.execute("SELECT checksum, data FROM arrays WHERE key = ?", (key,)).fetchone()
                if stored is None:
                    raise KeyError(key)
                checksum, data = stored
                if len(data) != arrays[row].nbytes or zlib.crc32(data) != checksum:
                    raise DamagedFileError(self.path, f"array {key} is not as it was stored")
                arrays[row] = np.frombuffer(data, dtype=self.dtype).reshape(self.shape)
        return arrays

    def __len__(self) -> int:
        """How many arrays are stored."""
        with transaction(self.path, _TABLE) as connection:
            return int(connection.execute("SELECT count(*) FROM arrays").fetchone()[0])
