"""The gate's judging: each rule by its value, and what holds for any predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stocktake.config import GateConfig
from stocktake.registry.gate import GateResult, Reference, Rule, Served, judge_pair, judge_serving, run_gate

LABELS = (1, 2, 3)
CHECK = {"passed": True, "photos": 64, "engines": {"onnxruntime 1 f32": {}}}
SERVED = Served(latency_ms=10, size_mb=20, engine="openvino f32", check=CHECK)


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


def test_a_better_one_passes_and_the_figures_are_told() -> None:
    good, bad = better_and_worse()
    judgement = run_gate(good, [champion(bad)], SERVED, GateConfig())
    assert judgement.passed
    assert judgement.failed == []
    rules = named(judgement.rules)
    assert list(rules) == ["same", "gain", "largest", "latency", "size", "export"]
    figures = judgement.figures
    assert figures["macro_f1"] == 1
    assert figures["n"] == 120
    assert figures["gain"] == pytest.approx(1 - figures["reference_macro_f1"])
    assert 0 < figures["gain_low"] < figures["gain"] < figures["gain_high"]
    assert rules["gain"].found == f"{figures['gain_low']:+.3f}"
    assert rules["gain"].wanted == "above 0.000"
    assert rules["gain"].margin == f"by {figures['gain_low']:.3f}"
    assert str(rules["latency"]).startswith("latency of one photo: 10.0 ms (below 100.0 ms; by 90.0 ms), median")


def test_a_worse_one_is_refused_by_how_much() -> None:
    good, bad = better_and_worse()
    rules = named(run_gate(bad, [champion(good)], SERVED, GateConfig()).rules)
    assert [name for name, rule in rules.items() if not rule.passed] == ["gain", "largest"]
    assert rules["gain"].value is not None
    assert rules["gain"].margin == f"missed by {-rules['gain'].value:.3f}"


def test_the_margin_that_is_asked_for_is_the_intervals_lower_end() -> None:
    good, bad = better_and_worse()
    _, figures = judge_pair(good, champion(bad), GateConfig())
    for gain, passes in ((figures["gain_low"] - 1e-6, True), (figures["gain_low"], False), (figures["gain"], False)):
        rules, _ = judge_pair(good, champion(bad), GateConfig(min_gain=gain))
        assert named(rules)["gain"].passed is passes


def test_groups_are_the_unit_of_the_interval() -> None:
    """Forty looks at four bins say less than forty bins."""
    good, bad = better_and_worse(120, 40)
    alone = judge_pair(good, champion(bad), GateConfig())[1]
    grouped = judge_pair(good.assign(group=np.arange(120) // 12), champion(bad), GateConfig())[1]
    assert grouped["gain"] == alone["gain"]
    assert grouped["gain_low"] < alone["gain_low"]


@pytest.mark.parametrize(("drop", "passes"), [(0.1, True), (0.099, False), (0.5, True)])
def test_a_quantity_that_is_forgotten_refuses(drop: float, passes: bool) -> None:
    quantities = np.repeat(LABELS, 40)
    ours, theirs = quantities.copy(), quantities.copy()
    ours[:4] = 2  # recall of 1: 0.9 against 1
    theirs[40:] = 1  # of 2 and 3: none
    rules, figures = judge_pair(table(quantities, ours), champion(table(quantities, theirs)), GateConfig(0.0, drop))
    rule = named(rules)["largest"]
    assert rule.passed is passes
    assert figures["recall_drop"] == rule.value == pytest.approx(0.1)
    assert rule.note == "of 1, from 1.000 to 0.900"
    assert named(rules)["gain"].passed


@pytest.mark.parametrize(
    ("served", "failed"),
    [
        (Served(100.0, 20, "e", CHECK), ["latency"]),
        (Served(99.9, 20, "e", CHECK), []),
        (Served(float("nan"), 20, "e", CHECK), ["latency"]),
        (Served(10, 200.0, "e", CHECK), ["size"]),
        (Served(10, 20, "e", None), ["export"]),
        (Served(10, 20, "e", {"passed": False, "photos": 64}), ["export"]),
        (Served(10, 20, "e", {"passed": "yes"}), ["export"]),
        (Served(200, 300, "e", {}), ["latency", "size", "export"]),
    ],
)
def test_how_it_is_served(served: Served, failed: list[str]) -> None:
    rules = named(judge_serving(served, GateConfig()))
    assert [name for name, rule in rules.items() if not rule.passed] == failed


def test_bins_that_do_not_pair_up_refuse() -> None:
    good, bad = better_and_worse()
    way_out = "stocktake evaluate --model models:/m/1"
    changed = bad.assign(quantity=bad["quantity"].where(bad["id"] != "00007", 3))
    for theirs, note in (
        (bad.iloc[1:], "1 of 120 bins are not in its 119, 0 of its are not here"),
        (pd.concat([bad, bad.iloc[:1]]), "a bin is there twice"),
        (changed, "1 bins have another recorded quantity there"),
        (None, "of other data"),
    ):
        rules, figures = judge_pair(good, champion(theirs, trouble=note, way_out=way_out), GateConfig())
        assert (len(rules), rules[0].passed, rules[0].way_out, figures) == (1, False, way_out, {})
        rules, _ = judge_pair(good, champion(theirs, trouble="" if theirs is not None else note), GateConfig())
        assert rules[0].note == note
    assert judge_pair(good.iloc[:0], champion(bad.iloc[:0]), GateConfig())[0][0].note == "there are no bins"


def test_without_predictions_of_its_own_nothing_passes() -> None:
    _, bad = better_and_worse()
    judgement = run_gate(None, [champion(bad)], SERVED, GateConfig(), trouble="its run is gone")
    assert [str(rule) for rule in judgement.failed] == ["same test split as the champion m/1: its run is gone"]


def test_a_first_champion_is_held_against_both_baselines_and_may_forget_what_a_majority_class_knows() -> None:
    good, bad = better_and_worse()
    most = table(good["quantity"], np.full(120, 3))
    references = [
        Reference("majority baseline", most, guards_recall=False),
        Reference("frozen baseline", bad, guards_recall=False),
    ]
    judgement = run_gate(good, references, SERVED, GateConfig())
    assert judgement.passed
    assert not any(rule.name.startswith("largest") for rule in judgement.rules)
    assert judgement.figures["majority baseline: gain"] > judgement.figures["frozen baseline: gain"] > 0
    assert not run_gate(bad, [references[0], Reference("frozen baseline", good)], SERVED, GateConfig()).passed


columns = st.integers(3, 30).flatmap(
    lambda n: st.tuples(*(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n) for _ in range(3)))
)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(columns)
def test_no_one_beats_itself_and_no_two_beat_each_other(drawn: tuple[list[int], ...]) -> None:
    quantities, one, other = drawn
    ours, theirs = table(quantities, one), table(quantities, other)
    same = run_gate(ours, [champion(ours)], SERVED, GateConfig())
    assert [rule.name for rule in same.failed] == ["gain over the champion m/1"]
    forth, back = (judge_pair(a, champion(b), GateConfig()) for a, b in ((ours, theirs), (theirs, ours)))
    assert not (named(forth[0])["gain"].passed and named(back[0])["gain"].passed)
    assert forth[1]["gain"] == pytest.approx(-back[1]["gain"])


@few
@given(columns, st.integers(0, 2**32 - 1))
def test_the_order_of_bins_does_not_matter(drawn: tuple[list[int], ...], seed: int) -> None:
    quantities, one, other = drawn
    ours, theirs = table(quantities, one), table(quantities, other)
    shuffled = theirs.sample(frac=1, random_state=seed)
    assert judge_pair(ours, champion(theirs), GateConfig()) == judge_pair(ours, champion(shuffled), GateConfig())


@few
@given(columns, st.floats(-1, 1), st.floats(0, 1), st.floats(0, 200), st.floats(0, 300))
def test_a_stricter_gate_lets_no_one_more_pass(
    drawn: tuple[list[int], ...], gain: float, drop: float, latency: float, size: float
) -> None:
    quantities, one, other = drawn

    def passes(limits: GateConfig) -> GateResult:
        return run_gate(table(quantities, one), [champion(table(quantities, other))], SERVED, limits)

    loose = passes(GateConfig(gain, drop, latency, size))
    strict = passes(GateConfig((gain + 1) / 2, drop / 2, latency / 2, size / 2))
    assert {rule.name for rule in loose.failed} <= {rule.name for rule in strict.failed}
    assert loose.passed == (not loose.failed)
