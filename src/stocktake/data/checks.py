"""Checks of photos and records, remembered as they are made: a second run reads only what changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from stocktake.data.array_cache import ArrayCache
from stocktake.data.images import PhotoError, decode_validated, photo_key, resize_to_square
from stocktake.data.record import RecordError, parse_record
from stocktake.data.sources import Source
from stocktake.data.sqlite_file import rows_or_new, transaction

CHECKS_VERSION = 2
"""Raised when the checks below change, so that remembered ones are not trusted."""
_THREADS = 4
_CHUNK = 256
"""Bins whose checks are saved at once: the most that a killed process does again."""


class _Check(NamedTuple):
    """A row of the table; `items` and `flags` are JSON lists."""

    id: str
    change_key: str
    quantity: int | None = None
    width: int = 0
    height: int = 0
    bytes: int = 0
    hash: str = ""
    phash: str = ""
    items: str = "[]"
    flags: str = "[]"
    file: str = ""
    reason: str = ""


_TABLE = f"CREATE TABLE IF NOT EXISTS checks ({', '.join(_Check._fields)}, PRIMARY KEY (id))"
_INSERT = f"INSERT OR REPLACE INTO checks VALUES ({', '.join('?' * len(_Check._fields))})"  # noqa: S608 - own marks


class PhotoStore(NamedTuple):
    """Where checks store the photos that they decode, so that each is decoded once."""

    cache: ArrayCache
    quantities: Collection[int]
    """Photos of other bins are not stored."""


def check_bins(source: Source, ids: Sequence[str], folder: Path, photos: PhotoStore | None = None) -> pd.DataFrame:
    """What is known of each bin, from memory where nothing changed since.

    Args:
        source: with the photos and records.
        ids: of the bins to check.
        folder: the checks are remembered here.
        photos: where photos that are decoded for their check are stored, resized.

    Returns:
        A row a bin, sorted by id: id, quantity (missing if the record is unusable), width, height, bytes, hash, phash,
        items, flags (tuples), and file and reason, which are empty if the bin can be used.

    Raises:
        StocktakeError: the folder cannot be written.
    """
    path = folder / f"checks-v{CHECKS_VERSION}.sqlite"
    change_keys = {bin_id: source.change_key(bin_id) for bin_id in ids}
    known = dict(rows_or_new(path, _TABLE, "SELECT id, change_key FROM checks"))
    unchecked = [bin_id for bin_id, change_key in change_keys.items() if known.get(bin_id) != change_key]
    del known  # half a million entries
    if photos is not None:
        photos.cache.missing(())  # replaces a damaged file

    def check(bin_id: str) -> tuple[_Check, npt.NDArray[Any] | None]:
        return _check_bin(source, bin_id, change_keys[bin_id], photos)

    with tqdm(total=len(unchecked), desc="checking bins", disable=None) as bar, ThreadPoolExecutor(_THREADS) as threads:
        for begin in range(0, len(unchecked), _CHUNK):  # a chunk's photos in memory at a time, not the root's
            results = list(threads.map(check, unchecked[begin : begin + _CHUNK]))
            if photos is not None:
                photos.cache.add({row.hash: photo for row, photo in results if photo is not None})
            with transaction(path, _TABLE) as connection:
                connection.executemany(_INSERT, [row for row, _ in results])
            bar.update(len(results))
    return _read(path, change_keys)


def _read(path: Path, ids: Collection[str]) -> pd.DataFrame:
    with transaction(path, _TABLE) as connection:
        table = pd.read_sql("SELECT * FROM checks ORDER BY id", connection)
    table = table[table["id"].isin(ids)].drop(columns="change_key").reset_index(drop=True)
    table["quantity"] = table["quantity"].astype("Int64")
    # one object for equal names: half a million bins hold their items and flags many times over
    texts = {*table["items"], *table["flags"]}
    names = {text: tuple(map(sys.intern, json.loads(text))) for text in texts}
    return table.assign(items=table["items"].map(names), flags=table["flags"].map(names))


def _check_bin(
    source: Source, bin_id: str, change_key: str, photos: PhotoStore | None
) -> tuple[_Check, npt.NDArray[Any] | None]:
    """What is known of one bin, or why it is rejected; and its resized photo if that is to be stored."""
    import imagehash

    row = _Check(bin_id, change_key, file=f"metadata/{bin_id}.json")
    try:
        record = parse_record(source.record(bin_id))
        row = row._replace(quantity=record.quantity, items=_as_json(record.items), file=f"bin-images/{bin_id}.jpg")
        data = source.photo(bin_id)
        row = row._replace(bytes=len(data))
        photo, unusual = decode_validated(data)
    except FileNotFoundError:
        return row._replace(reason="file is missing"), None
    except (RecordError, PhotoError) as error:
        return row._replace(reason=str(error)), None
    except OSError as error:
        return row._replace(reason=f"file cannot be read: {error.strerror}"), None
    row = row._replace(
        width=photo.width,
        height=photo.height,
        hash=photo_key(data),
        phash=str(imagehash.phash(photo)),
        flags=_as_json([*record.flags, *unusual]),
        file="",
    )
    if photos is None or record.quantity not in photos.quantities:
        return row, None
    return row, resize_to_square(photo, photos.cache.shape[0])


def _as_json(names: Iterable[str]) -> str:
    return json.dumps(list(names))
