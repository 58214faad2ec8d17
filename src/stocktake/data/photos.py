"""The photos of a manifest, decoded and resized once, on disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from stocktake.data.array_cache import ArrayCache
from stocktake.data.images import PREPROCESSING_VERSION, decode, photo_key, resize_to_square
from stocktake.data.sources import Source
from stocktake.errors import StocktakeError

_THREADS = 4
_CHUNK = 256


def photo_cache(workspace: Path, size: int) -> ArrayCache:
    """The cache of photos as (size, size, 3) uint8 by their content hash, of this version of the preprocessing."""
    path = workspace / "cache" / f"photos-{size}px-v{PREPROCESSING_VERSION}.sqlite"
    return ArrayCache(path, (size, size, 3), "uint8")


def prepare_photos(source: Source, bins: pd.DataFrame, size: int, workspace: Path) -> ArrayCache:
    """A cache that holds every photo of `bins`; those that the manifest's checks did not store are decoded now.

    When several processes need the same photos, one prepares them and the others wait.

    Raises:
        StocktakeError: a photo changed after the manifest was built, or the cache cannot be written.
    """
    cache = photo_cache(workspace, size)
    if cache.missing(bins["hash"]):
        with cache.fill_lock():
            _fill(cache, source, bins, size)
    return cache


def _fill(cache: ArrayCache, source: Source, bins: pd.DataFrame, size: int) -> None:
    missing = set(cache.missing(bins["hash"]))
    rows = bins[bins["hash"].isin(missing)].drop_duplicates("hash")

    def load(bin_id: str, expected_hash: str) -> tuple[str, npt.NDArray[Any]]:
        try:
            data = source.photo(bin_id)
        except OSError as error:
            raise StocktakeError(f"photo {bin_id} of {source.root} cannot be read: {error.strerror}") from None
        if photo_key(data) != expected_hash:
            raise StocktakeError(f"photo {bin_id} of {source.root} changed while it was read: start again")
        return expected_hash, resize_to_square(decode(data), size)

    title = f"preparing photos at {size} px"
    with tqdm(total=len(rows), desc=title, disable=None) as bar, ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows.iloc[start : start + _CHUNK]
            arrays = dict(threads.map(load, chunk["id"], chunk["hash"]))
            cache.add(arrays)
            bar.update(len(arrays))
