"""A task is a range of quantities; anything else is refused in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocktake.data.task import LARGEST_QUANTITY, parse_task
from stocktake.errors import StocktakeError


@pytest.mark.parametrize(
    ("task", "labels"), [("1-5", (1, 2, 3, 4, 5)), ("0-5", (0, 1, 2, 3, 4, 5)), (" 3 - 4 ", (3, 4))]
)
def test_a_range_is_its_quantities_in_order(task: str, labels: tuple[int, ...]) -> None:
    assert parse_task(task) == labels


@pytest.mark.parametrize(
    "task", ["", "5", "5-1", "3-3", "1-5-7", "-1-5", "1.5-3", "one-five", "1..5", f"0-{LARGEST_QUANTITY + 1}", "1-5\n6"]
)
def test_what_is_no_range_is_refused_with_an_example(task: str) -> None:
    with pytest.raises(StocktakeError, match="1-5 or 0-5") as refused:
        parse_task(task)
    assert repr(task) in str(refused.value)


@given(st.text(max_size=20))
def test_any_text_is_a_range_or_refused(task: str) -> None:
    try:
        labels = parse_task(task)
    except StocktakeError:
        return
    assert len(labels) >= 2
    assert labels == tuple(range(labels[0], labels[-1] + 1))
