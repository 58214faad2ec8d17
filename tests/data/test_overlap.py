"""Which bins a model has seen: by id, by group, and by photo where two roots number their bins alike."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from stocktake.data.overlap import CHOSEN, TRAINED, TrainingBins, find_seen

BLACK, ALMOST_BLACK, OTHER = "0" * 16, "0" * 15 + "7", "ff" * 8


def table(rows: dict[str, tuple[str, str, str]]) -> pd.DataFrame:
    """Bins from id -> (group, split, phash)."""
    return pd.DataFrame([(name, *values) for name, values in rows.items()], columns=["id", "group", "split", "phash"])


RECORDED = table(
    {
        "a": ("a", "train", BLACK),
        "b": ("b", "val", OTHER),
        "c": ("c", "test", OTHER),
        "d": ("a", "test", OTHER),  # of a random split: a snapshot of a bin in train
    }
)


def seen(bins: pd.DataFrame, root: str = "here", splits: Any = TRAINED, by: str = "group") -> list[str]:
    mask = find_seen(bins, root, [TrainingBins(RECORDED, "here")], splits, by)
    return bins.loc[mask, "id"].tolist()


def test_bins_of_train_are_seen_and_those_of_val_where_they_chose_something() -> None:
    assert seen(RECORDED) == ["a", "d"]
    assert seen(RECORDED, splits=CHOSEN) == ["a", "b", "d"]
    assert seen(RECORDED, by="id") == ["a"]
    assert find_seen(RECORDED, "here", [], CHOSEN).sum() == 0


def test_other_snapshots_of_a_seen_bin_are_seen_unless_split_by_id() -> None:
    grown = table({"a": ("0", "train", BLACK), "0": ("0", "test", OTHER), "new": ("new", "test", OTHER)})
    assert seen(grown) == ["a", "0"]
    assert seen(grown, by="id") == ["a"]


@pytest.mark.parametrize(("phash", "expected"), [(BLACK, ["a"]), (ALMOST_BLACK, ["a"]), (OTHER, [])])
def test_in_another_root_an_equal_id_is_another_bin_if_its_photo_is_another(phash: str, expected: list[str]) -> None:
    elsewhere = table({"a": ("a", "test", phash), "e": ("e", "test", BLACK)})
    assert seen(elsewhere, root="there") == expected
    assert seen(elsewhere) == ["a"]
    assert seen(elsewhere.drop(columns="phash"), root="there") == ["a"]
