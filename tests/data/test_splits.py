"""Splits: drawn by hash, the same for ever, near the wanted shares; kept as a root grows."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stocktake.config.data import SplitConfig
from stocktake.data.splits import SPLITS, Conflicts, assign_split, assign_splits, check_fractions, published_config
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
    for fractions in (SHARES, (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0, 0, 1), (1.0, 0.0, 0.0)):
        check_fractions(fractions)


@pytest.mark.parametrize("fractions", [(0.0, 0.0, 1.0), (0.0, 0.5, 0.5), (0.3333333, 0.6666666, 0.0)])
def test_a_share_of_zero_gets_no_bin(fractions: tuple[float, float, float]) -> None:
    splits = {assign_split(str(key), fractions, 0) for key in range(3_000)}
    assert splits == {split for split, share in zip(SPLITS, fractions, strict=True) if share}


def root_of_groups(members: dict[str, str]) -> pd.DataFrame:
    """The bins of these ids in the groups that they are snapshots of, grouped as `group_bins` does."""
    bins = pd.DataFrame(sorted(members.items()), columns=["id", "bin"])
    return bins.assign(group=bins.groupby("bin")["id"].transform("first")).drop(columns="bin")


@st.composite
def growing_roots(draw: st.DrawFn) -> list[dict[str, str]]:
    """A root that grows and loses bins in four steps, with bins that join two groups for good."""
    numbers = draw(st.lists(st.integers(0, 99_999), min_size=8, max_size=40, unique=True))
    bin_of = {f"{number:05d}": f"bin-{draw(st.integers(0, 12))}" for number in numbers}
    steps, joined = [], {name: name for name in set(bin_of.values())}
    for share in (0.4, 0.6, 0.8, 1.0):
        some = numbers[: max(1, round(share * len(numbers)))]
        kept = [f"{number:05d}" for number in some if draw(st.integers(0, 9))]
        if draw(st.booleans()):
            first, second = (joined[draw(st.sampled_from(sorted(joined)))] for _ in range(2))
            joined = {name: first if target == second else target for name, target in joined.items()}
        steps.append({bin_id: joined[bin_of[bin_id]] for bin_id in kept})
    return steps


@pytest.mark.parametrize("by", ["group", "id"])
@settings(max_examples=40)
@given(steps=growing_roots(), seed=st.integers(0, 3))
def test_a_bin_that_was_in_train_is_never_in_test_as_a_root_grows(
    by: Literal["group", "id"], steps: list[dict[str, str]], seed: int
) -> None:
    config = SplitConfig(by=by, fractions=(0.5, 0.2, 0.3), seed=seed)
    remembered: dict[str, str] = {}
    ever_in_train: set[str] = set()
    for members in steps:
        table = pd.DataFrame(list(remembered.items()), columns=["id", "split"])
        bins, conflicts = assign_splits(root_of_groups(members), config, table)
        split_of = dict(zip(bins["id"], bins["split"], strict=True))
        moved = [key for key in remembered.keys() & split_of.keys() if remembered[key] != split_of[key]]
        assert {split_of[key] for key in moved} <= {"train"}
        assert (len(moved), conflicts.groups > 0) == (conflicts.bins, len(moved) > 0)
        assert not ever_in_train & {key for key, split in split_of.items() if split != "train"}
        if by == "group":
            assert (bins.groupby("group")["split"].nunique() == 1).all()
        else:
            assert not moved
        ever_in_train |= {key for key, split in split_of.items() if split == "train"}
        remembered |= split_of


def test_without_memory_groups_are_drawn_by_the_hash_of_their_first_id() -> None:
    bins = root_of_groups({f"{number:05d}": f"bin-{number // 3}" for number in range(600)})
    for config in (SplitConfig(), SplitConfig(by="id", seed=5, fractions=(0.6, 0.2, 0.2))):
        assigned, conflicts = assign_splits(bins, config)
        keys = bins["group"] if config.by == "group" else bins["id"]
        assert assigned["split"].tolist() == [assign_split(key, config.fractions, config.seed) for key in keys]
        assert conflicts == Conflicts()


def test_a_smaller_id_a_lost_member_and_a_bin_between_two_groups_redraw_nothing() -> None:
    """What re-drew a whole group when its split was drawn from its smallest id each time."""
    config = SplitConfig(fractions=(0.5, 0.0, 0.5))
    of_hash = {number: assign_split(f"{number:05d}", config.fractions, 0) for number in range(200)}
    pulls_to_train, in_train, in_test = (
        f"{next(number for number in numbers if of_hash[number] == split):05d}"
        for numbers, split in ((range(100), "train"), (range(100, 200), "train"), (range(100, 200), "test"))
    )
    first, _ = assign_splits(root_of_groups({in_train: "a", in_test: "b", f"{in_test}x": "b"}), config)
    remembered = first[["id", "split"]]

    smaller, _ = assign_splits(root_of_groups({pulls_to_train: "b", in_test: "b", in_train: "a"}), config, remembered)
    assert dict(zip(smaller["id"], smaller["split"], strict=True)) == {
        pulls_to_train: "test",
        in_test: "test",
        in_train: "train",
    }
    lost, _ = assign_splits(root_of_groups({f"{in_test}x": "b"}), config, remembered)
    assert lost["split"].tolist() == ["test"]
    bridged, conflicts = assign_splits(
        root_of_groups({in_train: "a", in_test: "a", f"{in_test}x": "a", "new": "a"}), config, remembered
    )
    assert set(bridged["split"]) == {"train"}
    assert conflicts == Conflicts(groups=1, bins=2)


def test_a_published_set_refuses_other_settings_than_its_own() -> None:
    of_set = SplitConfig(by="id", seed=3)
    assert published_config(SplitConfig(), of_set, "here") == of_set
    assert published_config(SplitConfig(by="id"), of_set, "here") == of_set
    for other in (SplitConfig(seed=4), SplitConfig(fractions=(0.5, 0.2, 0.3)), SplitConfig(like="run")):
        with pytest.raises(StocktakeError, match="here"):
            published_config(other, of_set, "here")
