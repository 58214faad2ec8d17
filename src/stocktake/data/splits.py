"""Train, val and test: which bins belong together, and where they go. Decided here and nowhere else.

A bin that has a split keeps it, and its group inherits it; a new group is drawn by a hash. So no bin that was in train
is ever in test, however a root grows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    import pandas as pd

    from stocktake.config.data import SplitConfig

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Conflicts:
    """Groups that join bins of different splits, as a new snapshot may link two groups: they go to train whole."""

    groups: int = 0
    bins: int = 0
    """Bins of these groups that left val or test."""

    def __str__(self) -> str:
        return (
            f"{self.groups} groups join bins of different splits and are in train now: {self.bins} of their bins left "
            "val or test"
        )


def group_bins(bins: pd.DataFrame, config: SplitConfig) -> pd.DataFrame:
    """The bins (id, items, phash; sorted by id) with the column `group`: the first id of the snapshots of one bin."""
    from stocktake.data.near_duplicates import group_duplicates

    hashes = np.array([int(text, 16) for text in bins["phash"]], dtype=np.uint64)
    groups = group_duplicates(
        bins["id"].tolist(),
        bins["items"].tolist(),
        hashes,
        distance=config.near_duplicate_distance,
        common_item=config.common_item,
    )
    return bins.assign(group=groups)


def assign_splits(
    bins: pd.DataFrame, config: SplitConfig, remembered: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, Conflicts]:
    """The bins with the column `split`.

    Args:
        bins: every usable bin, of any quantity: id, group.
        config: how they are divided.
        remembered: id and split of the bins that have one, whether they are among `bins` or not.
    """
    keys = bins["group"] if config.by == "group" else bins["id"].rename("group")
    split_of = {} if remembered is None else dict(zip(remembered["id"], remembered["split"], strict=True))
    before = bins["id"].map(split_of)
    inherited = before.groupby(keys.to_numpy()).agg(["nunique", "first"])
    in_conflict = inherited["nunique"] > 1
    key_split = inherited["first"].mask(in_conflict, "train").to_dict()
    for key in inherited.index[inherited["nunique"] == 0]:
        key_split[key] = assign_split(key, config.fractions, config.seed)
    left = keys.isin(inherited.index[in_conflict]) & before.isin(["val", "test"])
    return bins.assign(split=keys.map(key_split)), Conflicts(int(in_conflict.sum()), int(left.sum()))


def assign_split(key: str, fractions: Sequence[float], seed: int) -> Split:
    """The split of a group (or of an id): its hash, seen as a number in [0, 1), falls into one of three shares."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    shares = [(split, share) for split, share in zip(SPLITS, fractions, strict=True) if share > 0]
    end = 0.0
    for split, share in shares:
        end += share
        if position < end:
            return split
    return shares[-1][0]  # shares sum to a little less than 1 in floating point


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises StocktakeError unless there are three shares, none below 0, that sum to 1."""
    if not (len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) < 1e-6):  # nan neither
        raise StocktakeError(
            f"--split.fractions {list(fractions)} must be three shares from 0 up that sum to 1, such as [0.8,0.1,0.1]"
        )


def published_config(config: SplitConfig, published: SplitConfig, root: str) -> SplitConfig:
    """The settings by which a published set was split.

    Raises:
        StocktakeError: a setting of `config` is neither the set's nor the default.
    """
    default = type(config)()
    settings = [(name, getattr(config, name), getattr(published, name)) for name in vars(published)]
    differing = [
        f"--split.{name} {value} (the set has {of_set})"
        for name, value, of_set in settings
        if value not in (of_set, getattr(default, name))
    ]
    if differing:
        raise StocktakeError(
            f"{root} is a published set, split when it was published; leave out {', '.join(differing)}"
        )
    return dataclasses.replace(published, like=None)
