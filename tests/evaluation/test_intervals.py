"""Bootstrap intervals: reproducible, by groups, and with the coverage that they claim."""

from __future__ import annotations

import numpy as np
import pytest

from stocktake.errors import StocktakeError
from stocktake.evaluation import intervals
from stocktake.evaluation.intervals import bootstrap_intervals, paired_differences, percentile_interval
from stocktake.evaluation.metrics import confusion_matrix, scores

LABELS = (1, 2, 3, 4, 5)
PINNED = (0.48549675811804294, 0.6560521041697532)
PINNED_DIFFERENCE = (-0.5145032418819571, -0.34394789583024676)


def simulated(n: int, seed: int, right: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Recorded quantities, and counts that are right with the given probability and else uniform."""
    rng = np.random.default_rng(seed)
    q = rng.choice(LABELS, n)
    return q, np.where(rng.random(n) < right, q, rng.choice(LABELS, n))


def width(interval: intervals.Interval) -> float:
    return interval.high - interval.low


def test_deterministic_and_around_the_point():
    q, p = simulated(400, 0)
    groups = np.arange(400) // 2
    first = bootstrap_intervals(LABELS, q, p, groups, seed=3)
    assert first == bootstrap_intervals(LABELS, q, p, groups, seed=3)
    assert first != bootstrap_intervals(LABELS, q, p, groups, seed=4)
    point = scores(confusion_matrix(LABELS, q, p), LABELS)
    assert set(first) == set(point)
    for name, (low, high) in first.items():
        assert low < point[name] < high, name


def test_same_as_drawing_groups_one_by_one():
    """The multinomial shortcut against the plain algorithm, on groups of unlike sizes."""
    q, p = simulated(120, 1)
    rng = np.random.default_rng(1)
    groups = np.array([f"bin-{g}" for g in rng.integers(0, 50, 120)])
    ours = bootstrap_intervals(LABELS, q, p, groups, resamples=1500)
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    drawn = []
    for _ in range(1500):
        take = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        drawn.append(confusion_matrix(LABELS, q[take], p[take]))
    plain = scores(np.array(drawn), LABELS)
    for name in ("accuracy", "macro_f1", "rmse", "within_1"):
        assert ours[name] == pytest.approx(np.quantile(plain[name], [0.025, 0.975]), abs=0.02), name


def test_duplicates_in_groups_do_not_make_it_surer():
    q, p = simulated(200, 2)
    alone = bootstrap_intervals(LABELS, q, p, np.arange(200))
    repeated = [np.repeat(a, 4) for a in (q, p, np.arange(200))]
    naive = bootstrap_intervals(LABELS, *repeated[:2], np.arange(800))
    grouped = bootstrap_intervals(LABELS, *repeated)
    assert width(naive["accuracy"]) < 0.6 * width(alone["accuracy"])
    assert width(grouped["accuracy"]) == pytest.approx(width(alone["accuracy"]), rel=0.15)


def test_covers_the_truth_about_as_often_as_promised():
    """Accuracy of the simulated counter is 0.5 + 0.5 / 5 = 0.6; looks in groups of 3 are right together."""
    covered = 0
    for seed in range(200):
        q, p = (np.repeat(a, 3) for a in simulated(100, seed))
        low, high = bootstrap_intervals(LABELS, q, p, np.arange(300) // 3, resamples=400, seed=seed)["accuracy"]
        covered += low <= 0.6 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_paired_difference_is_surer_than_two_intervals():
    q, reference = simulated(600, 7)
    rng = np.random.default_rng(7)
    better = np.where(rng.random(600) < 0.1, q, reference)
    groups = np.arange(600) // 2
    differences = paired_differences(LABELS, q, better, reference, groups, seed=1)["accuracy"]
    gain = percentile_interval(differences)
    point = np.mean(better == q) - np.mean(reference == q)
    assert 0 < gain.low < point < gain.high
    assert width(gain) < 0.7 * width(bootstrap_intervals(LABELS, q, better, groups)["accuracy"])
    loss = percentile_interval(paired_differences(LABELS, q, reference, better, groups, seed=1)["accuracy"])
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low), abs=0.01)
    again = paired_differences(LABELS, q, better, reference, groups, seed=1)["accuracy"]
    np.testing.assert_array_equal(again, differences)


def test_paired_difference_agrees_with_scores_of_each_resample():
    """macro-F1 is no mean over bins, so the paired path is checked against drawing bins one by one."""
    q, ours = simulated(80, 8)
    _, theirs = simulated(80, 9, right=0.2)
    theirs = np.where(np.random.default_rng(2).random(80) < 0.5, theirs, q)
    interval = percentile_interval(
        paired_differences(LABELS, q, ours, theirs, np.arange(80), resamples=1500)["macro_f1"]
    )
    take = np.random.default_rng(3).integers(0, 80, (1500, 80))
    both = [
        scores(np.array([confusion_matrix(LABELS, q[t], p[t]) for t in take]), LABELS)["macro_f1"]
        for p in (ours, theirs)
    ]
    assert interval == pytest.approx(np.quantile(both[0] - both[1], [0.025, 0.975]), abs=0.02)


def test_a_model_does_not_differ_from_itself():
    q, p = simulated(50, 10)
    for differences in paired_differences(LABELS, q, p, p, np.arange(50)).values():
        assert not differences.any()


def test_figures_are_pinned():
    """Published figures are compared to the digit: a change of the draws changes all of them."""
    q, p = simulated(120, 11)
    groups = np.arange(120) // 2
    assert bootstrap_intervals(LABELS, q, p, groups)["macro_f1"] == pytest.approx(PINNED, abs=1e-12)
    difference = percentile_interval(paired_differences(LABELS, q, p, q, groups)["macro_f1"])
    assert difference == pytest.approx(PINNED_DIFFERENCE, abs=1e-12)


def test_arguments_that_do_not_fit():
    one, empty = np.array([1]), np.array([], dtype=int)
    for q, p, groups in ((empty, empty, empty), (one, np.array([1, 2]), one), (one, one, np.array(["a", "b"]))):
        with pytest.raises(ValueError):
            bootstrap_intervals(LABELS, q, p, groups)
    with pytest.raises(ValueError):
        bootstrap_intervals(LABELS, one, one, one, level=95)
    with pytest.raises(StocktakeError, match="9"):
        bootstrap_intervals(LABELS, one, np.array([9]), one)
