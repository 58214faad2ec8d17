"""A task: the range of quantities to tell apart."""

import re

from stocktake.errors import StocktakeError

LARGEST_QUANTITY = 999
"""A bin holds fewer items than this; a wider task is a typing error."""


def parse_task(task: str) -> tuple[int, ...]:
    """Labels of a task: '1-5' -> (1, 2, 3, 4, 5); '0-5', any range.

    Raises:
        StocktakeError: the text is not a range of at least two quantities.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*-\s*(\d{1,6})\s*", str(task))
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not low < high <= LARGEST_QUANTITY:
        raise StocktakeError(
            f"--task {task!r} is not a range of quantities: give the lowest and the highest, "
            f"such as 1-5 or 0-5 (at most {LARGEST_QUANTITY})"
        )
    return tuple(range(low, high + 1))
