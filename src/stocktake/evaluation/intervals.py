"""Bootstrap intervals over bin groups: the snapshots of one bin are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stocktake.evaluation.metrics import class_indices, scores

_CHUNK = 200
"""Resamples scored at once: bounds the memory."""


class Interval(NamedTuple):
    """The ends of an interval, in the score's own unit."""

    low: float
    high: float


def bootstrap_intervals(
    labels: Sequence[int],
    quantities: NDArray[Any],
    predicted: NDArray[Any],
    groups: NDArray[Any],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of every score of `metrics.scores`.

    A resample draws as many groups as there are, with replacement, each with all its snapshots; the interval is
    the (1 - level) / 2 and (1 + level) / 2 quantiles of the scores over the resamples. Efron & Tibshirani,
    An Introduction to the Bootstrap (1993), ch. 13; whole groups as the unit: Davison & Hinkley, Bootstrap
    Methods and their Application (1997), sec. 3.8.

    The percentile interval covers too little with fewer than some 30 groups, and has no width with one. A
    macro score of a rare label is pulled down by resamples that hold none of its bins.

    Args:
        labels: the task's K quantities.
        quantities: (N,) recorded quantities.
        predicted: (N,) predicted quantities.
        groups: (N,) the bin group of each snapshot, any hashable.
        resamples: how many times to resample.
        level: share of the resamples inside the interval, between 0 and 1.
        seed: the same seed gives the same intervals.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: no bins, arrays of different lengths, or a level outside 0 to 1.
    """
    (drawn,) = _resampled_scores(labels, quantities, [predicted], groups, resamples, seed)
    return {name: percentile_interval(values, level) for name, values in drawn.items()}


def paired_differences(
    labels: Sequence[int],
    quantities: NDArray[Any],
    predicted: NDArray[Any],
    reference: NDArray[Any],
    groups: NDArray[Any],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Resample score(predicted) - score(reference) on the same bins, for every score of `metrics.scores`.

    Both models are scored on the same resample and the difference is taken there: what makes a bin hard for both
    cancels out, so this tells two models apart where their own intervals overlap. The paired bootstrap of Efron &
    Tibshirani (1993), sec. 16.4, with whole groups as the unit. `percentile_interval` of a score's differences is
    their interval, their standard deviation the standard error. For rmse and mae, better is a difference below 0.

    Args:
        labels: the task's K quantities.
        quantities: (N,) recorded quantities.
        predicted: (N,) quantities predicted by the model in question.
        reference: (N,) quantities predicted by the model that it is compared with.
        groups: (N,) the bin group of each snapshot.
        resamples: how many times to resample.
        seed: the same seed gives the same differences.

    Returns:
        (resamples,) differences of each score.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: no bins, or arrays of different lengths.
    """
    ours, theirs = _resampled_scores(labels, quantities, [predicted, reference], groups, resamples, seed)
    return {name: values - theirs[name] for name, values in ours.items()}


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Return the (1 - level) / 2 and (1 + level) / 2 quantiles of resampled values.

    Raises:
        ValueError: a level outside 0 to 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _resampled_scores(
    labels: Sequence[int],
    quantities: NDArray[Any],
    models: Sequence[NDArray[Any]],
    groups: NDArray[Any],
    resamples: int,
    seed: int,
) -> list[dict[str, NDArray[np.float64]]]:
    """Score each model on the same resamples of the groups: for each model, score name -> (resamples,) values.

    A bin falls into one of the K ** (1 + models) cells of (recorded, predicted by each model). Groups with the same
    counts in the cells are interchangeable, so the number of draws of each distinct row of counts is drawn from its
    multinomial distribution instead of the groups one by one: the cost depends on the distinct rows, not on the bins.
    """
    k, n = len(labels), len(quantities)
    if n == 0 or any(len(column) != n for column in (*models, groups)):
        raise ValueError(f"an interval needs columns of one length, not {n}, {len(groups)}, {[*map(len, models)]}")
    cell = class_indices(labels, quantities)
    for predicted in models:
        cell = cell * k + class_indices(labels, predicted)
    occupied, column = np.unique(cell, return_inverse=True)
    _, row = np.unique(np.asarray(groups), return_inverse=True)
    per_group = np.zeros((row.max() + 1, len(occupied)), dtype=np.int32)
    np.add.at(per_group, (row, column), 1)
    distinct, times = np.unique(per_group, axis=0, return_counts=True)

    to_confusion = []  # (cells, K * K) for each model: sums the cells to its confusion matrix
    for index in range(len(models)):
        truth, predicted = occupied // k ** len(models), occupied // k ** (len(models) - 1 - index) % k
        to_confusion.append(distinct @ np.eye(k * k)[truth * k + predicted])
    rng = np.random.default_rng(seed)
    chunks: list[list[dict[str, Any]]] = []
    for start in range(0, resamples, _CHUNK):
        draws = rng.multinomial(times.sum(), times / times.sum(), size=min(_CHUNK, resamples - start))
        chunks.append([scores((draws @ rows).reshape(-1, k, k), labels) for rows in to_confusion])
    return [
        {name: np.concatenate([chunk[index][name] for chunk in chunks]) for name in chunks[0][index]}
        for index in range(len(models))
    ]
