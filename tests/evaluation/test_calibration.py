from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from sklearn.base import BaseEstimator, ClassifierMixin
from torchmetrics.functional.classification import multiclass_calibration_error

from stocktake.evaluation.calibration import (
    Calibration,
    conformal_threshold,
    coverage,
    expected_calibration_error,
    fit_calibration,
    reliability,
    temperature_scale,
)
from stocktake.evaluation.metrics import cross_entropy

LABELS = (1, 2, 3, 4, 5)


def drawn(n: int, seed: int, sharpness: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """(n, 5) probabilities and (n,) quantities that follow them exactly: a perfectly calibrated model."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(5, sharpness), n)
    return probabilities, np.array([rng.choice(LABELS, p=row) for row in probabilities])


@settings(max_examples=25)
@given(temperature=st.floats(0.4, 4.0), seed=st.integers(0, 1000))
def test_a_distorting_temperature_is_found(temperature: float, seed: int) -> None:
    probabilities, quantities = drawn(3000, seed)
    fitted = fit_calibration(temperature_scale(probabilities, temperature), quantities, LABELS)
    assert fitted.temperature == pytest.approx(1 / temperature, rel=0.15)
    assert fitted.n == 3000


def test_no_other_temperature_has_a_smaller_loss() -> None:
    probabilities, quantities = drawn(400, 3)
    sharp = temperature_scale(probabilities, 0.5)
    best = fit_calibration(sharp, quantities, LABELS).temperature
    losses = {
        t: cross_entropy(temperature_scale(sharp, t), quantities, LABELS) for t in (best, *np.geomspace(0.1, 15, 60))
    }
    assert min(losses, key=losses.__getitem__) == pytest.approx(best, rel=0.03)


@settings(max_examples=50)
@given(temperature=st.floats(0.2, 8.0), seed=st.integers(0, 1000))
def test_tempering_keeps_the_order_and_can_be_undone(temperature: float, seed: int) -> None:
    probabilities, _ = drawn(20, seed, sharpness=2.0)
    soft = temperature_scale(probabilities, temperature)
    np.testing.assert_allclose(soft.sum(1), 1)
    np.testing.assert_array_equal(soft.argmax(1), probabilities.argmax(1))
    np.testing.assert_allclose(temperature_scale(soft, 1 / temperature), probabilities, atol=1e-9)


def test_a_certain_answer_stays_finite() -> None:
    assert np.isfinite(temperature_scale(np.array([[1.0, 0.0, 0.0]]), 3.0)).all()


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose probabilities are its input."""

    classes_ = np.arange(5)

    def fit(self, X, y):
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, X):
        return np.asarray(X)

    def predict(self, X):
        return np.asarray(X).argmax(1)


@pytest.mark.parametrize("n", [30, 99, 100, 717, 719])
@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_sets_are_those_of_mapie(n: int, level: float) -> None:
    probabilities, quantities = drawn(n, n)
    others, _ = drawn(500, n + 1)
    peer = SplitConformalClassifier(Given(), confidence_level=level, conformity_score="lac", prefit=True)
    _, expected = peer.conformalize(probabilities, quantities - 1).predict_set(others)
    threshold = conformal_threshold(probabilities[np.arange(n), quantities - 1], level)
    np.testing.assert_array_equal(others >= threshold, expected[:, :, 0])


def test_too_few_bins_for_the_level_put_every_quantity_in_every_set() -> None:
    assert conformal_threshold(np.array([0.9, 0.8, 0.7]), 0.9) == 0.0
    assert Calibration(set_threshold=0.0).sets(np.array([[0.7, 0.3, 0.0]])).all()


def test_a_set_holds_the_likeliest_quantity_even_below_the_threshold() -> None:
    sets = Calibration(set_threshold=0.6).sets(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))
    np.testing.assert_array_equal(sets, [[True, False, False], [False, False, True]])


def test_sets_cover_other_bins_of_the_same_kind_at_the_level() -> None:
    shares = []
    for seed in range(20):
        calibration = fit_calibration(*drawn(700, seed), LABELS)
        probabilities, quantities = drawn(2000, 100 + seed)
        covered, interval = coverage(
            calibration.sets(calibration.apply(probabilities)), quantities, LABELS, np.arange(2000), seed=seed
        )
        assert interval.low <= covered <= interval.high
        shares.append(covered)
    assert np.mean(shares) == pytest.approx(0.9, abs=0.015)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 300), temperature=st.floats(0.3, 3))
def test_the_calibration_error_is_that_of_torchmetrics(seed: int, n: int, temperature: float) -> None:
    probabilities, quantities = drawn(n, seed)
    probabilities = temperature_scale(probabilities, temperature).astype(np.float32).astype(np.float64)
    table = reliability(probabilities, quantities, LABELS)
    assert table["n"].sum() == n
    expected = multiclass_calibration_error(
        torch.tensor(probabilities, dtype=torch.float32), torch.tensor(quantities - 1), 5, n_bins=15, norm="l1"
    )
    assert expected_calibration_error(table) == pytest.approx(float(expected), abs=2e-3)


def test_described_and_read_again() -> None:
    described = {"temperature": 1.5, "set_threshold": 0.1, "set_level": 0.9, "n": 7, "fitted_on": "val"}
    assert Calibration.read(described) == Calibration(1.5, 0.1, 0.9, 7)
    assert Calibration.read({"temperature": 2.0}) == Calibration(2.0)
