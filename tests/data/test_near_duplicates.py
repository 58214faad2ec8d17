"""Groups of snapshots: equal to comparing every pair, whatever the order; named after the first id."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocktake.data.near_duplicates import group_duplicates

ITEMS = st.lists(st.sampled_from("ABCDEFG"), max_size=5)
NEAR = st.lists(st.integers(0, 63), max_size=6)
"""Bits in which a photo's hash differs from one of two base hashes."""
BINS = st.lists(st.tuples(ITEMS, st.sampled_from([0, 0xF0F0F0F0F0F0F0F0]), NEAR), min_size=1, max_size=14)


def flipped(base: int, bits: list[int]) -> int:
    for bit in bits:
        base ^= 1 << bit
    return base


def compare_every_pair(
    ids: list[str], snapshots: list[tuple[list[str], int]], distance: int, common_item: int
) -> list[str]:
    """The rule, as the module's docstring words it."""
    popularity = Counter(item for items, _ in snapshots for item in set(items))
    group = list(range(len(ids)))
    for i, j in itertools.combinations(range(len(ids)), 2):
        items, others = set(snapshots[i][0]), set(snapshots[j][0])
        shared = items & others
        linked = any(popularity[item] <= common_item for item in shared)
        alike = linked and 2 * len(shared) >= max(len(items), len(others))
        if alike or (snapshots[i][1] ^ snapshots[j][1]).bit_count() <= distance:
            low, high = sorted((group[i], group[j]))
            group = [low if g == high else g for g in group]
    return [ids[g] for g in group]


def grouped(ids: list[str], snapshots: list[tuple[list[str], int]], distance: int, common_item: int = 100) -> list[str]:
    hashes = np.array([photo_hash for _, photo_hash in snapshots], dtype=np.uint64)
    items = [items for items, _ in snapshots]
    return group_duplicates(ids, items, hashes, distance=distance, common_item=common_item)


@given(BINS, st.integers(0, 16), st.integers(1, 8))
def test_grouping_equals_comparing_every_pair(
    drawn: list[tuple[list[str], int, list[int]]], distance: int, common_item: int
) -> None:
    ids = [f"{index:03d}" for index in range(len(drawn))]
    snapshots = [(items, flipped(base, bits)) for items, base, bits in drawn]
    expected = compare_every_pair(ids, snapshots, distance, common_item)
    assert grouped(ids, snapshots, distance, common_item) == expected


@given(BINS, st.randoms(use_true_random=False))
def test_the_order_of_bins_does_not_change_who_belongs_together(
    drawn: list[tuple[list[str], int, list[int]]], chance: random.Random
) -> None:
    snapshots = [(items, flipped(base, bits)) for items, base, bits in drawn]
    order = list(range(len(snapshots)))
    chance.shuffle(order)
    ids = [f"{index:03d}" for index in range(len(snapshots))]
    straight = grouped(ids, snapshots, 4)
    mixed = grouped(ids, [snapshots[index] for index in order], 4)
    together = {(i, j) for i in order for j in order if straight[i] == straight[j]}
    assert together == {(order[i], order[j]) for i in order for j in order if mixed[i] == mixed[j]}


FAR_APART = np.array([0, 0xFFFFFFFF, 0xFFFFFFFF << 32, 0x0F0F0F0F0F0F0F0F], dtype=np.uint64)


@pytest.mark.parametrize(
    ("items", "other", "together"),
    [
        ("AB", "AC", True),  # half of either
        ("ABCD", "AB", True),  # half of the larger
        ("ABCDE", "AB", False),  # all of the smaller, but less than half of the larger
        ("A", "A", True),
        ("AAB", "AC", True),  # an item counts once
        ("", "", False),  # empty bins are not alike
        ("ABC", "AXY", False),
    ],
)
def test_the_larger_record_shares_at_least_half(items: str, other: str, together: bool) -> None:
    groups = group_duplicates(["1", "2"], [items, other], FAR_APART[:2], distance=0, common_item=100)
    assert groups == (["1", "1"] if together else ["1", "2"])


def test_snapshots_chain_and_bear_the_first_id() -> None:
    items = [["A", "B"], ["Q"], ["B", "C"], ["C", "D"]]
    assert group_duplicates(["05", "06", "07", "08"], items, FAR_APART, distance=4, common_item=100) == [
        "05",
        "06",
        "05",
        "05",
    ]


@pytest.mark.parametrize("distance", [0, 4, 8])
def test_photos_are_near_up_to_the_distance_and_no_further(distance: int) -> None:
    hashes = np.array([0, (1 << distance) - 1, ((1 << 2 * distance + 1) - 1) << 20], dtype=np.uint64)
    assert group_duplicates(["1", "2", "3"], [[], [], []], hashes, distance=distance, common_item=100) == [
        "1",
        "1",
        "3",
    ]


def test_many_equal_bins_are_one_group_and_take_no_pair_for_each_two() -> None:
    """A placeholder where photos are missing, one article in every bin: 20,000 bins would be 200 million pairs."""
    n = 20_000
    ids = [f"{index:05d}" for index in range(n)]
    one_hash, all_hashes = np.zeros(n, dtype=np.uint64), np.arange(n, dtype=np.uint64) << np.uint64(40)
    tracemalloc.start()
    assert set(group_duplicates(ids, [[]] * n, one_hash, distance=4, common_item=n)) == {"00000"}
    assert set(group_duplicates(ids, [["A", "B"]] * n, all_hashes, distance=0, common_item=n)) == {"00000"}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000


def test_near_photos_are_found_across_blocks_of_a_band() -> None:
    """Hashes with one band in common are compared block by block: the ends of 3,000 of them must still meet."""
    numbers = np.arange(3000, dtype=np.uint64)
    parity = np.bitwise_count(numbers).astype(np.uint64) & np.uint64(1)  # no two of these differ in one bit only
    hashes = (numbers << np.uint64(33)) | (parity << np.uint64(32))
    hashes[-1] = np.uint64(1 << 63)
    ids = [f"{index:05d}" for index in range(3000)]
    assert group_duplicates(ids, [[]] * 3000, hashes, distance=1, common_item=100) == [*ids[:-1], ids[0]]


def test_no_bins_have_no_groups() -> None:
    assert group_duplicates([], [], np.zeros(0, dtype=np.uint64), distance=4, common_item=100) == []


def test_an_item_in_many_bins_takes_memory_in_proportion_to_them() -> None:
    """8,000 records that share one item are 32 million pairs; they are no group either."""
    peaks = []
    for n in (4_000, 8_000):
        ids = [f"{index:05d}" for index in range(n)]
        items = [["bestseller", f"item-{index // 2}"] for index in range(n)]
        tracemalloc.start()
        groups = group_duplicates(
            ids, items, np.arange(n, dtype=np.uint64) << np.uint64(40), distance=0, common_item=100
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert groups == [ids[index // 2 * 2] for index in range(n)]
    assert peaks[1] < 3 * peaks[0] < 60_000_000


def test_bestsellers_alone_do_not_chain_bins_into_one_group() -> None:
    """Each two neighbours share half of their items, but every item is in five bins."""
    n = 40
    items = [[f"item-{index // 4}", f"item-{index // 4 + 1}"] for index in range(n)]
    ids = [f"{index:02d}" for index in range(n)]
    hashes = np.random.default_rng(0).integers(0, 2**63, n).astype(np.uint64)
    groups = group_duplicates(ids, items, hashes, distance=0, common_item=4)
    assert max(Counter(groups).values()) <= 8
    assert set(group_duplicates(ids, items, hashes, distance=0, common_item=100)) == {"00"}
