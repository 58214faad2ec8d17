"""Whether a challenger may become the champion: rules on predictions of the same bins, and on how it is served.

The gain is judged by the lower end of its one-sided interval: gain - t * standard error, where the error is that of the
paired bootstrap over the G bin groups, times sqrt(G / (G - 1)), and t the quantile of Student's distribution with G - 1
degrees of freedom. The level of the interval shrinks with the uses of the test split (`split_uses`) to 1e-4 and below.
There, a percentile of 2000 resamples would rest on none of them, while their standard deviation is known to 2 %, and a
mean over hundreds of bins is near normal (Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 12-13).
`tests/benchmarks/gate.py` simulates how often equal and better challengers pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.config.versions import GateConfig
from stocktake.evaluation.intervals import paired_differences, percentile_interval
from stocktake.evaluation.metrics import LOWER_IS_BETTER, confusion_matrix, scores
from stocktake.registry.split_uses import SplitUse

POWER = 0.8
"""Probability that a gain of the detectable size passes."""
FEW_BINS = 30
"""A class with fewer test bins is warned about: the 95 % interval of its recall reaches up to 0.18 to either side."""
METRICS = {"macro_f1": "macro-F1", "rmse": "RMSE", "rmse_expected": "RMSE of the rounded mean"}
_GAIN = "gain over the"
_ROUNDING = 1e-9  # 0.4 - 0.3 is more than 0.1 in floating point


@dataclass(frozen=True)
class Rule:
    """The verdict of one rule."""

    name: str
    passed: bool
    value: float | None = None
    """What was measured; None where the rule compares no number, or nothing could be measured."""
    limit: float | None = None
    bound: str = ""
    """How the value must lie to the limit: above, at most, below."""
    unit: str = ""
    note: str = ""
    """Where the value comes from, or why there is none."""
    hint: str = ""
    """The command that makes what the rule lacks, where there is one."""

    @property
    def shown_value(self) -> str:
        """The value with its unit."""
        return "" if self.value is None else _figure(self.value, self.unit, signed=self.bound == "above")

    @property
    def shown_limit(self) -> str:
        """The limit with its bound and unit."""
        return "" if self.limit is None else f"{self.bound} {_figure(self.limit, self.unit)}"

    @property
    def margin(self) -> str:
        """By how much the rule was passed or missed."""
        if self.value is None or self.limit is None:
            return ""
        return f"{'by' if self.passed else 'missed by'} {_figure(abs(self.value - self.limit), self.unit)}"

    def __str__(self) -> str:
        value = f"{self.shown_value} ({self.shown_limit}; {self.margin})" if self.value is not None else ""
        return f"{self.name}: {', '.join(part for part in (value, self.note) if part)}"


@dataclass(frozen=True)
class Reference:
    """What a challenger is compared with: the champion, or a baseline while there is no champion."""

    name: str
    """Such as `champion stocktake/2` or `majority baseline`."""
    predictions: pd.DataFrame | None
    """A row a test bin: id, group, quantity, predicted, expected. None: there are none on this split."""
    reason: str = ""
    """Why there are none, or why it cannot be beaten."""
    hint: str = ""
    guards_recall: bool = True
    """Whether no quantity's recall may fall; against a majority class, one would by design."""


@dataclass(frozen=True)
class ServingStats:
    """How the challenger answers on this machine."""

    latency_ms: float
    """Median of one photo."""
    size_mb: float
    """Of the model folder, in 10^6 bytes."""
    engine: str
    check: Mapping[str, Any] | None
    """What the export's own check wrote: passed, photos, engines."""


@dataclass(frozen=True)
class GateResult:
    """All rules, and the figures that the history keeps."""

    rules: tuple[Rule, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    use: SplitUse | None = None
    """Of the test split; None if nothing was compared on it."""
    remarks: tuple[str, ...] = ()
    """Lines on the comparison: the use and its level, the detectable gain, classes of few bins."""

    @property
    def passed(self) -> bool:
        """Whether every rule was passed."""
        return not self.failed

    @property
    def failed(self) -> list[Rule]:
        """The rules that were missed."""
        return [rule for rule in self.rules if not rule.passed]

    @property
    def has_gain(self) -> bool:
        """Whether the challenger is better than each reference."""
        gains = [rule for rule in self.rules if rule.name.startswith(_GAIN)]
        return bool(gains) and all(rule.passed for rule in gains)


def run_gate(
    challenger: pd.DataFrame | None,
    references: Sequence[Reference],
    serving: ServingStats,
    limits: GateConfig,
    count_use: Callable[[pd.DataFrame], SplitUse],
    *,
    reason: str = "",
) -> GateResult:
    """Judge a challenger by every rule.

    Args:
        challenger: its predictions on its test split, as of `compare_predictions`; None: none exist.
        references: the champion alone, or the baselines.
        serving: how it answers here.
        limits: of the rules.
        count_use: counts a use of the challenger's test split; called once, before the first figure on it is computed,
            and not at all unless the bins of all references pair up with the challenger's.
        reason: why `challenger` is None.
    """
    rules = [_check_split(challenger, reference, reason) for reference in references]
    figures: dict[str, Any] = {"latency_ms": serving.latency_ms, "size_mb": serving.size_mb, "engine": serving.engine}
    use: SplitUse | None = None
    remarks: list[str] = []
    if challenger is not None and all(rule.passed for rule in rules):
        use = count_use(challenger)
        remarks = [f"{use}: judged at level {use.level:.2g}", *_few_bins(challenger)]
        figures |= {"metric": limits.metric, "use": use.number, "without_gain": use.without_gain, "level": use.level}
        for reference in references:
            compared, measured = compare_predictions(challenger, reference, limits, use)
            rules += compared
            prefix = "" if reference.guards_recall else f"{reference.name}: "
            figures |= {f"{prefix}{name}": value for name, value in measured.items()}
            detectable = measured["detectable_gain"]
            remarks.append(f"{POWER:.0%} of true gains of {detectable:.3f} over the {reference.name} would pass")
    return GateResult((*rules, *check_serving(serving, limits)), figures, use, tuple(remarks))


def compare_predictions(
    challenger: pd.DataFrame, reference: Reference, limits: GateConfig, use: SplitUse
) -> tuple[list[Rule], dict[str, float | int]]:
    """Apply the rules on predictions of the same bins.

    Args:
        challenger: id, group, quantity, predicted, expected, and a column p_<label> for each label of the task.
        reference: what it is compared with, with predictions of the same bins.
        limits: metric, min_gain and max_recall_drop.
        use: of these bins: the level to judge at.

    Returns:
        The rules, and the metric, reference_<metric>, gain, gain_low and gain_high (its 95 % interval), gain_bound
        (the lower end that is judged), detectable_gain (passes with a probability of POWER) and n. A gain is positive
        where the challenger is better: where its RMSE is lower.
    """
    from scipy.stats import norm, t

    if reference.predictions is None:
        raise ValueError(f"the {reference.name} has no predictions")
    labels = task_labels(challenger)
    theirs = reference.predictions.set_index("id").loc[challenger["id"]]
    metric, column = limits.metric, "expected" if limits.metric == "rmse_expected" else "predicted"
    compared = _Compared.of(labels, challenger, theirs, column)
    score, sign = metric.removesuffix("_expected"), -1 if metric in LOWER_IS_BETTER else 1
    own, other_score = compared.ours[score], compared.theirs[score]
    gain, gains = sign * (own - other_score), sign * compared.differences[score]
    low, high = percentile_interval(gains)
    free = challenger["group"].nunique() - 1
    error, quantile = float(gains.std()) * math.sqrt((free + 1) / free), float(t.isf(use.level, free))
    bound, detectable = gain - quantile * error, limits.min_gain + (quantile + float(norm.ppf(POWER))) * error
    figures = {metric: own, f"reference_{metric}": other_score, "gain": gain, "gain_low": low, "gain_high": high}
    figures |= {"gain_bound": bound, "detectable_gain": detectable, "n": len(challenger)}
    note = f"{METRICS[metric]} {own:.3f} against {other_score:.3f}: {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    name = f"{_GAIN} {reference.name}"
    rules = [Rule(name, bound > limits.min_gain, bound, limits.min_gain, "above", note=note)]
    if reference.guards_recall:
        if column != "predicted":
            compared = _Compared.of(labels, challenger, theirs, "predicted")
        drops = {label: percentile_interval(-compared.differences[f"recall_{label}"]) for label in labels}
        worst = max(drops, key=lambda label: drops[label].low)
        low, high = drops[worst]
        before, after = (scored[f"recall_{worst}"] for scored in (compared.theirs, compared.ours))
        figures |= {"recall_drop": before - after, "recall_drop_low": low}
        note = f"of {worst}, from {before:.3f} to {after:.3f}: {before - after:+.3f} [{low:+.3f}, {high:+.3f}]"
        name, limit = "largest fall of a quantity's recall that is certain", limits.max_recall_drop
        rules.append(Rule(name, low <= limit + _ROUNDING, low, limit, "at most", note=note))
    return rules, figures


@dataclass(frozen=True)
class _Compared:
    """Scores of two models on the same bins."""

    ours: Mapping[str, float]
    theirs: Mapping[str, float]
    differences: Mapping[str, NDArray[np.float64]]
    """Of `paired_differences`."""

    @classmethod
    def of(cls, labels: list[int], ours: pd.DataFrame, theirs: pd.DataFrame, column: str) -> _Compared:
        """Score a column of two tables whose rows are the same bins."""
        recorded, *counted = (
            values.to_numpy(dtype=np.int64) for values in (ours["quantity"], ours[column], theirs[column])
        )
        scored = [
            {name: float(value) for name, value in scores(confusion_matrix(labels, recorded, each), labels).items()}
            for each in counted
        ]
        differences = paired_differences(labels, recorded, counted[0], counted[1], ours["group"].to_numpy())
        return cls(scored[0], scored[1], differences)


def comparison_key(challenger: pd.DataFrame, references: Sequence[Reference], metric: str) -> str:
    """16 hex digits of a comparison: the same predictions compared by the same metric are no second use."""
    digest = hashlib.blake2b(metric.encode(), digest_size=8)
    for table in (challenger, *(reference.predictions for reference in references)):
        if table is not None:
            digest.update(
                table.sort_values("id")[["id", "quantity", "predicted", "expected"]].to_csv(index=False).encode()
            )
    return digest.hexdigest()


def task_labels(predictions: pd.DataFrame) -> list[int]:
    """The quantities of the task, from the columns p_<label>."""
    return [int(column.removeprefix("p_")) for column in predictions.columns if column.startswith("p_")]


def check_serving(serving: ServingStats, limits: GateConfig) -> list[Rule]:
    """Apply the rules on latency, size and the export's check."""
    check = serving.check
    if check is None:
        note = "model.json holds no check: export the model anew"
    else:
        note = f"{check.get('photos', '?')} photos, {', '.join(check.get('engines') or {}) or 'no engine'}"
    passed = check is not None and check.get("passed") is True

    def below(name: str, value: float, limit: float, unit: str, note: str = "") -> Rule:
        return Rule(name, value < limit, value, limit, "below", unit, note)

    engine = f"median on this machine, {serving.engine}"
    return [
        below("latency of one photo", serving.latency_ms, limits.max_latency_ms, "ms", engine),
        below("size of the model", serving.size_mb, limits.max_size_mb, "MB"),
        Rule("export check", passed, note=note),
    ]


def _check_split(challenger: pd.DataFrame | None, reference: Reference, reason: str) -> Rule:
    """Whether the bins of the two pair up; `reason`: why the challenger has none."""
    name = f"same test split as the {reference.name}"
    if challenger is None:
        return Rule(name, False, note=reason)
    if reference.predictions is None or reference.reason:
        return Rule(name, False, note=reference.reason, hint=reference.hint)
    if difference := _difference(challenger, reference.predictions):
        return Rule(name, False, note=difference, hint=reference.hint)
    groups = challenger["group"].nunique()
    if groups < 2:
        return Rule(name, False, note="all its bins are one group: an interval needs two")
    return Rule(name, True, note=f"{len(challenger)} bins, {groups} groups")


def _few_bins(challenger: pd.DataFrame) -> tuple[str, ...]:
    counts = challenger["quantity"].value_counts()
    few = {label: int(counts.get(label, 0)) for label in task_labels(challenger)}
    shown = ", ".join(f"{label} ({n} bins)" for label, n in few.items() if n < FEW_BINS)
    return (
        (f"warning: fewer than {FEW_BINS} test bins of quantity {shown}: its recall is hardly known",) if shown else ()
    )


def _difference(challenger: pd.DataFrame, reference: pd.DataFrame) -> str:
    """Why the bins of two tables do not pair up by id; empty if they do."""
    if not (challenger["id"].is_unique and reference["id"].is_unique):
        return "a bin is there twice"
    pairs = challenger.merge(reference, on="id", how="outer", suffixes=("", "_reference"), indicator="source")
    missing = int((pairs["source"] == "left_only").sum()), int((pairs["source"] == "right_only").sum())
    if any(missing):
        total = len(challenger), len(reference)
        return f"{missing[0]} of {total[0]} bins are not in its {total[1]}, {missing[1]} of its are not here"
    if not len(pairs):
        return "there are no bins"
    unlike = int((pairs["quantity"] != pairs["quantity_reference"]).sum())
    return f"{unlike} bins have another recorded quantity there" if unlike else ""


def _figure(value: float, unit: str, *, signed: bool = False) -> str:
    digits = f"{value:{'+' if signed else ''}.3f}" if not unit else f"{value:.1f}"
    return f"{digits} {unit}".rstrip()
