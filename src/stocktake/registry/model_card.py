"""The model card: what a version is, how well it counts, where it fails, where it comes from. Markdown and HTML."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stocktake.registry.promotion import Event
from stocktake.registry.versions import Version

CONFUSION, RELIABILITY = "test_confusion_matrix.png", "test_reliability.png"
_DESCRIPTION_LENGTH = 5000  # characters that every store keeps of a version's description
_SCORES = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "rmse": "RMSE (items)",
    "mae": "MAE (items)",
    "within_1": "at most one off",
    "loss": "loss (nats)",
}
_NOT_IN_DESCRIPTION = ("How often each quantity", "Confusion matrix", "Settings", "Serving", "Calibration")


@dataclass(frozen=True)
class Facts:
    """What a card is made of; whatever is missing is left out or said to be missing."""

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
    served: Mapping[str, Any] = field(default_factory=dict)
    """latency_ms, engine and by, as last measured on the way through the gate."""
    events: Sequence[Event] = ()
    """The history of the registered model, in order."""


@dataclass(frozen=True)
class _Section:
    title: str
    text: str
    """Markdown."""
    image: str = ""
    """Name of an image that takes the place of the text in HTML."""


def as_markdown(facts: Facts) -> str:
    """The card as Markdown with tables, without images."""
    return _joined(facts, _sections(facts))


def as_description(facts: Facts) -> str:
    """The card at a length that every store keeps: the longest tables are left out, and it says where they are."""
    where = f"\n\nThe whole card: `model-card/card.html` of the run {_code(facts.run_id)}.\n"
    sections = [one for one in _sections(facts) if not one.title.startswith(_NOT_IN_DESCRIPTION)]
    while len(text := _joined(facts, sections) + where) > _DESCRIPTION_LENGTH and len(sections) > 1:
        sections.pop()
    return text if len(text) <= _DESCRIPTION_LENGTH else text[: _DESCRIPTION_LENGTH - len(where)] + where


def as_html(facts: Facts) -> str:
    """The card as one HTML page: images inside, no scripts, nothing loaded from elsewhere."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    parts = [markdown.render(_heading(facts))]
    for section in _sections(facts):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if (image := facts.images.get(section.image)) is None or section.image == RELIABILITY:
            parts.append(f'<div class="wide">{markdown.render(section.text)}</div>')
        if image is not None:
            data = base64.b64encode(image).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    return _PAGE.format(title=html.escape(f"Model card: {facts.version.label}"), body="\n".join(parts))


def _joined(facts: Facts, sections: Sequence[_Section]) -> str:
    return "\n\n".join([_heading(facts), *(f"## {one.title}\n\n{one.text}" for one in sections)]).rstrip() + "\n"


def _heading(facts: Facts) -> str:
    version = facts.version
    created = datetime.fromtimestamp(version.created_ms / 1000, UTC)
    aliases = f", {', '.join(version.aliases)}" if version.aliases else ""
    score, n = facts.metrics.get("test/macro_f1"), facts.metrics.get("test/n")
    told = f" Macro-F1 {_with_interval(facts, 'test', 'macro_f1')} on {n:,.0f} test bins." if score and n else ""
    return (
        f"# Model card: {_plain(version.label)}\n\n"
        f"**{_plain(facts.tags.get('stage', 'model'))}** for task {_plain(facts.tags.get('task', '?'))}{aliases};"
        f" registered {created:%Y-%m-%d}.{told}"
    )


def _sections(facts: Facts) -> list[_Section]:
    made = [
        _Section("What it is, and what it is for", _purpose(facts)),
        _Section("Figures", _figures(facts)),
        _Section("Data", _data(facts)),
        _Section("How often each quantity is counted right (test)", _per_class(facts)),
        _Section("Confusion matrix (test)", _confusion(facts), CONFUSION),
        _Section("Calibration (test)", _calibration(facts), RELIABILITY),
        _Section("Limits", _limits(facts)),
        _Section("Serving", _serving(facts)),
        _Section("Lineage", _lineage(facts)),
        _Section("History of promotions", _history(facts)),
        _Section("Settings", _table(["setting", "value"], [[_code(k), _code(facts.params[k])] for k in facts.params])),
    ]
    return [section for section in made if section.text]


def _purpose(facts: Facts) -> str:
    labels = facts.exported.get("labels", [])
    counted = f" ({', '.join(str(label) for label in labels)})" if labels else ""
    network = f", backbone {_code(facts.params['backbone'])}" if "backbone" in facts.params else ""
    size = facts.params.get("image_size")
    return (
        f"It counts the items in one photo of a warehouse bin. In: a JPEG, PNG or WebP photo"
        f"{f', stretched to {_plain(size)} by {_plain(size)} pixels' if size else ''}. Out: the quantity{counted}, its"
        " calibrated confidence, a probability for each quantity, and a set of quantities that are likely enough.\n\n"
        f"The model: {_plain(facts.tags.get('stage', '?'))}{network}.\n\n"
        "Meant for choosing which bins to recount: a bin whose record and photo disagree goes before a person. Not"
        " meant for changing a record without a recount, and not for judging who picked or stowed."
    )


def _figures(facts: Facts) -> str:
    rows = []
    for name, title in _SCORES.items():
        if f"test/{name}" in facts.metrics or f"val/{name}" in facts.metrics:
            rows.append([title, _with_interval(facts, "val", name), _with_interval(facts, "test", name)])
    if not rows:
        return "The run has no figures."
    rows.append(["bins (n)", *(f"{facts.metrics.get(f'{split}/n', 0):,.0f}" for split in ("val", "test"))])
    return (
        _table(["", "val", "test"], rows, numbers=2)
        + "\n\nIn brackets: 95 % bootstrap intervals over groups. Everything was chosen on val."
    )


def _data(facts: Facts) -> str:
    root, params = facts.tags.get("data.root", "?"), facts.params
    by = {"group": "all looks at one bin in one split", "id": "every photo by itself, at random"}
    how = [
        f"root {_code(root)}{' (rendered bins)' if params.get('root') == 'None' else ''}",
        f"task {_plain(facts.tags.get('task', '?'))}",
        f"fingerprint {_code(facts.tags.get('data.fingerprint', '?'))}",
        f"split: {by.get(params.get('split.by', ''), '?')}; shares {_plain(params.get('split.fractions', '?'))},"
        f" seed {_plain(params.get('split.seed', '?'))}",
    ]
    labels = sorted({key.partition("/")[2] for key in facts.counts}, key=lambda label: (len(label), label))
    splits = [split for split in ("train", "val", "test") if any(key.startswith(f"{split}/") for key in facts.counts)]
    rows = [[label, *(f"{facts.counts.get(f'{split}/{label}', 0):,}" for split in splits)] for label in labels]
    rows.append(["all", *(f"{sum(facts.counts.get(f'{split}/{label}', 0) for label in labels):,}" for split in splits)])
    table = _table(["quantity", *splits], rows, numbers=len(splits)) if labels else ""
    return "\n".join(f"- {one}" for one in how) + (f"\n\n{table}" if table else "")


def _per_class(facts: Facts) -> str:
    names = [name for name in ("n", "recall", "precision", "f1", "share_predicted") if facts.per_class]
    rows = [
        [row.get("label", "?"), *(row.get(name, "") if name == "n" else _number(row.get(name, "")) for name in names)]
        for row in facts.per_class
    ]
    return _table(["quantity", *(name.replace("_", " ") for name in names)], rows, numbers=len(names))


def _confusion(facts: Facts) -> str:
    labels, matrix = facts.confusion.get("labels", []), facts.confusion.get("matrix", [])
    rows = [[f"**{label}**", *map(str, row)] for label, row in zip(labels, matrix, strict=False)]
    return _table(["recorded \\ counted", *map(str, labels)], rows, numbers=len(labels))


def _calibration(facts: Facts) -> str:
    metrics = facts.metrics
    level = (facts.exported.get("calibration") or {}).get("set_level")
    rows = [
        ["calibration error (ECE)", _metric(metrics, "test/ece_uncalibrated"), _metric(metrics, "test/ece")],
        ["loss (nats)", _metric(metrics, "test/loss_uncalibrated"), _metric(metrics, "test/loss")],
    ]
    if "test/ece" not in metrics:
        return ""
    sets = ""
    if "test/set_coverage" in metrics:
        asked = f", asked for {level:.0%}" if isinstance(level, float) else ""
        sets = (
            f"\n\nSets of likely quantities hold the recorded one for {_with_interval(facts, 'test', 'set_coverage')}"
            f" of the bins{asked}; {_metric(metrics, 'test/set_size', 2)} quantities each on average."
        )
    return _table(["", "as trained", "calibrated"], rows, numbers=2) + sets


def _limits(facts: Facts) -> str:
    labels = facts.exported.get("labels") or []
    reach = f"{labels[0]} to {labels[-1]}" if labels else "its task"
    rendered = facts.params.get("root") == "None"
    source = (
        "It was trained and measured on rendered bins: its figures say nothing about real ones."
        if rendered
        else "It was trained and measured on the bins above; other warehouses, cameras and lights were not seen."
    )
    limits = [
        source,
        f"It answers {reach} for every photo: a bin that holds another number, or none, gets one of these nonetheless.",
        "Items hidden behind tape, behind bands or behind other items cannot be counted; the more items, the more so.",
        "Records are taken for the truth, and some are wrong: an error may be the record's.",
        "Many bins have a near-identical twin with another quantity, which no photo tells apart; where photos were"
        " split one by one, twins on both sides flatter the figures.",
        "Rare quantities are measured on few bins: see n above.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _serving(facts: Facts) -> str:
    lines = []
    if "latency_ms" in facts.served:
        lines.append(
            f"latency: {float(facts.served['latency_ms']):.1f} ms a photo (median), {_plain(facts.served['engine'])},"
            f" measured by {_plain(facts.served.get('by', '?'))}"
        )
    if facts.size_mb is not None:
        lines.append(f"size: {facts.size_mb:.1f} MB")
    check = facts.exported.get("check")
    if not isinstance(check, Mapping):
        lines.append("export check: none was made")
    else:
        engines = check.get("engines") or {}
        found = ", ".join(
            f"{_plain(name)} within {one.get('largest_difference', float('nan')):.1g}" for name, one in engines.items()
        )
        verdict = "passed" if check.get("passed") is True else "not passed"
        lines.append(
            f"export check: {verdict} on {check.get('photos', '?')} photos against the checkpoint"
            + (f" ({found})" if found else "")
        )
        lines.append(f"precision: {_plain(facts.exported.get('precision', 'f32'))}")
    return "\n".join(f"- {line}" for line in lines)


def _lineage(facts: Facts) -> str:
    tags = facts.tags
    dirty = ", with uncommitted changes" if tags.get("git.dirty") == "true" else ""
    rows = [
        ["run", f"{_plain(facts.run_name)} {_code(facts.run_id)}" if facts.run_id else "gone"],
        ["experiment", _plain(facts.experiment)],
        ["code", f"{_code(tags['git.commit'])}{dirty}" if "git.commit" in tags else "no git checkout"],
        ["stocktake", _plain(tags.get("stocktake.version", "?"))],
        ["data", _code(tags.get("data.fingerprint", "?"))],
        ["model", _code(facts.version.source)],
    ]
    return _table(["", ""], rows)


def _history(facts: Facts) -> str:
    rows = [
        [
            event.at.replace("T", " ").removesuffix("Z"),
            f"{_plain(facts.version.name)}/{event.version} {event.action}",
            f"{event.before or 'none'} → {event.after or 'none'}",
            _plain(event.by),
            _plain(event.why or ""),
            _plain(told_figures(event)),
        ]
        for event in facts.events[-20:]
    ]
    return _table(["when (UTC)", "what", "champion", "who", "why", "figures"], rows)


def told_figures(event: Event) -> str:
    """The figures of an event in a line."""
    figures = event.figures
    told = []
    if "gain" in figures:
        told.append(
            f"gain {figures['gain']:+.3f} [{figures['gain_low']:+.3f}, {figures['gain_high']:+.3f}] on"
            f" {figures.get('n', '?')} bins"
        )
    for key in (key for key in figures if key.endswith(": gain")):
        low, high = figures[f"{key}_low"], figures[f"{key}_high"]
        told.append(f"over the {key.removesuffix(': gain')} {figures[key]:+.3f} [{low:+.3f}, {high:+.3f}]")
    if figures.get("failed"):
        told.append(f"failed: {', '.join(figures['failed'])}")
    return "; ".join(told)


def _with_interval(facts: Facts, split: str, name: str) -> str:
    value = _metric(facts.metrics, f"{split}/{name}")
    low, high = (_metric(facts.metrics, f"{split}/{name}_{end}") for end in ("low", "high"))
    return f"{value} [{low}, {high}]" if low and high else value


def _metric(metrics: Mapping[str, float], name: str, digits: int = 3) -> str:
    return f"{metrics[name]:.{digits}f}" if name in metrics else ""


def _number(text: str) -> str:
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return _plain(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """A Markdown table; its last `numbers` columns are aligned right. Empty without rows. Cells come escaped."""
    if not rows:
        return ""
    ruler = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [head, ruler, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", flat)


def _code(text: object) -> str:
    """Text in code's type. A table cell ends at `|` even there, and a backtick would end the code."""
    flat = " ".join(str(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{flat or ' '}`"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#dde2e7, #343a41); --soft: light-dark(#5b6570, #9aa5b1); }}
body {{ font: 15px/1.55 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 60rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }}
th, td {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 600; }}
code {{ font-size: .9em; overflow-wrap: anywhere; }}
img {{ display: block; max-width: min(100%, 40rem); height: auto; margin: .8rem 0; border-radius: 4px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
