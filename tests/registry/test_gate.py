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
    run_gate,
)

LABELS = (1, 2, 3)
CHECK = {"passed": True, "photos": 64, "engines": {"onnxruntime 1 f32": {}}}
SERVED = ServingStats(latency_ms=10, size_mb=20, engine="openvino f32", check=CHECK)


def table(quantities: Any, predicted: Any, groups: Any = None) -> pd.DataFrame:
    ids = [f"{number:05d}" for number in range(len(quantities))]
    columns = {"id": ids, "group": ids if groups is None else groups, "quantity": quantities, "predicted": predicted}
    return pd.DataFrame({**columns, **{f"p_{label}": 1 / 3 for label in LABELS}})


def better_and_worse(n: int = 120, wrong: int = 40) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All right, and `wrong` of n taken for the next quantity."""
    quantities = np.resize(LABELS, n)
    predicted = quantities.copy()
    predicted[:wrong] = predicted[:wrong] % 3 + 1
    return table(quantities, quantities), table(quantities, predicted)


def named(rules: Any) -> dict[str, Rule]:
    return {rule.name.split(" ")[0]: rule for rule in rules}


def champion(predictions: pd.DataFrame | None, **settings: Any) -> Reference:
    return Reference("champion m/1", predictions, **settings)


def test_a_better_model_passes_and_its_figures_are_returned() -> None:
    good, bad = better_and_worse()
    result = run_gate(good, [champion(bad)], SERVED, GateConfig())
    assert result.passed
    assert result.failed == []
    rules = named(result.rules)
    assert list(rules) == ["same", "gain", "largest", "latency", "size", "export"]
    figures = result.figures
    assert figures["macro_f1"] == 1
    assert figures["n"] == 120
    assert figures["gain"] == pytest.approx(1 - figures["reference_macro_f1"])
    assert 0 < figures["gain_low"] < figures["gain"] < figures["gain_high"]
    assert rules["gain"].shown_value == f"{figures['gain_low']:+.3f}"
    assert rules["gain"].shown_limit == "above 0.000"
    assert rules["gain"].margin == f"by {figures['gain_low']:.3f}"
    assert str(rules["latency"]).startswith("latency of one photo: 10.0 ms (below 100.0 ms; by 90.0 ms), median")


def test_a_worse_model_is_rejected_by_how_much() -> None:
    good, bad = better_and_worse()
    rules = named(run_gate(bad, [champion(good)], SERVED, GateConfig()).rules)
    assert [name for name, rule in rules.items() if not rule.passed] == ["gain", "largest"]
    assert rules["gain"].value is not None
    assert rules["gain"].margin == f"missed by {-rules['gain'].value:.3f}"


def test_the_margin_that_is_asked_for_is_the_intervals_lower_end() -> None:
    good, bad = better_and_worse()
    _, figures = compare_predictions(good, champion(bad), GateConfig())
    for gain, passes in ((figures["gain_low"] - 1e-6, True), (figures["gain_low"], False), (figures["gain"], False)):
        rules, _ = compare_predictions(good, champion(bad), GateConfig(min_gain=gain))
        assert named(rules)["gain"].passed is passes


def test_groups_are_the_unit_of_the_interval() -> None:
    """Forty snapshots of four bins say less than forty bins."""
    good, bad = better_and_worse(120, 40)
    alone = compare_predictions(good, champion(bad), GateConfig())[1]
    grouped = compare_predictions(good.assign(group=np.arange(120) // 12), champion(bad), GateConfig())[1]
    assert grouped["gain"] == alone["gain"]
    assert grouped["gain_low"] < alone["gain_low"]


@pytest.mark.parametrize(("drop", "passes"), [(0.1, True), (0.099, False), (0.5, True)])
def test_a_quantity_that_is_forgotten_refuses(drop: float, passes: bool) -> None:
    quantities = np.repeat(LABELS, 40)
    ours, theirs = quantities.copy(), quantities.copy()
    ours[:4] = 2  # recall of 1: 0.9 against 1
    theirs[40:] = 1  # of 2 and 3: none
    rules, figures = compare_predictions(
        table(quantities, ours), champion(table(quantities, theirs)), GateConfig(0.0, drop)
    )
    rule = named(rules)["largest"]
    assert rule.passed is passes
    assert figures["recall_drop"] == rule.value == pytest.approx(0.1)
    assert rule.note == "of 1, from 1.000 to 0.900"
    assert named(rules)["gain"].passed


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
        rules, figures = compare_predictions(good, champion(theirs, reason=note, hint=hint), GateConfig())
        assert (len(rules), rules[0].passed, rules[0].hint, figures) == (1, False, hint, {})
        rules, _ = compare_predictions(good, champion(theirs, reason="" if theirs is not None else note), GateConfig())
        assert rules[0].note == note
    assert compare_predictions(good.iloc[:0], champion(bad.iloc[:0]), GateConfig())[0][0].note == "there are no bins"


def test_without_predictions_of_its_own_nothing_passes() -> None:
    _, bad = better_and_worse()
    result = run_gate(None, [champion(bad)], SERVED, GateConfig(), reason="its run is gone")
    assert [str(rule) for rule in result.failed] == ["same test split as the champion m/1: its run is gone"]


def test_a_first_champion_is_held_against_both_baselines_and_may_forget_what_a_majority_class_knows() -> None:
    good, bad = better_and_worse()
    most = table(good["quantity"], np.full(120, 3))
    references = [
        Reference("majority baseline", most, guards_recall=False),
        Reference("frozen baseline", bad, guards_recall=False),
    ]
    result = run_gate(good, references, SERVED, GateConfig())
    assert result.passed
    assert not any(rule.name.startswith("largest") for rule in result.rules)
    assert result.figures["majority baseline: gain"] > result.figures["frozen baseline: gain"] > 0
    assert not run_gate(bad, [references[0], Reference("frozen baseline", good)], SERVED, GateConfig()).passed


columns = st.integers(3, 30).flatmap(
    lambda n: st.tuples(*(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n) for _ in range(3)))
)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(columns)
def test_no_model_beats_itself_and_no_two_beat_each_other(drawn: tuple[list[int], ...]) -> None:
    quantities, first, second = drawn
    ours, theirs = table(quantities, first), table(quantities, second)
    same = run_gate(ours, [champion(ours)], SERVED, GateConfig())
    assert [rule.name for rule in same.failed] == ["gain over the champion m/1"]
    forth, back = (compare_predictions(a, champion(b), GateConfig()) for a, b in ((ours, theirs), (theirs, ours)))
    assert not (named(forth[0])["gain"].passed and named(back[0])["gain"].passed)
    assert forth[1]["gain"] == pytest.approx(-back[1]["gain"])


@few
@given(columns, st.integers(0, 2**32 - 1))
def test_the_order_of_bins_does_not_matter(drawn: tuple[list[int], ...], seed: int) -> None:
    quantities, first, second = drawn
    ours, theirs = table(quantities, first), table(quantities, second)
    shuffled = theirs.sample(frac=1, random_state=seed)
    assert compare_predictions(ours, champion(theirs), GateConfig()) == compare_predictions(
        ours, champion(shuffled), GateConfig()
    )


@few
@given(columns, st.floats(-1, 1), st.floats(0, 1), st.floats(0, 200), st.floats(0, 300))
def test_a_stricter_gate_lets_no_one_more_pass(
    drawn: tuple[list[int], ...], gain: float, drop: float, latency: float, size: float
) -> None:
    quantities, first, second = drawn

    def passes(limits: GateConfig) -> GateResult:
        return run_gate(table(quantities, first), [champion(table(quantities, second))], SERVED, limits)

    loose = passes(GateConfig(gain, drop, latency, size))
    strict = passes(GateConfig((gain + 1) / 2, drop / 2, latency / 2, size / 2))
    assert {rule.name for rule in loose.failed} <= {rule.name for rule in strict.failed}
    assert loose.passed == (not loose.failed)
