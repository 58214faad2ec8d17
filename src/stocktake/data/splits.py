"""Train, val and test: which bins belong together, and where they go. Decided here and nowhere else.

Decided by a hash, so that bins hardly move when others are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    import pandas as pd

    from stocktake.config.data import SplitConfig

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def decide_splits(bins: pd.DataFrame, config: SplitConfig, published: pd.DataFrame | None) -> pd.DataFrame:
    """The bins with the columns `group` and `split`.

    Args:
        bins: every usable bin, of any quantity, sorted by id: id, items, phash.
        config: how they are grouped and divided.
        published: id, group and split as the publisher of the bins decided them; these hold, whatever the config says.
    """
    if published is not None:
        return bins.merge(published[["id", "group", "split"]], on="id", how="left", validate="one_to_one")
    from stocktake.data.near_duplicates import group_duplicates

    hashes = np.array([int(text, 16) for text in bins["phash"]], dtype=np.uint64)
    groups = group_duplicates(
        bins["id"].tolist(),
        bins["items"].tolist(),
        hashes,
        distance=config.near_duplicate_distance,
        common_item=config.common_item,
    )
    bins = bins.assign(group=groups)
    keys = bins["group"] if config.by == "group" else bins["id"]
    split_of = {key: assign_split(key, config.fractions, config.seed) for key in keys.unique()}
    return bins.assign(split=keys.map(split_of))


def assign_split(key: str, fractions: Sequence[float], seed: int) -> Split:
    """The split of a group (or of an id): its hash, seen as a number in [0, 1), falls into one of three shares."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < fractions[0]:
        return "train"
    return "val" if position < fractions[0] + fractions[1] else "test"


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises StocktakeError unless there are three positive shares that sum to 1."""
    if not (len(fractions) == 3 and min(fractions) > 0 and abs(sum(fractions) - 1) < 1e-6):  # nan neither
        raise StocktakeError(
            f"--split.fractions {list(fractions)} must be three positive shares that sum to 1, such as [0.8,0.1,0.1]"
        )
