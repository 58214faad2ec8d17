"""What is said of a search's trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHOWN = 10


def in_words(params: Mapping[str, Any]) -> str:
    """lr=0.001 batch_size=32"""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )


def best_table(
    objectives: Sequence[str], trials: Iterable[tuple[str, Sequence[float], Mapping[str, Any]]]
) -> list[str]:
    """The trials that did best, as lines of a Markdown table.

    Args:
        objectives: their names; the first one is to be large.
        trials: number, one value an objective, params.
    """
    lines = ["| trial | " + " | ".join(objectives) + " | settings |", "|" + "---|" * (len(objectives) + 2)]
    for number, values, params in sorted(trials, key=lambda one: -one[1][0])[:_SHOWN]:
        lines.append(f"| {number} | " + " | ".join(f"{value:.4g}" for value in values) + f" | {in_words(params)} |")
    return lines
