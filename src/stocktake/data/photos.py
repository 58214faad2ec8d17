"""The photos of a manifest, decoded and resized once, on disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from stocktake.data.array_cache import ArrayCache
from stocktake.data.images import decode, photo_key, prepare
from stocktake.data.source import Source
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.progress import progress

_THREADS = 4
_CHUNK = 512


def prepare_photos(source: Source, bins: pd.DataFrame, size: int, workspace: Path) -> ArrayCache:
    """A cache with every photo of `bins` as (size, size, 3) uint8 by its content hash; fills what is missing.

    Of several processes that want the same photos, one prepares them and the others wait for it.

    Raises:
        StocktakeError: a photo changed after the manifest was built, or the cache cannot be written.
    """
    cache = ArrayCache(workspace / "cache" / f"photos-{size}px", (size, size, 3), "uint8")
    if cache.missing(bins["hash"]):
        with FileLock(cache.folder / "filling"):
            _fill(cache, source, bins, size)
    return cache


def _fill(cache: ArrayCache, source: Source, bins: pd.DataFrame, size: int) -> None:
    missing = set(cache.missing(bins["hash"]))
    todo = bins[bins["hash"].isin(missing)].drop_duplicates("hash")

    def load(pair: tuple[str, str]) -> tuple[str, npt.NDArray[Any]]:
        bin_id, expected = pair
        try:
            data = source.photo(bin_id)
        except OSError as error:
            raise StocktakeError(f"photo {bin_id} of {source.root} cannot be read: {error.strerror}") from None
        if photo_key(data) != expected:
            raise StocktakeError(f"photo {bin_id} of {source.root} changed while it was read: start again")
        return expected, prepare(decode(data), size)

    pairs = list(zip(todo["id"], todo["hash"], strict=True))
    with progress(f"preparing photos at {size} px", len(pairs)) as advance, ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(pairs), _CHUNK):
            chunk = dict(threads.map(load, pairs[start : start + _CHUNK]))
            cache.add(chunk)
            advance(len(chunk))
