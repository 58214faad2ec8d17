"""Whether a challenger may become the champion: rules on predictions of the same bins, and on how it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from stocktake.config.versions import GateConfig
from stocktake.evaluation.intervals import paired_difference_interval
from stocktake.evaluation.metrics import confusion_matrix, scores

LEVEL = 0.95
"""Of the interval that the gain is judged by."""
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
    """A row a test bin: id, group, quantity, predicted. None: there are none on this split."""
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

    @property
    def passed(self) -> bool:
        """Whether every rule was passed."""
        return not self.failed

    @property
    def failed(self) -> list[Rule]:
        """The rules that were missed."""
        return [rule for rule in self.rules if not rule.passed]


def run_gate(
    challenger: pd.DataFrame | None,
    references: Sequence[Reference],
    serving: ServingStats,
    limits: GateConfig,
    *,
    reason: str = "",
) -> GateResult:
    """Judge a challenger by every rule.

    Args:
        challenger: its predictions on its test split: id, group, quantity, predicted and p_<label>; None: none exist.
        references: the champion alone, or the baselines.
        serving: how it answers here.
        limits: of the rules.
        reason: why `challenger` is None.
    """
    rules: list[Rule] = []
    figures: dict[str, Any] = {"latency_ms": serving.latency_ms, "size_mb": serving.size_mb, "engine": serving.engine}
    for reference in references:
        if challenger is None:
            rules.append(Rule(_same_split(reference), False, note=reason))
            continue
        compared, measured = compare_predictions(challenger, reference, limits)
        rules += compared
        prefix = "" if reference.guards_recall else f"{reference.name}: "
        figures |= {f"{prefix}{name}": value for name, value in measured.items()}
    return GateResult((*rules, *check_serving(serving, limits)), figures)


def compare_predictions(
    challenger: pd.DataFrame, reference: Reference, limits: GateConfig
) -> tuple[list[Rule], dict[str, float | int]]:
    """Apply the rules on predictions of the same bins.

    Args:
        challenger: id, group, quantity, predicted, and a column p_<label> for each label of the task.
        reference: what it is compared with.
        limits: min_gain and max_recall_drop.

    Returns:
        The rules, and macro_f1, reference_macro_f1, gain, gain_low, gain_high, n; none if the bins do not pair up.
    """
    split_rule, name = _same_split(reference), reference.name
    if reference.predictions is None or reference.reason:
        return [Rule(split_rule, False, note=reference.reason, hint=reference.hint)], {}
    if difference := _difference(challenger, reference.predictions):
        return [Rule(split_rule, False, note=difference, hint=reference.hint)], {}
    labels = [int(column.removeprefix("p_")) for column in challenger.columns if column.startswith("p_")]
    other = reference.predictions.set_index("id").loc[challenger["id"], "predicted"].to_numpy(dtype=np.int64)
    recorded, predicted = (challenger[column].to_numpy(dtype=np.int64) for column in ("quantity", "predicted"))
    ours, theirs = (scores(confusion_matrix(labels, recorded, column), labels) for column in (predicted, other))
    groups = challenger["group"].to_numpy()
    low, high = paired_difference_interval(labels, recorded, predicted, other, groups, level=LEVEL)
    own, other_score = float(ours["macro_f1"]), float(theirs["macro_f1"])
    gain = own - other_score
    figures = {"macro_f1": own, "reference_macro_f1": other_score, "gain": gain, "gain_low": low, "gain_high": high}
    figures["n"] = len(challenger)
    note = f"macro-F1 {own:.3f} against {other_score:.3f}: {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    rules = [
        Rule(split_rule, True, note=f"{len(challenger)} bins, {len(np.unique(groups))} groups"),
        Rule(f"gain over the {name}", low > limits.min_gain, low, limits.min_gain, "above", note=note),
    ]
    if reference.guards_recall:
        drops = {label: float(theirs[f"recall_{label}"] - ours[f"recall_{label}"]) for label in labels}
        worst = max(drops, key=drops.__getitem__)
        figures["recall_drop"] = drop = drops[worst]
        recalls = [float(scored[f"recall_{worst}"]) for scored in (theirs, ours)]
        limit, note = limits.max_recall_drop, f"of {worst}, from {recalls[0]:.3f} to {recalls[1]:.3f}"
        name = "largest fall of a quantity's recall"
        rules.append(Rule(name, drop <= limit + _ROUNDING, drop, limit, "at most", note=note))
    return rules, figures


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


def _same_split(reference: Reference) -> str:
    return f"same test split as the {reference.name}"


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
