"""Calibrated probabilities: temperature scaling, calibration error, conformal sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.evaluation.intervals import Interval, bootstrap_intervals
from stocktake.evaluation.metrics import class_indices, cross_entropy

Probabilities = NDArray[np.float64]
SET_LEVEL = 0.9
"""The share of photos whose conformal set is to hold the recorded quantity."""
BINS = 15
"""Of the calibration error and its diagram, as in Guo et al. 2017."""
_LARGEST_TEMPERATURE = 20.0


@dataclass(frozen=True)
class Calibration:
    """How a model's probabilities become calibrated ones; fitted on val."""

    temperature: float = 1.0
    """Divides the logits."""
    set_threshold: float = 0.0
    """A quantity with at least this calibrated probability belongs to the conformal set."""
    set_level: float = SET_LEVEL
    n: int = 0
    """Bins it was fitted on."""

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Calibration:
        """Read the part of a model.json; fields that it lacks have their defaults."""
        return cls(**{field.name: described[field.name] for field in fields(cls) if field.name in described})

    def apply(self, probabilities: Probabilities) -> Probabilities:
        """Return the (N, K) calibrated probabilities of the model's own."""
        return temperature_scale(probabilities, self.temperature)

    def sets(self, calibrated: Probabilities) -> NDArray[np.bool_]:
        """Return (N, K): which quantities each conformal set holds; the likeliest always."""
        members = calibrated >= self.set_threshold
        members[np.arange(len(members)), calibrated.argmax(1)] = True
        return members


def fit_calibration(probabilities: Probabilities, quantities: NDArray[Any], labels: Sequence[int]) -> Calibration:
    """Fit temperature and conformal threshold to one model's (N, K) probabilities and the (N,) recorded quantities.

    Temperature scaling: Guo et al., On Calibration of Modern Neural Networks (2017), sec. 4.2. Sets: split conformal
    prediction with 1 - p(recorded quantity) as the score ("least ambiguous"): Sadinle, Lei & Wasserman (2019). The
    threshold is fitted to the calibrated probabilities of the bins that the temperature was fitted on, one number to
    many bins; how many sets hold the recorded quantity is therefore measured on test.
    """
    from scipy.optimize import minimize_scalar

    reach = math.log(_LARGEST_TEMPERATURE)
    best = minimize_scalar(
        lambda log: cross_entropy(temperature_scale(probabilities, math.exp(log)), quantities, labels),
        bounds=(-reach, reach),
        method="bounded",
        options={"xatol": 1e-5},
    )
    temperature = float(math.exp(best.x))
    calibrated = temperature_scale(probabilities, temperature)
    truth = class_indices(labels, quantities)
    threshold = conformal_threshold(calibrated[np.arange(len(truth)), truth])
    return Calibration(temperature, threshold, SET_LEVEL, len(truth))


def temperature_scale(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Return (N, K) softmax(logits / temperature) from softmax(logits): the logs differ by a constant a row only."""
    from scipy.special import softmax

    logs = np.log(np.clip(probabilities, np.finfo(np.float64).tiny, 1.0))
    return np.asarray(softmax(logs / temperature, axis=1))


def conformal_threshold(recorded: NDArray[np.float64], level: float = SET_LEVEL) -> float:
    """Return the least probability that a quantity of a conformal set has.

    The k-th smallest of the (N,) probabilities of the recorded quantities, k = floor((N + 1)(1 - level)); 0, every
    quantity in every set, where there are too few bins for the level. MAPIE's classifier does not expose this number;
    a test compares the sets with MAPIE's.
    """
    k = math.floor((len(recorded) + 1) * (1 - level) + 1e-9)
    return float(np.sort(recorded)[k - 1]) if k >= 1 else 0.0


def reliability(
    probabilities: Probabilities, quantities: NDArray[Any], labels: Sequence[int], bins: int = BINS
) -> pd.DataFrame:
    """Tabulate how often predictions of about one confidence are right.

    Returns:
        A row for each of the equally wide confidence bins: low, high, n, confidence (mean), accuracy; the means are
        nan where n is 0.
    """
    edges = np.linspace(0, 1, bins + 1)
    right = probabilities.argmax(1) == class_indices(labels, quantities)
    rows = pd.DataFrame({"confidence": probabilities.max(1), "accuracy": right.astype(np.float64)})
    place = np.clip(np.searchsorted(edges, rows["confidence"], side="left") - 1, 0, bins - 1)
    means = rows.groupby(place).mean().reindex(range(bins))
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n": np.bincount(place, minlength=bins)}).join(means)


def expected_calibration_error(table: pd.DataFrame) -> float:
    """Return the mean gap of confidence and accuracy in a reliability table, weighted by n (Naeini et al. 2015)."""
    gaps = (table["confidence"] - table["accuracy"]).abs().fillna(0.0)
    return float((gaps * table["n"]).sum() / max(int(table["n"].sum()), 1))


def coverage(
    sets: NDArray[np.bool_], quantities: NDArray[Any], labels: Sequence[int], groups: NDArray[Any], *, seed: int = 0
) -> tuple[float, Interval]:
    """Return the share of sets that hold the recorded quantity, with its bootstrap interval over groups."""
    truth = class_indices(labels, quantities)
    hit = sets[np.arange(len(truth)), truth].astype(np.int64)
    interval = bootstrap_intervals((0, 1), np.ones_like(hit), hit, groups, seed=seed)["accuracy"]
    return float(hit.mean()), interval
