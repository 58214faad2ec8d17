"""Scores of predicted quantities: scikit-learn's, and the same for many confusion matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.errors import StocktakeError

Confusion = NDArray[np.int64]
Scores = dict[str, NDArray[np.float64] | float]

LOWER_IS_BETTER = frozenset({"rmse", "mae", "rmse_expected", "mae_expected"})
"""Of the scores of an evaluation; of the others, more is better."""


def class_indices(labels: Sequence[int], quantities: NDArray[Any]) -> NDArray[np.int64]:
    """Map (N,) quantities to their (N,) indices among the labels.

    Raises:
        StocktakeError: a quantity is none of the labels; scikit-learn would leave it out of every score.
    """
    quantities = np.asarray(quantities).ravel()
    indices = pd.Index(labels).get_indexer(pd.Index(quantities))
    if (unknown := quantities[indices < 0]).size:
        raise StocktakeError(
            f"quantity {unknown[0]} is none of the labels {', '.join(map(str, labels))}: "
            "choose a task that holds it, or leave those bins out"
        )
    return np.asarray(indices, dtype=np.int64)


def confusion_matrix(labels: Sequence[int], quantities: NDArray[Any], predicted: NDArray[Any]) -> Confusion:
    """Return the (K, K) counts of recorded (row) against predicted (column) quantities.

    Args:
        labels: the task's K quantities, in the order of the rows and columns.
        quantities: (N,) recorded quantities.
        predicted: (N,) predicted quantities.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: the two arrays differ in length.
    """
    rows, columns = class_indices(labels, quantities), class_indices(labels, predicted)
    if len(rows) != len(columns):
        raise ValueError(f"{len(rows)} quantities and {len(columns)} predictions: they must be as many")
    k = len(labels)
    return np.bincount(rows * k + columns, minlength=k * k).reshape(k, k).astype(np.int64)


def scores(confusion: NDArray[Any], labels: Sequence[int]) -> Scores:
    """Derive every score from one or many confusion matrices.

    scikit-learn scores one sample a call; a bootstrap scores thousands, so the formulas are written out here, with
    scikit-learn's definitions for `labels=labels, zero_division=0` (Pedregosa et al. 2011): a ratio whose denominator
    is 0 is 0. A label that no bin has is not left out of a macro mean: its recall and F1 of 0 pull the mean down, so
    macro scores of two samples compare only where both hold every label.

    Args:
        confusion: (..., K, K) counts, row = recorded, column = predicted.
        labels: the K quantities.

    Returns:
        accuracy; macro_f1, macro_precision, macro_recall; rmse and mae (items); within_1 (share at most one off);
        recall_<label>. A float each for one matrix, an array of shape (...) for many; nan where there are no bins.

    Raises:
        ValueError: the last two dimensions are not K by K.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    k = len(labels)
    if counts.shape[-2:] != (k, k):
        raise ValueError(f"a confusion matrix of {k} labels is {k} by {k}, not {counts.shape[-2:]}")
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    recorded, predicted = counts.sum(-1), counts.sum(-2)
    total = counts.sum((-2, -1))
    recall = _ratio(hits, recorded)
    values = np.asarray(labels, dtype=np.float64)
    off = np.abs(values[:, None] - values[None, :])
    result: dict[str, NDArray[np.float64]] = {
        "accuracy": _ratio(hits.sum(-1), total),
        "macro_f1": _ratio(2 * hits, recorded + predicted).mean(-1),
        "macro_precision": _ratio(hits, predicted).mean(-1),
        "macro_recall": recall.mean(-1),
        "rmse": np.sqrt(_ratio((counts * off**2).sum((-2, -1)), total)),
        "mae": _ratio((counts * off).sum((-2, -1)), total),
        "within_1": _ratio((counts * (off <= 1)).sum((-2, -1)), total),
    }
    result |= {f"recall_{label}": recall[..., i] for i, label in enumerate(labels)}
    result = {name: np.where(total > 0, value, np.nan) for name, value in result.items()}
    return {name: value if value.ndim else float(value) for name, value in result.items()}


def expected_quantities(probabilities: NDArray[Any], labels: Sequence[int]) -> NDArray[np.int64]:
    """Decode by expectation: the label nearest to the mean quantity; of two equally near, the smaller.

    The mean minimises the expected squared error, so of the whole quantities this one does; argmax minimises the
    expected share of wrong answers instead.

    Args:
        probabilities: (N, K), each row summing to 1, columns in the order of the labels.
        labels: the K quantities.

    Returns:
        (N,) quantities.
    """
    values = np.asarray(labels, dtype=np.int64)
    means = np.asarray(probabilities, dtype=np.float64) @ values
    return np.asarray(values[np.abs(means[:, None] - values).argmin(1)])


def floors(quantities: NDArray[Any], labels: Sequence[int]) -> dict[str, float]:
    """Return the best that one and the same answer for every bin reaches, for each score.

    Accuracy and macro-F1 are those of the most frequent quantity; rmse and mae are least for the quantities nearest to
    the mean and the median. The constant is chosen on these very bins: no constant does better on them.

    Args:
        quantities: (N,) recorded quantities.
        labels: the K quantities.

    Returns:
        accuracy, macro_f1, rmse, mae (items) and within_1.

    Raises:
        StocktakeError: a quantity is none of the labels.
    """
    k = len(labels)
    counts = np.bincount(class_indices(labels, quantities), minlength=k)
    constants = scores(np.eye(k)[:, None, :] * counts[:, None], labels)  # a confusion matrix for each label
    return {
        name: float(np.min(constants[name]) if name in LOWER_IS_BETTER else np.max(constants[name]))
        for name in ("accuracy", "macro_f1", "rmse", "mae", "within_1")
    }


def cross_entropy(probabilities: NDArray[Any], quantities: NDArray[Any], labels: Sequence[int]) -> float:
    """Return the mean negative log probability (nats) of the recorded quantity.

    scikit-learn's `log_loss`: a probability of 0 counts as the smallest step of a 64-bit float, so one certain
    mistake costs 36 nats and not infinity.

    Args:
        probabilities: (N, K), each row summing to 1, columns in the order of the labels.
        quantities: (N,) recorded quantities.
        labels: the K quantities.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: the shapes do not fit, or N is 0.
    """
    from sklearn.metrics import log_loss

    truth = class_indices(labels, quantities)
    return float(log_loss(truth, np.asarray(probabilities, dtype=np.float64), labels=range(len(labels))))


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)
