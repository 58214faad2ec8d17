"""What a bucket holds, remembered: half a million keys are a thousand requests, and a few megabytes of parquet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from stocktake.data.s3_source import Bucket
from stocktake.data.source import ID

_PART = 50_000
"""Keys in a part, the most that a killed process lists again."""


class Listing:
    """The ids below a prefix in the bucket's order, with their sizes; listed as far as somebody reads."""

    def __init__(self, bucket: Callable[[], Bucket], place: tuple[str, str], folder: Path) -> None:
        """Read what is remembered.

        Args:
            bucket: opens the one to list, when something has to be asked.
            place: what stands before and after the id in a key.
            folder: the parts lie here, one folder a place.
        """
        self._bucket = bucket
        self._prefix, self._suffix = place
        self._folder = folder / self._prefix.strip("/")
        self._done = self._folder / "complete"

    @property
    def is_complete(self) -> bool:
        """Whether everything is remembered."""
        return self._done.exists()

    def forget(self) -> None:
        """List anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(id, bytes) of one object after the other.

        Raises:
            StocktakeError: the bucket cannot be listed.
        """
        import pyarrow.parquet as pq

        last = ""
        parts = sorted(self._folder.glob("*.parquet"))
        for part in parts:
            table = pq.read_table(part)
            last = str(table.schema.metadata[b"last"].decode())
            yield from zip(table["id"].to_pylist(), table["bytes"].to_pylist(), strict=True)
        if self.is_complete:
            return
        number = len(parts)
        rows: list[tuple[str, int]] = []
        seen = yielded = 0
        try:
            for page in self._bucket().list(self._prefix, after=last):
                for one in page:
                    last = one.key
                    seen += 1
                    name = one.key.removeprefix(self._prefix)
                    stem = name.removesuffix(self._suffix)
                    if stem != name and ID.fullmatch(stem):
                        rows.append((stem, one.size))
                while yielded < len(rows):
                    yielded += 1
                    yield rows[yielded - 1]
                if seen >= _PART:
                    self._remember(rows, number, last)
                    number += 1
                    rows, seen, yielded = [], 0, 0
            self._remember(rows, number, last)
            rows, seen = [], 0
            self._done.touch()
        finally:
            if seen:  # whoever read has enough, or the bucket stopped answering
                self._remember(rows, number, last)

    def _remember(self, rows: list[tuple[str, int]], number: int, last: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder.mkdir(parents=True, exist_ok=True)
        ids, sizes = pa.array([one for one, _ in rows], pa.string()), pa.array([size for _, size in rows], pa.int64())
        table = pa.table({"id": ids, "bytes": sizes}).replace_schema_metadata({"last": last})
        beside = self._folder / f"{number:05d}.part"
        pq.write_table(table, beside, compression="zstd")
        beside.replace(self._folder / f"{number:05d}.parquet")


def numbers(listing: Listing) -> tuple[int, int]:
    """How many objects there are, and their bytes together."""
    objects = size = 0
    for _, one in listing:
        objects += 1
        size += one
    return objects, size
