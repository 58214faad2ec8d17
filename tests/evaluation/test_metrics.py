"""The scores are scikit-learn's, whatever is absent, and follow from summed confusion matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import metrics as sk

from stocktake.errors import StocktakeError
from stocktake.evaluation.metrics import (
    class_indices,
    confusion_matrix,
    cross_entropy,
    expected_quantities,
    floors,
    scores,
)

TASKS = st.sampled_from([tuple(range(6)), tuple(range(1, 6)), tuple(range(2, 8)), (3,), (0, 1), (5, 1, 9)])


@st.composite
def counted(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """A task, recorded and counted quantities; classes are often absent from one or both."""
    labels = draw(TASKS)
    n = draw(st.integers(1, 40))
    recorded = draw(st.lists(st.sampled_from(labels), min_size=1, max_size=3))
    q = draw(st.lists(st.sampled_from(recorded), min_size=n, max_size=n))
    p = draw(st.lists(st.sampled_from(labels), min_size=n, max_size=n))
    return labels, np.array(q), np.array(p)


@pytest.mark.filterwarnings("ignore:A single label")
@given(counted())
def test_equal_to_scikit_learn(case):
    labels, q, p = case
    confusion = confusion_matrix(labels, q, p)
    assert_array_equal(confusion, sk.confusion_matrix(q, p, labels=labels))
    ours = scores(confusion, labels)
    options = {"labels": labels, "average": "macro", "zero_division": 0}
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(q, p))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(q, p, **options))
    assert ours["macro_precision"] == pytest.approx(sk.precision_score(q, p, **options))
    assert ours["macro_recall"] == pytest.approx(sk.recall_score(q, p, **options))
    assert ours["rmse"] == pytest.approx(math.sqrt(sk.mean_squared_error(q, p)))
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(q, p))
    assert ours["within_1"] == pytest.approx(np.mean(abs(q - p) <= 1))
    _, recall, _, _ = sk.precision_recall_fscore_support(q, p, labels=labels, zero_division=0)
    assert_allclose([ours[f"recall_{label}"] for label in labels], recall)
    assert all(isinstance(value, float) for value in ours.values())


@given(counted(), st.integers(1, 5))
def test_matrices_of_parts_sum_to_the_whole(case, parts):
    labels, q, p = case
    matrices = [
        confusion_matrix(labels, a, b) for a, b in zip(np.array_split(q, parts), np.array_split(p, parts), strict=True)
    ]
    assert scores(np.sum(matrices, axis=0), labels) == scores(confusion_matrix(labels, q, p), labels)


def test_many_matrices_are_scored_at_once():
    rng = np.random.default_rng(0)
    labels = (2, 3, 4)
    many = rng.integers(0, 9, (4, 5, 3, 3))
    together = scores(many, labels)
    for index in np.ndindex(4, 5):
        alone = scores(many[index], labels)
        for name, value in alone.items():
            assert together[name].shape == (4, 5)
            assert together[name][index] == pytest.approx(value)


def test_published_matrix():
    """The matrix and the scores that a published run on 1,049 test bins printed."""
    confusion = np.array(
        [[42, 59, 18, 4, 1], [14, 87, 105, 20, 5], [9, 75, 119, 50, 15], [5, 36, 106, 65, 26], [4, 27, 81, 53, 23]]
    )
    ours = scores(confusion, range(1, 6))
    assert ours["accuracy"] == pytest.approx(0.320305, abs=5e-7)
    assert ours["macro_f1"] == pytest.approx(0.316838, abs=5e-7)
    assert ours["macro_precision"] == pytest.approx(0.363682, abs=5e-7)
    assert ours["macro_recall"] == pytest.approx(0.310963, abs=5e-7)


@settings(max_examples=20)
@given(counted())
def test_floors_are_the_best_of_all_constants(case):
    labels, q, _ = case
    constants = [(np.full(len(q), label), label) for label in labels]
    ours = floors(q, labels)
    f1 = {"labels": labels, "average": "macro", "zero_division": 0}
    assert ours["accuracy"] == pytest.approx(max(sk.accuracy_score(q, p) for p, _ in constants))
    assert ours["macro_f1"] == pytest.approx(max(sk.f1_score(q, p, **f1) for p, _ in constants))
    assert ours["rmse"] == pytest.approx(min(sk.root_mean_squared_error(q, p) for p, _ in constants))
    assert ours["mae"] == pytest.approx(min(sk.mean_absolute_error(q, p) for p, _ in constants))
    assert ours["within_1"] == pytest.approx(max(np.mean(abs(q - label) <= 1) for _, label in constants))


@given(st.integers(0, 1000), TASKS)
def test_decoding_by_expectation_has_the_least_expected_squared_error(seed, labels):
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(labels)), 20)
    error = (shares @ (np.array(labels)[:, None] - np.array(labels)) ** 2).min(1)  # of the best label for each row
    decoded = expected_quantities(shares, labels)
    assert_allclose((shares * (np.array(labels) - decoded[:, None]) ** 2).sum(1), error, atol=1e-9)


def test_the_two_decodings_differ():
    shares = np.array([[0.5, 0.1, 0.4], [0.9, 0.1, 0.0], [0.0, 0.3, 0.7]])
    assert expected_quantities(shares, (0, 1, 2)).tolist() == [1, 0, 2]
    assert expected_quantities(shares, (3, 4, 5)).tolist() == [4, 3, 5]


def test_no_bins_have_no_score():
    assert all(math.isnan(value) for value in scores(np.zeros((2, 2)), (0, 1)).values())


def test_a_quantity_outside_of_the_task_is_named():
    with pytest.raises(StocktakeError, match=r"\b7\b"):
        confusion_matrix((1, 2), np.array([1, 2]), np.array([1, 7]))
    with pytest.raises(StocktakeError, match=r"\b0\b"):
        class_indices((1, 2), np.array([0]))


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError):
        confusion_matrix((1, 2), np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError):
        scores(np.zeros((3, 3)), (1, 2))
    with pytest.raises(ValueError):
        cross_entropy(np.ones((2, 3)) / 3, np.array([1, 2]), (1, 2))


@given(st.integers(0, 1000), TASKS.filter(lambda labels: len(labels) > 1))
def test_cross_entropy_is_the_mean_negative_log_probability(seed, labels):
    rng = np.random.default_rng(seed)
    q = rng.choice(labels, 20)
    probabilities = rng.dirichlet(np.ones(len(labels)), 20)
    recorded = probabilities[np.arange(20), class_indices(labels, q)]
    assert cross_entropy(probabilities, q, labels) == pytest.approx(-np.log(recorded).mean())


def test_a_certain_mistake_costs_much_but_not_infinitely():
    assert 36 < cross_entropy(np.array([[1.0, 0.0]]), np.array([2]), (1, 2)) < 37
