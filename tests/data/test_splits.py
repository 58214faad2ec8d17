"""Splits by hash: the same for ever, near the wanted shares, hardly moved by new bins."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocktake.data.splits import SPLITS, assign_split, check_fractions
from stocktake.errors import StocktakeError

SHARES = (0.8, 0.1, 0.1)


def test_the_split_of_a_bin_never_changes() -> None:
    """Written down once: another version of the program must not move bins between splits."""
    split_of = {number: assign_split(f"{number:05d}", SHARES, 0) for number in range(1, 31)}
    assert [number for number, split in split_of.items() if split == "val"] == [7, 21]
    assert [number for number, split in split_of.items() if split == "test"] == [1, 9, 14, 18, 23, 26, 30]


@given(st.text(max_size=12), st.integers(), st.floats(0.01, 0.98))
def test_every_key_has_one_split(key: str, seed: int, train: float) -> None:
    fractions = (train, (1 - train) / 2, (1 - train) / 2)
    assert assign_split(key, fractions, seed) == assign_split(key, fractions, seed)
    assert assign_split(key, fractions, seed) in SPLITS


@pytest.mark.parametrize("fractions", [SHARES, (0.7, 0.2, 0.1), (0.34, 0.33, 0.33)])
def test_shares_are_near_the_wanted_ones(fractions: tuple[float, float, float]) -> None:
    counts = Counter(assign_split(str(key), fractions, 0) for key in range(20_000))
    assert [counts[split] / 20_000 for split in SPLITS] == pytest.approx(fractions, abs=0.01)


@given(st.text(max_size=12), st.integers(0, 9), st.floats(0.1, 0.8), st.floats(0.0, 0.1))
def test_a_larger_train_share_takes_no_bin_out_of_train(key: str, seed: int, train: float, more: float) -> None:
    before = assign_split(key, (train, 0.1, 0.9 - train), seed)
    after = assign_split(key, (train + more, 0.1, 0.9 - train - more), seed)
    assert SPLITS.index(after) <= SPLITS.index(before)


def test_another_seed_is_another_split() -> None:
    of_seed = [[assign_split(str(key), SHARES, seed) for key in range(500)] for seed in (0, 1)]
    moved = np.mean([one != other for one, other in zip(*of_seed, strict=True)])
    assert 0.2 < moved < 0.5  # of independent draws a share of 1 - 0.8² - 0.1² - 0.1² = 0.34


@pytest.mark.parametrize(
    "fractions",
    [
        (0.8, 0.1),
        (0.8, 0.1, 0.1, 0.0),
        (1.0, 0.0, 0.0),
        (0.9, 0.2, -0.1),
        (0.8, 0.1, 0.2),
        (8, 1, 1),
        (float("nan"), 0.5, 0.5),
        (0.5, float("nan"), 0.5),
        (float("inf"), 0.1, 0.1),
        (),
    ],
)
def test_shares_that_are_none_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(StocktakeError, match=r"--split.fractions .* sum to 1"):
        check_fractions(fractions)


def test_shares_as_people_write_them_are_taken() -> None:
    for fractions in (SHARES, (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3)):
        check_fractions(fractions)
