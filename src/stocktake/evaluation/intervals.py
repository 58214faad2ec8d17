"""How sure a score is: bootstrap intervals that respect that looks at one bin are not independent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stocktake.evaluation.metrics import positions, scores

CHUNK_NUMBERS = 2_000_000  # numbers held at once by a chunk of resamples: 16 MB


class Interval(NamedTuple):
    """Where a score lies at the asked level, in the score's own unit."""

    low: float
    high: float


def bootstrap_intervals(
    labels: Sequence[int],
    quantities: NDArray[Any],
    predicted: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of every score of `metrics.scores`.

    A resample draws as many groups as there are, with replacement, each with all its looks; the interval is
    the (1 - level) / 2 and (1 + level) / 2 quantiles of the scores over the resamples. Efron & Tibshirani,
    An Introduction to the Bootstrap (1993), ch. 13; whole groups as the unit: Davison & Hinkley, Bootstrap
    Methods and their Application (1997), sec. 3.8.

    The percentile interval covers too little with fewer than some 30 groups, and has no width with one. A
    macro score of a rare label is pulled down by resamples that hold none of its bins.

    Args:
        labels: the task's K quantities.
        quantities: (N,) recorded quantities.
        predicted: (N,) counted quantities.
        groups: (N,) any hashable: which bin a look is of. None: every look is its own.
        resamples: how many times to resample.
        level: share of the resamples inside the interval, between 0 and 1.
        seed: the same seed gives the same intervals.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: no bins, arrays of different lengths, or a level outside 0 to 1.
    """
    k = len(labels)
    truth, ours = _places(labels, quantities, predicted)
    occupied, at = np.unique(truth * k + ours, return_inverse=True)
    drawn: dict[str, list[NDArray[Any]]] = {}
    for counts in _resampled_counts(at, groups, k * k, resamples, level, seed):
        confusion = np.zeros((len(counts), k * k))
        confusion[:, occupied] = counts
        for name, value in scores(confusion.reshape(-1, k, k), labels).items():
            drawn.setdefault(name, []).append(np.asarray(value))
    return {name: _percentiles(np.concatenate(values), level) for name, values in drawn.items()}


def paired_difference_interval(
    labels: Sequence[int],
    quantities: NDArray[Any],
    predicted: NDArray[Any],
    reference: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    metric: str = "macro_f1",
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of how much one model's score exceeds another's on the same bins.

    Both models are scored on the same resample and the difference, score(predicted) - score(reference), is
    taken there: what makes a bin hard for both cancels out, so this tells two models apart where their own
    intervals overlap. The paired bootstrap test of Efron & Tibshirani (1993), sec. 16.4, with whole groups
    as the unit. For a score where less is better (rmse, mae), better is a difference below 0.

    Args:
        labels: the task's K quantities.
        quantities: (N,) recorded quantities.
        predicted: (N,) quantities counted by the model in question.
        reference: (N,) quantities counted by the model it is held against.
        groups: (N,) which bin a look is of. None: every look is its own.
        metric: a name that `metrics.scores` gives.
        resamples: how many times to resample.
        level: share of the resamples inside the interval, between 0 and 1.
        seed: the same seed gives the same interval.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: an unknown metric, no bins, arrays of different lengths, or a level outside 0 to 1.
    """
    known = scores(np.zeros((len(labels), len(labels))), labels)
    if metric not in known:
        raise ValueError(f"unknown metric {metric!r}: one of {', '.join(known)}")
    k = len(labels)
    truth, ours, theirs = _places(labels, quantities, predicted, reference)
    # A bin falls into one of K cubed cells; only the few that occur are counted, then summed to two matrices.
    occupied, at = np.unique((truth * k + ours) * k + theirs, return_inverse=True)
    truth, ours, theirs = occupied // (k * k), occupied // k % k, occupied % k
    to_ours, to_theirs = np.zeros((2, occupied.size, k * k))
    to_ours[np.arange(occupied.size), truth * k + ours] = 1
    to_theirs[np.arange(occupied.size), truth * k + theirs] = 1
    differences = []
    for counts in _resampled_counts(at, groups, 2 * k * k, resamples, level, seed):
        ours_score, theirs_score = (
            np.asarray(scores((counts @ to).reshape(-1, k, k), labels)[metric]) for to in (to_ours, to_theirs)
        )
        differences.append(ours_score - theirs_score)
    return _percentiles(np.concatenate(differences), level)


def _places(labels: Sequence[int], *columns: NDArray[Any]) -> list[NDArray[np.int64]]:
    places = [positions(labels, column) for column in columns]
    if len({place.size for place in places}) != 1:
        raise ValueError(f"columns of {', '.join(str(p.size) for p in places)} bins: they must be as many")
    return places


def _resampled_counts(
    cells: NDArray[np.int64],
    groups: NDArray[Any] | None,
    width: int,
    resamples: int,
    level: float,
    seed: int,
) -> Iterator[NDArray[np.float64]]:
    """Chunks of resamples, each (chunk, C): how many bins of a resample fall into each of the C cells.

    Groups with the same counts are interchangeable, so instead of drawing groups one by one, the number of
    draws of each distinct row is drawn, from the multinomial that it follows: the same distribution, and the
    cost depends on the distinct rows, not on the bins.
    """
    if cells.size == 0:
        raise ValueError("an interval needs at least one bin")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level}")
    if resamples < 1:
        raise ValueError(f"resamples is at least 1, not {resamples}")
    kinds = int(cells.max()) + 1
    if groups is None:
        rows, times = np.eye(kinds), np.bincount(cells, minlength=kinds)
    else:
        if len(groups) != cells.size:
            raise ValueError(f"{cells.size} bins and {len(groups)} groups: they must be as many")
        _, members = np.unique(np.asarray(groups), return_inverse=True)
        per_group = np.zeros((int(members.max()) + 1, kinds), dtype=np.int32)
        np.add.at(per_group, (members, cells), 1)
        distinct, times = np.unique(per_group, axis=0, return_counts=True)
        rows = distinct.astype(np.float64)
    draws = int(times.sum())
    shares = times / draws
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_NUMBERS // max(len(rows), width))
    for start in range(0, resamples, chunk):
        yield rng.multinomial(draws, shares, size=min(chunk, resamples - start)) @ rows


def _percentiles(values: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
