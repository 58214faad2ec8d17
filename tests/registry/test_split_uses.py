"""How often the gate used a test split: counted in a real store, whatever happens to versions and to other uses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pandas as pd

from stocktake.config.runs import TrackingConfig
from stocktake.registry.split_uses import SplitUse, record_outcome, record_use
from stocktake.registry.versions import ModelRegistry


def bins(first: int, n: int) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"{number:05d}" for number in range(first, first + n)], "quantity": 1})


def test_uses_of_the_same_bins_are_counted_and_those_of_others_are_not(three: ModelRegistry) -> None:
    assert record_use(three, "a", bins(0, 800)) == SplitUse(1, 0, "a")
    assert record_use(three, "b", bins(0, 800)) == SplitUse(2, 1, "b")
    assert record_use(three, "c", bins(5000, 800)) == SplitUse(1, 0, "c"), "no bin in common"
    grown = pd.concat([bins(0, 800), bins(9000, 400)])
    assert record_use(three, "d", grown) == SplitUse(3, 2, "d"), "a root that grew has not forgotten"
    assert record_use(three, "e", bins(600, 800)) == SplitUse(4, 3, "e"), "a quarter of them"


def test_the_same_comparison_again_is_the_same_use(three: ModelRegistry) -> None:
    first = record_use(three, "a", bins(0, 100))
    record_use(three, "b", bins(0, 100))
    assert record_use(three, "a", bins(0, 100)) == first


def test_a_use_that_shows_a_gain_leaves_the_level_as_it_is(three: ModelRegistry) -> None:
    first = record_use(three, "a", bins(0, 100))
    record_outcome(three, first, has_gain=True)
    second = record_use(three, "b", bins(0, 100))
    assert (second.number, second.without_gain, second.level) == (2, 0, first.level)
    record_outcome(three, second, has_gain=False)
    assert record_use(three, "c", bins(0, 100)) == SplitUse(3, 1, "c")


def test_deleting_versions_forgets_no_use(three: ModelRegistry) -> None:
    record_use(three, "a", bins(0, 100))
    for version in three.versions():
        three.client.delete_model_version(three.name, str(version.number))
    assert record_use(three, "b", bins(0, 100)) == SplitUse(2, 1, "b")


def test_uses_at_once_lose_none(three: ModelRegistry, tmp_path: Path) -> None:
    """The j-th use that is written is judged as the j-th or later."""
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")

    def use(name: str) -> list[int]:
        with ModelRegistry(tracking).opened() as registry:
            return [record_use(registry, f"{name}{number}", bins(0, 100)).number for number in range(4)]

    with ThreadPoolExecutor(2) as pool:
        numbers = sorted(chain.from_iterable(pool.map(use, "ab")))
    assert len(numbers) == 8
    assert all(number >= place for place, number in enumerate(numbers, 1))
    assert record_use(three, "last", bins(50, 1)).number == 9
