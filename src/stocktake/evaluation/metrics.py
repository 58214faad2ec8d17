"""Scores of counting, all of them derived from one confusion matrix.

A confusion matrix holds counts and therefore sums exactly: over batches, over processes, over the groups of a
bootstrap resample. The scores are computed once, from the sum, and are those of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stocktake.errors import StocktakeError

Confusion = NDArray[np.int64]
Scores = dict[str, NDArray[np.float64] | float]


def confusion_matrix(labels: Sequence[int], quantities: NDArray[Any], predicted: NDArray[Any]) -> Confusion:
    """Count how often each recorded quantity was counted as each label.

    Args:
        labels: the task's quantities, in the order of the rows and columns.
        quantities: (N,) recorded quantities.
        predicted: (N,) counted quantities.

    Returns:
        (K, K) counts; row = recorded, column = counted.

    Raises:
        StocktakeError: a quantity is none of the labels, which would otherwise vanish from every score.
        ValueError: the two arrays differ in length.
    """
    rows, columns = positions(labels, quantities), positions(labels, predicted)
    if rows.shape != columns.shape:
        raise ValueError(f"{rows.size} quantities and {columns.size} predictions: they must be as many")
    k = len(labels)
    return np.bincount(rows * k + columns, minlength=k * k).reshape(k, k).astype(np.int64)


def positions(labels: Sequence[int], quantities: NDArray[Any]) -> NDArray[np.int64]:
    """Where each quantity stands among the labels: (N,) values to (N,) indices below K.

    Raises:
        StocktakeError: a quantity is none of the labels.
    """
    values = np.asarray(labels, dtype=np.int64)
    if values.size == 0 or np.unique(values).size != values.size:
        raise ValueError(f"labels must be distinct and at least one, not {list(labels)}")
    quantities = np.asarray(quantities).ravel()
    order = np.argsort(values)
    found = order[np.searchsorted(values, quantities, sorter=order).clip(max=values.size - 1)]
    strangers = quantities[values[found] != quantities]
    if strangers.size:
        raise StocktakeError(
            f"quantity {strangers[0]} is none of the labels {', '.join(map(str, labels))}: "
            "choose a task that holds it, or leave those bins out"
        )
    return np.asarray(found, dtype=np.int64)


def scores(confusion: NDArray[Any], labels: Sequence[int]) -> Scores:
    """Derive every score from confusion matrices.

    accuracy, the share counted exactly; macro_precision, macro_recall and macro_f1, plain means over all
    labels; recall_<label>; rmse and mae, in items; within_1, the share counted at most one item off.

    The definitions are scikit-learn's with `labels=labels, zero_division=0` (Pedregosa et al. 2011;
    `precision_recall_fscore_support`, `mean_squared_error`): a ratio whose denominator is 0 is 0. A label
    that no bin of the sample has is therefore not left out of a macro mean: its recall and F1 are 0 and pull
    the mean down, so macro scores of two samples compare only where both hold every label. With no bins at
    all, every score is nan.

    Args:
        confusion: (..., K, K) counts, row = recorded, column = counted.
        labels: the K quantities; rmse, mae and within_1 are taken on these values.

    Returns:
        name -> float for one matrix, name -> array of shape (...) for many.

    Raises:
        ValueError: the last two dimensions are not K by K.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    k = len(labels)
    if counts.shape[-2:] != (k, k):
        raise ValueError(f"a confusion matrix of {k} labels is {k} by {k}, not {counts.shape[-2:]}")
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    recorded, counted = counts.sum(-1), counts.sum(-2)
    total = counts.sum((-2, -1))

    recall = _ratio(hits, recorded)
    values = np.asarray(labels, dtype=np.float64)
    off = np.abs(values[:, None] - values[None, :])
    result: dict[str, NDArray[np.float64]] = {
        "accuracy": _ratio(hits.sum(-1), total),
        "macro_f1": _ratio(2 * hits, recorded + counted).mean(-1),
        "macro_precision": _ratio(hits, counted).mean(-1),
        "macro_recall": recall.mean(-1),
        "rmse": np.sqrt(_ratio((counts * off**2).sum((-2, -1)), total)),
        "mae": _ratio((counts * off).sum((-2, -1)), total),
        "within_1": _ratio((counts * (off <= 1)).sum((-2, -1)), total),
    }
    result |= {f"recall_{label}": recall[..., i] for i, label in enumerate(labels)}
    result = {name: np.where(total > 0, value, np.nan) for name, value in result.items()}
    return {name: value if value.ndim else float(value) for name, value in result.items()}


def per_class(confusion: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Precision, recall and F1 of each label of one (K, K) matrix, each of shape (K,); 0 where undefined."""
    counts = np.asarray(confusion, dtype=np.float64)
    hits, recorded, counted = np.diagonal(counts), counts.sum(1), counts.sum(0)
    return {
        "precision": _ratio(hits, counted),
        "recall": _ratio(hits, recorded),
        "f1": _ratio(2 * hits, recorded + counted),
    }


def cross_entropy(probabilities: NDArray[Any], quantities: NDArray[Any], labels: Sequence[int]) -> float:
    """Mean negative log probability (nats) of the recorded quantity, as scikit-learn's `log_loss`.

    A probability of 0 counts as the smallest step of a 64-bit float, so one certain mistake costs 36 nats
    and not infinity.

    Args:
        probabilities: (N, K), each row summing to 1, columns in the order of the labels.
        quantities: (N,) recorded quantities.
        labels: the K quantities.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: the shapes do not fit.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    at = positions(labels, quantities)
    if probabilities.shape != (at.size, len(labels)):
        raise ValueError(f"probabilities are of shape {(at.size, len(labels))}, not {probabilities.shape}")
    if at.size == 0:
        return float("nan")
    right = probabilities[np.arange(at.size), at]
    return float(-np.log(np.clip(right, np.finfo(np.float64).eps, 1.0)).mean())


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)
