"""The model card: what a version is, how well it counts, where it fails, where it comes from. Markdown and HTML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from stocktake.evaluation.pages import data_uri, render
from stocktake.registry.gate import METRICS
from stocktake.registry.promotion import Event
from stocktake.registry.split_uses import SplitUse
from stocktake.registry.versions import Version

CONFUSION, RELIABILITY = "test_confusion_matrix.png", "test_reliability.png"
SPLITS = ("train", "val", "test")
_DESCRIPTION_LENGTH = 5000  # characters that every store keeps of a version's description
_EVENTS = 20
_SCORES = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "rmse": "RMSE (items)",
    "mae": "MAE (items)",
    "within_1": "at most one off",
    "loss": "loss (nats)",
}


@dataclass(frozen=True)
class ModelCardData:
    """What a card shows; whatever is missing is left out or said to be missing."""

    version: Version
    run_id: str = ""
    run_name: str = ""
    experiment: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    """Bins by `train/1`, `train/2`, ..., `test/5`."""
    per_class: Sequence[Mapping[str, str]] = ()
    """Rows of test_per_class.csv."""
    confusion: Mapping[str, Any] = field(default_factory=dict)
    """test_confusion_matrix.json: labels, matrix."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files by name: CONFUSION, RELIABILITY."""
    exported: Mapping[str, Any] = field(default_factory=dict)
    """model.json."""
    size_mb: float | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)
    """latency_ms, engine and by, as last measured by the gate."""
    events: Sequence[Event] = ()
    """The history of the registered model, in order."""

    @property
    def labels(self) -> list[Any]:
        """The quantities that the model can answer."""
        return list(self.exported.get("labels") or [])

    @property
    def created(self) -> str:
        """The day of the registration."""
        return f"{datetime.fromtimestamp(self.version.created_ms / 1000, UTC):%Y-%m-%d}"

    @property
    def is_synthetic(self) -> bool:
        """Whether the bins were rendered."""
        return self.params.get("root") == "None"

    def number(self, name: str, digits: int = 3) -> str:
        """A metric as text; empty if there is none."""
        return f"{self.metrics[name]:.{digits}f}" if name in self.metrics else ""

    def interval(self, split: str, name: str) -> Markup:
        """A metric with its 95 % interval: `0.345 [0.252, 0.444]`."""
        value = self.number(f"{split}/{name}")
        low, high = (self.number(f"{split}/{name}_{end}") for end in ("low", "high"))
        return Markup(f"{value} [{low}, {high}]" if low and high else value)  # noqa: S704 - digits

    @property
    def score_rows(self) -> list[list[str]]:
        """Title, val and test of each score; none if the run has no metrics."""
        rows: list[list[str]] = [
            [title, self.interval("val", name), self.interval("test", name)]
            for name, title in _SCORES.items()
            if f"test/{name}" in self.metrics or f"val/{name}" in self.metrics
        ]
        if rows:
            rows.append(["bins (n)", *(f"{self.metrics.get(f'{split}/n', 0):,.0f}" for split in ("val", "test"))])
        return rows

    @property
    def count_rows(self) -> list[list[str]]:
        """Label and bins in each split, and their sums; none if the run has no dataset."""
        labels = sorted({key.partition("/")[2] for key in self.counts}, key=lambda label: (len(label), label))
        rows = [[label, *(self.counts.get(f"{split}/{label}", 0) for split in SPLITS)] for label in labels]
        if rows:
            rows.append(["all", *(sum(row[column] for row in rows) for column in (1, 2, 3))])  # type: ignore[misc]
        return [[row[0], *(f"{n:,}" for n in row[1:])] for row in rows]  # type: ignore[list-item]

    @property
    def per_class_rows(self) -> list[list[str]]:
        """Label, n, recall, precision, f1 and share predicted of each label."""
        columns = ("recall", "precision", "f1", "share_predicted")
        return [
            [row.get("label", "?"), row.get("n", ""), *(_three_digits(row.get(name, "")) for name in columns)]
            for row in self.per_class
        ]

    @property
    def confusion_rows(self) -> list[list[Any]]:
        """Recorded label, and how often each label was predicted."""
        return [
            [label, *row]
            for label, row in zip(self.confusion.get("labels", []), self.confusion.get("matrix", []), strict=False)
        ]

    @property
    def check(self) -> Mapping[str, Any] | None:
        """The export's check: passed, photos, engines."""
        check = self.exported.get("check")
        return check if isinstance(check, Mapping) else None

    @property
    def event_rows(self) -> list[list[str]]:
        """When, what, champion before and after, who, why and figures of the latest events."""
        return [
            [
                event.at.replace("T", " ").removesuffix("Z"),
                f"{self.version.name}/{event.version} {event.action}",
                f"{event.before or 'none'} → {event.after or 'none'}",
                event.by,
                event.reason or "",
                format_figures(event),
            ]
            for event in self.events[-_EVENTS:]
        ]


def as_markdown(card: ModelCardData, *, is_brief: bool = False) -> str:
    """Render the card as Markdown with tables, without images; a brief one leaves out the longest tables."""
    text = render("model_card.jinja", "markdown", card=card, images={}, is_brief=is_brief)
    return re.sub(r"\n{3,}", "\n\n", text)


def as_description(card: ModelCardData) -> str:
    """Render the card at a length that every store keeps: without the longest tables, and where they are."""
    where = f"\nThe whole card: `model-card/card.html` of the run `{card.run_id}`.\n"
    for shorter in (card, dataclasses.replace(card, events=())):
        if len(text := as_markdown(shorter, is_brief=True) + where) <= _DESCRIPTION_LENGTH:
            return text
    return text[: _DESCRIPTION_LENGTH - len(where) - 1] + "\n" + where


def as_html(card: ModelCardData) -> str:
    """Render the card as one HTML page: images inside, no scripts, nothing loaded from elsewhere."""
    images = {name: data_uri(image) for name, image in card.images.items()}
    return render("model_card.html", card=card, images=images, is_brief=False)


def format_figures(event: Event) -> str:
    """The figures of an event in a line."""
    figures, parts = event.figures, []
    if "gain" in figures:
        interval = f"[{figures['gain_low']:+.3f}, {figures['gain_high']:+.3f}]"
        parts.append(f"gain {figures['gain']:+.3f} {interval} on {figures.get('n', '?')} bins")
    for key in (key for key in figures if key.endswith(": gain")):
        low, high = figures[f"{key}_low"], figures[f"{key}_high"]
        parts.append(f"over the {key.removesuffix(': gain')} {figures[key]:+.3f} [{low:+.3f}, {high:+.3f}]")
    if "use" in figures:
        use = SplitUse(figures["use"], figures["without_gain"])
        parts.append(f"{METRICS.get(figures['metric'], figures['metric'])}; {use}, judged at level {use.level:.2g}")
    if figures.get("failed"):
        parts.append(f"failed: {', '.join(figures['failed'])}")
    return "; ".join(parts)


def _three_digits(text: str) -> str:
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return text
