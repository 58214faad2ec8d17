"""Whether a challenger may become the champion: rules over predictions of the same bins, and over how it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from stocktake.config import GateConfig
from stocktake.evaluation.intervals import paired_difference_interval
from stocktake.evaluation.metrics import confusion_matrix, scores

LEVEL = 0.95
"""Of the interval that the gain is judged by."""
_ROUNDING = 1e-9  # 0.4 - 0.3 is more than 0.1 to a computer


@dataclass(frozen=True)
class Rule:
    """One rule's verdict."""

    name: str
    passed: bool
    value: float | None = None
    """What was found; None where the rule is no matter of a number, or nothing could be found."""
    limit: float | None = None
    bound: str = ""
    """How the value must lie to the limit: above, at most, below."""
    unit: str = ""
    note: str = ""
    """What the value comes from, or why there is none."""
    way_out: str = ""
    """The command after which the rule can be judged, where there is one."""

    @property
    def margin(self) -> str:
        """By how much it was passed or missed."""
        if self.value is None or self.limit is None:
            return ""
        return f"{'by' if self.passed else 'missed by'} {_figure(abs(self.value - self.limit), self.unit)}"

    @property
    def found(self) -> str:
        """The value, as people read it."""
        return "" if self.value is None else _figure(self.value, self.unit, signed=self.bound == "above")

    @property
    def wanted(self) -> str:
        """The limit, as people read it."""
        return "" if self.limit is None else f"{self.bound} {_figure(self.limit, self.unit)}"

    def __str__(self) -> str:
        """The verdict in a line."""
        parts = [f"{self.found} ({self.wanted}; {self.margin})" if self.found else "", self.note]
        return f"{self.name}: {', '.join(part for part in parts if part)}"


@dataclass(frozen=True)
class Reference:
    """What a challenger is held against: the champion, or a baseline while there is no champion."""

    name: str
    """Such as `champion stocktake/2` or `majority baseline`."""
    predictions: pd.DataFrame | None
    """A row a test bin: id, group, quantity, predicted. None: there are none on this split."""
    trouble: str = ""
    """Why there are none, or why it cannot be beaten."""
    way_out: str = ""
    guards_recall: bool = True
    """Whether no quantity's recall may fall; against a majority class, one would by design."""


@dataclass(frozen=True)
class Served:
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
        return all(rule.passed for rule in self.rules)

    @property
    def failed(self) -> list[Rule]:
        """The rules that were not."""
        return [rule for rule in self.rules if not rule.passed]


def run_gate(
    ours: pd.DataFrame | None, references: Sequence[Reference], served: Served, limits: GateConfig, *, trouble: str = ""
) -> GateResult:
    """Judge a challenger by every rule.

    Args:
        ours: its predictions on its test split: id, group, quantity, predicted and p_<label>; None: there are none.
        references: the champion alone, or the baselines.
        served: how it answers here.
        limits: of the rules.
        trouble: why `ours` is None.
    """
    rules: list[Rule] = []
    figures: dict[str, Any] = {"latency_ms": served.latency_ms, "size_mb": served.size_mb, "engine": served.engine}
    for reference in references:
        if ours is None:
            rules.append(Rule(f"same test split as the {reference.name}", False, note=trouble))
            continue
        judged, found = judge_pair(ours, reference, limits)
        rules += judged
        figures |= found if reference.guards_recall else {f"{reference.name}: {key}": found[key] for key in found}
    rules += judge_serving(served, limits)
    return GateResult(tuple(rules), figures)


def judge_pair(
    ours: pd.DataFrame, reference: Reference, limits: GateConfig
) -> tuple[list[Rule], dict[str, float | int]]:
    """The rules on predictions of the same bins, and their figures.

    Args:
        ours: id, group, quantity, predicted, and a column p_<label> for each label of the task.
        reference: what they are held against.
        limits: min_gain and max_recall_drop.

    Returns:
        The rules, and macro_f1, reference_macro_f1, gain, gain_low, gain_high, n; none if the bins do not pair up.
    """
    name = f"same test split as the {reference.name}"
    theirs = reference.predictions
    if theirs is None or reference.trouble:
        return [Rule(name, False, note=reference.trouble, way_out=reference.way_out)], {}
    if difference := _difference(ours, theirs):
        return [Rule(name, False, note=difference, way_out=reference.way_out)], {}
    labels = [int(column.removeprefix("p_")) for column in ours.columns if column.startswith("p_")]
    ours, theirs = ours.set_index("id"), theirs.set_index("id").loc[ours["id"]]
    recorded, predicted, others = (
        column.to_numpy(dtype=np.int64) for column in (ours["quantity"], ours["predicted"], theirs["predicted"])
    )
    own = scores(confusion_matrix(labels, recorded, predicted), labels)
    their = scores(confusion_matrix(labels, recorded, others), labels)
    groups = ours["group"].to_numpy()
    low, high = paired_difference_interval(labels, recorded, predicted, others, groups, level=LEVEL)
    figures = {
        "macro_f1": float(own["macro_f1"]),
        "reference_macro_f1": float(their["macro_f1"]),
        "gain": float(own["macro_f1"] - their["macro_f1"]),
        "gain_low": low,
        "gain_high": high,
        "n": len(ours),
    }
    rules = [
        Rule(name, True, note=f"{len(ours)} bins, {len(np.unique(groups))} groups"),
        Rule(
            f"gain over the {reference.name}",
            low > limits.min_gain,
            value=low,
            limit=limits.min_gain,
            bound="above",
            note=f"macro-F1 {figures['macro_f1']:.3f} against {figures['reference_macro_f1']:.3f}:"
            f" {figures['gain']:+.3f} [{low:+.3f}, {high:+.3f}]",
        ),
    ]
    if reference.guards_recall:
        falls = {label: float(their[f"recall_{label}"] - own[f"recall_{label}"]) for label in labels}
        worst = max(falls, key=falls.__getitem__)
        was, now = float(their[f"recall_{worst}"]), float(own[f"recall_{worst}"])
        figures["recall_drop"] = falls[worst]
        rules.append(
            Rule(
                "largest fall of a quantity's recall",
                falls[worst] <= limits.max_recall_drop + _ROUNDING,
                value=falls[worst],
                limit=limits.max_recall_drop,
                bound="at most",
                note=f"of {worst}, from {was:.3f} to {now:.3f}",
            )
        )
    return rules, figures


def judge_serving(served: Served, limits: GateConfig) -> list[Rule]:
    """The rules on latency, size and the export's check."""
    check = served.check
    passed = check is not None and check.get("passed") is True
    if check is None:
        note = "model.json holds no check: export the model anew"
    else:
        note = f"{check.get('photos', '?')} photos, {', '.join(check.get('engines') or {}) or 'no engine'}"
    return [
        Rule(
            "latency of one photo",
            served.latency_ms < limits.max_latency_ms,
            value=served.latency_ms,
            limit=limits.max_latency_ms,
            bound="below",
            unit="ms",
            note=f"median on this machine, {served.engine}",
        ),
        Rule(
            "size of the model",
            served.size_mb < limits.max_size_mb,
            value=served.size_mb,
            limit=limits.max_size_mb,
            bound="below",
            unit="MB",
        ),
        Rule("export check", passed, note=note),
    ]


def _difference(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Why the bins of two tables do not pair up by id; empty if they do."""
    if ours["id"].duplicated().any() or theirs["id"].duplicated().any():
        return "a bin is there twice"
    own, their = ours.set_index("id")["quantity"], theirs.set_index("id")["quantity"]
    only = [len(own.index.difference(their.index)), len(their.index.difference(own.index))]
    if any(only):
        return f"{only[0]} of {len(own)} bins are not in its {len(their)}, {only[1]} of its are not here"
    if not len(own):
        return "there are no bins"
    unlike = int((own.to_numpy() != their.loc[own.index].to_numpy()).sum())
    return f"{unlike} bins have another recorded quantity there" if unlike else ""


def _figure(value: float, unit: str, *, signed: bool = False) -> str:
    digits = f"{value:{'+' if signed else ''}.3f}" if not unit else f"{value:.1f}"
    return f"{digits} {unit}".rstrip()
