"""Which bins a model has seen: its own training bins, and other snapshots of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stocktake.config.data import SplitConfig
from stocktake.data.splits import Split

if TYPE_CHECKING:
    import pandas as pd

TRAINED: frozenset[Split] = frozenset({"train"})
CHOSEN: frozenset[Split] = frozenset({"train", "val"})
"""Splits that a model was trained on, or whose figures chose its epoch, its settings and its calibration."""
_SHOWN = 3


@dataclass(frozen=True)
class TrainingBins:
    """The bins of one training run."""

    bins: pd.DataFrame
    """id, group, split and phash, as the run recorded them."""
    root: str


def find_seen(
    bins: pd.DataFrame,
    root: str,
    training: Iterable[TrainingBins],
    splits: Collection[Split],
    by: str = "group",
    distance: int = SplitConfig.near_duplicate_distance,
) -> npt.NDArray[np.bool_]:
    """(n,) whether each bin is of one of the splits of one of the trainings.

    Bins are compared by id; those of two roots only if their photos are nearly identical too, as another warehouse may
    number its bins alike.

    Args:
        bins: n bins: id, group and phash; without phash, equal ids are taken for equal bins in all roots.
        root: that they are of.
        training: of the model.
        splits: that count as seen.
        by: group: other snapshots of a seen bin are seen too, by the groups of the training and by those of `bins`.
            id: they are not, as by a random split.
        distance: photos are nearly identical when their hashes differ in at most this many bits.
    """
    seen = np.zeros(len(bins), dtype=bool)
    for run in training:
        in_splits = run.bins["split"].isin(splits)
        if by == "group":
            in_splits = run.bins["group"].isin(run.bins.loc[in_splits, "group"])
        trained = run.bins[in_splits].set_index("id")["phash"]
        is_known = bins["id"].isin(trained.index).to_numpy(copy=True)
        if run.root != root and "phash" in bins:
            known = bins[is_known]
            hashes = [
                np.array([int(text, 16) for text in column], dtype=np.uint64)
                for column in (known["phash"], trained[known["id"]])
            ]
            is_known[is_known] = np.bitwise_count(hashes[0] ^ hashes[1]) <= distance
        seen |= is_known
    if by == "group":
        seen = bins["group"].isin(bins.loc[seen, "group"]).to_numpy()
    return seen


def describe_overlap(model: str, seen: pd.DataFrame, total: int) -> str:
    """Name the bins that a model has seen of `total`, and count them."""
    more = ", ..." if len(seen) > _SHOWN else ""
    ids = ", ".join(seen["id"].head(_SHOWN))
    return f"{model}, or a model it started from, was trained on {len(seen)} of the {total} bins ({ids}{more})"


def overlap_label(*, is_auditable: bool, dropped: int = 0) -> str:
    """What a run, a version and the gate's history say of seen bins: unauditable, `N dropped` or none."""
    if not is_auditable:
        return "unauditable"
    return f"{dropped} dropped" if dropped else "none"
