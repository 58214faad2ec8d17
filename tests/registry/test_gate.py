"""Each rule of the gate by its value, and what holds for any predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stocktake.config.versions import GateConfig
from stocktake.registry.gate import (
    GateResult,
    Reference,
    Rule,
    ServingStats,
    check_serving,
    compare_predictions,
    comparison_key,
    run_gate,
)
from stocktake.registry.split_uses import FAMILY_LEVEL, SplitUse

LABELS = (1, 2, 3)
CHECK = {"passed": True, "photos": 64, "engines": {"onnxruntime 1 f32": {}}}
FIRST = SplitUse()
SERVED = ServingStats(latency_ms=10, size_mb=20, engine="openvino f32", check=CHECK)


def table(quantities: Any, predicted: Any, groups: Any = None) -> pd.DataFrame:
    ids = [f"{number:05d}" for number in range(len(quantities))]
    columns = {"id": ids, "group": ids if groups is None else groups, "quantity": quantities}
    columns |= {"predicted": predicted, "expected": predicted}
    return pd.DataFrame({**columns, **{f"p_{label}": 1 / 3 for label in LABELS}})


def better_and_worse(n: int = 120, wrong: int = 40) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All right, and `wrong` of n taken for the next quantity."""
    quantities = np.resize(LABELS, n)
    predicted = quantities.copy()
    predicted[:wrong] = predicted[:wrong] % 3 + 1
    return table(quantities, quantities), table(quantities, predicted)


def judged(
    challenger: pd.DataFrame | None, references: list[Reference], limits: GateConfig | None = None, reason: str = ""
) -> GateResult:
    return run_gate(challenger, references, SERVED, limits or GateConfig(), lambda _: FIRST, reason=reason)


def named(rules: Any) -> dict[str, Rule]:
    return {rule.name.split(" ")[0]: rule for rule in rules}


def champion(predictions: pd.DataFrame | None, **settings: Any) -> Reference:
    return Reference("champion m/1", predictions, **settings)


def test_a_better_model_passes_and_its_figures_are_returned() -> None:
    good, bad = better_and_worse()
    result = judged(good, [champion(bad)])
    assert result.passed
    assert result.failed == []
    rules = named(result.rules)
    assert list(rules) == ["same", "gain", "largest", "latency", "size", "export"]
    figures = result.figures
    assert figures["macro_f1"] == 1
    assert figures["n"] == 120
    assert figures["gain"] == pytest.approx(1 - figures["reference_macro_f1"])
    assert 0 < figures["gain_low"] < figures["gain"] < figures["gain_high"]
    assert 0 < figures["gain_bound"] < figures["gain"]
    assert rules["gain"].shown_value == f"{figures['gain_bound']:+.3f}"
    assert rules["gain"].shown_limit == "above 0.000"
    assert rules["gain"].margin == f"by {figures['gain_bound']:.3f}"
    assert str(rules["latency"]).startswith("latency of one photo: 10.0 ms (below 100.0 ms; by 90.0 ms), median")


def test_a_worse_model_is_rejected_by_how_much() -> None:
    good, bad = better_and_worse()
    rules = named(judged(bad, [champion(good)]).rules)
    assert [name for name, rule in rules.items() if not rule.passed] == ["gain", "largest"]
    assert rules["gain"].value is not None
    assert rules["gain"].margin == f"missed by {-rules['gain'].value:.3f}"


def test_the_margin_that_is_asked_for_is_the_intervals_lower_end() -> None:
    good, bad = better_and_worse()
    _, figures = compare_predictions(good, champion(bad), GateConfig(), FIRST)
    bound = figures["gain_bound"]
    for gain, passes in ((bound - 1e-6, True), (bound, False), (figures["gain"], False)):
        rules, _ = compare_predictions(good, champion(bad), GateConfig(min_gain=gain), FIRST)
        assert named(rules)["gain"].passed is passes


def test_groups_are_the_unit_of_the_interval() -> None:
    """Forty snapshots of four bins say less than forty bins."""
    good, bad = better_and_worse(120, 40)
    alone = compare_predictions(good, champion(bad), GateConfig(), FIRST)[1]
    grouped = compare_predictions(good.assign(group=np.arange(120) // 12), champion(bad), GateConfig(), FIRST)[1]
    assert grouped["gain"] == alone["gain"]
    assert grouped["gain_bound"] < alone["gain_bound"]


def recalls(lost: int, n: int = 40) -> tuple[pd.DataFrame, Reference]:
    """A challenger that takes `lost` of n bins of 1 for 2, and a champion that knows 1 only."""
    quantities = np.repeat(LABELS, n)
    ours, theirs = quantities.copy(), quantities.copy()
    ours[:lost] = 2
    theirs[n:] = 1
    return table(quantities, ours), champion(table(quantities, theirs))


def test_a_recall_that_fell_by_chance_passes_and_one_that_certainly_fell_refuses() -> None:
    """5 of 40 is 12.5 points, more than the 10 that may be lost, and so it may be of a true fall of 5."""
    verdicts = {}
    for lost in (0, 5, 20):
        rules, figures = compare_predictions(*recalls(lost), GateConfig(), FIRST)
        rule = named(rules)["largest"]
        assert rule.value == figures["recall_drop_low"] <= figures["recall_drop"] == pytest.approx(lost / 40)
        assert rule.limit == 0.1
        verdicts[lost] = rule.passed
    assert verdicts == {0: True, 5: True, 20: False}
    assert named(compare_predictions(*recalls(20), GateConfig(max_recall_drop=0.5), FIRST)[0])["largest"].passed
    same_share = named(compare_predictions(*recalls(200, 400), GateConfig(), FIRST)[0])["largest"]
    assert same_share.value > named(compare_predictions(*recalls(20), GateConfig(), FIRST)[0])["largest"].value


def test_snapshots_of_one_bin_do_not_make_a_fall_of_recall_certain() -> None:
    challenger, reference = recalls(12)
    assert not named(compare_predictions(challenger, reference, GateConfig(), FIRST)[0])["largest"].passed
    few_groups = challenger.assign(group=np.arange(120) // 12)
    assert named(compare_predictions(few_groups, reference, GateConfig(), FIRST)[0])["largest"].passed


def test_each_use_without_a_gain_makes_the_next_stricter() -> None:
    good, bad = better_and_worse(wrong=6)
    bounds = [
        compare_predictions(good, champion(bad), GateConfig(), SplitUse(number + 1, number))[1]["gain_bound"]
        for number in range(20)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 0 > bounds[-1]
    assert sum(SplitUse(k + 1, k).level for k in range(100_000)) == pytest.approx(FAMILY_LEVEL, rel=1e-4)
    assert SplitUse(9, 0).level == SplitUse(1, 0).level, "uses that showed a gain cost nothing"


def test_the_detectable_gain_is_larger_on_fewer_bins_and_at_stricter_levels() -> None:
    """Four times the bins: half the standard error, and half the gain."""

    def detectable(n: int, use: SplitUse = FIRST, min_gain: float = 0.0) -> float:
        good, bad = better_and_worse(n, n // 3)
        return float(compare_predictions(good, champion(bad), GateConfig(min_gain), use)[1]["detectable_gain"])

    assert detectable(480) == pytest.approx(detectable(120) / 2, rel=0.07)
    assert detectable(120, SplitUse(20, 19)) > 1.5 * detectable(120)
    assert detectable(120, min_gain=0.1) == pytest.approx(detectable(120) + 0.1)


@pytest.mark.parametrize("metric", ["rmse", "rmse_expected"])
def test_by_rmse_the_lower_one_is_the_better(metric: Any) -> None:
    """Both are wrong as often; one of them is off by two. In the other decoding there is no difference."""
    truth = np.repeat((1, 3), 60)
    near, far = truth.copy(), truth.copy()
    near[:30] = 2
    far[:30] = 3
    column, other = ("predicted", "expected") if metric == "rmse" else ("expected", "predicted")
    ours, theirs = (table(truth, counted).assign(**{column: counted, other: truth}) for counted in (near, far))
    forth, back = (
        compare_predictions(one, champion(two), GateConfig(metric=metric), FIRST)
        for one, two in ((ours, theirs), (theirs, ours))
    )
    assert named(forth[0])["gain"].passed
    assert not named(back[0])["gain"].passed
    assert forth[1][metric] == pytest.approx(0.5)
    assert forth[1]["gain"] == pytest.approx(0.5) == pytest.approx(-back[1]["gain"])


def test_a_class_of_few_test_bins_is_warned_about() -> None:
    quantities = np.repeat(LABELS, (30, 29, 60))
    predictions = table(quantities, quantities)
    (warning,) = (line for line in judged(predictions, [champion(predictions)]).remarks if "warning" in line)
    assert "2 (29 bins)" in warning
    assert "1 (" not in warning
    good, bad = better_and_worse()
    assert not any("warning" in line for line in judged(good, [champion(bad)]).remarks)


def test_a_use_is_counted_once_and_only_where_all_bins_pair_up() -> None:
    good, bad = better_and_worse()
    counted: list[int] = []

    def count_use(bins: pd.DataFrame) -> SplitUse:
        counted.append(len(bins))
        return FIRST

    two = [Reference("majority baseline", bad), Reference("frozen baseline", bad)]
    result = run_gate(good, two, SERVED, GateConfig(), count_use)
    assert (counted, result.use, result.has_gain) == ([120], FIRST, True)
    one_missing = [two[0], Reference("frozen baseline", None, "there is no run")]
    result = run_gate(good, one_missing, SERVED, GateConfig(), count_use)
    assert (counted, result.use, result.has_gain) == ([120], None, False)
    assert not any("gain" in name for name in result.figures), "nothing of the split is looked at"
    assert not run_gate(bad, [champion(good)], SERVED, GateConfig(), count_use).has_gain


def test_one_comparison_has_one_key() -> None:
    good, bad = better_and_worse()
    key = comparison_key(good, [champion(bad)], "macro_f1")
    assert key == comparison_key(good.sample(frac=1, random_state=1), [champion(bad)], "macro_f1")
    others = [(bad, good, "macro_f1"), (good, bad, "rmse"), (good, bad.assign(predicted=1), "macro_f1")]
    assert key not in {comparison_key(ours, [champion(theirs)], metric) for ours, theirs, metric in others}


@pytest.mark.parametrize(
    ("served", "failed"),
    [
        (ServingStats(100.0, 20, "e", CHECK), ["latency"]),
        (ServingStats(99.9, 20, "e", CHECK), []),
        (ServingStats(float("nan"), 20, "e", CHECK), ["latency"]),
        (ServingStats(10, 200.0, "e", CHECK), ["size"]),
        (ServingStats(10, 20, "e", None), ["export"]),
        (ServingStats(10, 20, "e", {"passed": False, "photos": 64}), ["export"]),
        (ServingStats(10, 20, "e", {"passed": "yes"}), ["export"]),
        (ServingStats(200, 300, "e", {}), ["latency", "size", "export"]),
    ],
)
def test_how_it_is_served(served: ServingStats, failed: list[str]) -> None:
    rules = named(check_serving(served, GateConfig()))
    assert [name for name, rule in rules.items() if not rule.passed] == failed


def test_bins_that_do_not_pair_up_refuse() -> None:
    good, bad = better_and_worse()
    hint = "stocktake evaluate --model models:/m/1"
    changed = bad.assign(quantity=bad["quantity"].where(bad["id"] != "00007", 3))
    for theirs, note in (
        (bad.iloc[1:], "1 of 120 bins are not in its 119, 0 of its are not here"),
        (pd.concat([bad, bad.iloc[:1]]), "a bin is there twice"),
        (changed, "1 bins have another recorded quantity there"),
        (None, "of other data"),
    ):
        reason = note if theirs is None else ""
        result = judged(good, [champion(theirs, reason=reason, hint=hint)])
        assert [(rule.note, rule.hint) for rule in result.failed] == [(note, hint)]
        assert "gain" not in result.figures
    for bins, note in ((good.iloc[:0], "there are no bins"), (good.assign(group="g"), "all its bins are one group")):
        assert judged(bins, [champion(bins)]).failed[0].note.startswith(note)


def test_without_predictions_of_its_own_nothing_passes() -> None:
    _, bad = better_and_worse()
    result = judged(None, [champion(bad)], reason="its run is gone")
    assert [str(rule) for rule in result.failed] == ["same test split as the champion m/1: its run is gone"]


def test_a_first_champion_is_held_against_both_baselines_and_may_forget_what_a_majority_class_knows() -> None:
    good, bad = better_and_worse()
    most = table(good["quantity"], np.full(120, 3))
    references = [
        Reference("majority baseline", most, guards_recall=False),
        Reference("frozen baseline", bad, guards_recall=False),
    ]
    result = judged(good, references)
    assert result.passed
    assert not any(rule.name.startswith("largest") for rule in result.rules)
    assert result.figures["majority baseline: gain"] > result.figures["frozen baseline: gain"] > 0
    assert not judged(bad, [references[0], Reference("frozen baseline", good)]).passed


columns = st.integers(3, 30).flatmap(
    lambda n: st.tuples(*(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n) for _ in range(3)))
)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(columns)
def test_no_model_beats_itself_and_no_two_beat_each_other(drawn: tuple[list[int], ...]) -> None:
    quantities, first, second = drawn
    ours, theirs = table(quantities, first), table(quantities, second)
    same = judged(ours, [champion(ours)])
    assert [rule.name for rule in same.failed] == ["gain over the champion m/1"]
    forth, back = (
        compare_predictions(a, champion(b), GateConfig(), FIRST) for a, b in ((ours, theirs), (theirs, ours))
    )
    assert not (named(forth[0])["gain"].passed and named(back[0])["gain"].passed)
    assert forth[1]["gain"] == pytest.approx(-back[1]["gain"])


@few
@given(columns, st.integers(0, 2**32 - 1))
def test_the_order_of_bins_does_not_matter(drawn: tuple[list[int], ...], seed: int) -> None:
    quantities, first, second = drawn
    ours, theirs = table(quantities, first), table(quantities, second)
    shuffled = theirs.sample(frac=1, random_state=seed)
    forth, again = (
        compare_predictions(ours, champion(predictions), GateConfig(), FIRST) for predictions in (theirs, shuffled)
    )
    assert forth == again


@few
@given(columns, st.floats(-1, 1), st.floats(0, 1), st.floats(0, 200), st.floats(0, 300))
def test_a_stricter_gate_lets_no_one_more_pass(
    drawn: tuple[list[int], ...], gain: float, drop: float, latency: float, size: float
) -> None:
    quantities, first, second = drawn

    def passes(limits: GateConfig) -> GateResult:
        return judged(table(quantities, first), [champion(table(quantities, second))], limits)

    loose = passes(GateConfig(gain, drop, latency, size))
    strict = passes(GateConfig((gain + 1) / 2, drop / 2, latency / 2, size / 2))
    assert {rule.name for rule in loose.failed} <= {rule.name for rule in strict.failed}
    assert loose.passed == (not loose.failed)
