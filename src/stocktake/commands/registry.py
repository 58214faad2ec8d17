"""`stocktake registry`: the versions of a model with their aliases and figures, and who promoted what, when and why."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

from stocktake.config import RegistryConfig
from stocktake.registry.model_card import told_figures
from stocktake.registry.model_card_data import gather_facts
from stocktake.registry.promotion import Event, history
from stocktake.registry.versions import ModelRegistry, Version

_WIDTH = 140


def registry(config: RegistryConfig) -> dict[str, Any]:
    """Print the versions and the history.

    Returns:
        What --format json prints: `versions` and `history`, both in order.

    Raises:
        StocktakeError: there is no such registered model, naming those that there are.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # a look is no run
    models = ModelRegistry(config.tracking)
    with models.opened():
        versions = models.versions()
        rows = [_row(models, version) for version in versions]
        events = history(versions)
    found = {"model": models.name, "versions": rows, "history": [event.as_json() for event in events]}
    if config.format == "json":
        print(json.dumps(found, indent=2))
    else:
        _show(models.name, rows, events)
    return found


def _row(models: ModelRegistry, version: Version) -> dict[str, Any]:
    facts = gather_facts(models, version, figures_only=True)
    metrics, tags = facts.metrics, {**version.tags, **facts.tags}
    check = facts.exported.get("check")
    return {
        "version": version.number,
        "aliases": list(version.aliases),
        "stage": tags.get("stage"),
        "task": tags.get("task"),
        "val/macro_f1": metrics.get("val/macro_f1"),
        "test/macro_f1": metrics.get("test/macro_f1"),
        "test/macro_f1_low": metrics.get("test/macro_f1_low"),
        "test/macro_f1_high": metrics.get("test/macro_f1_high"),
        "test/n": metrics.get("test/n"),
        "data.fingerprint": tags.get("data.fingerprint"),
        "export_check": check.get("passed") if isinstance(check, dict) else None,
        "size_mb": facts.size_mb,
        "registered": f"{datetime.fromtimestamp(version.created_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "run": facts.run_name or None,
        "run_id": version.run_id,
    }


def _show(name: str, rows: list[dict[str, Any]], events: list[Event]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=max(_WIDTH, Console().width) if Console().is_terminal else _WIDTH)

    def table(title: str, columns: list[str], lines: list[list[str]]) -> None:
        made = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        for line in lines:
            made.add_row(*map(escape, line))
        console.print(made)

    checks = {True: "passed", False: "not passed", None: "none"}
    columns = ["version", "aliases", "stage", "task", "val F1", "test F1", "n", "data", "export check", "date", "run"]
    lines = [
        [
            str(row["version"]),
            ", ".join(row["aliases"]),
            row["stage"] or "",
            row["task"] or "",
            _score(row["val/macro_f1"]),
            _score(row["test/macro_f1"], row["test/macro_f1_low"], row["test/macro_f1_high"]),
            f"{row['test/n']:,.0f}" if row["test/n"] else "",
            row["data.fingerprint"] or "",
            checks[row["export_check"]],
            row["registered"][:10],
            f"{row['run'] or 'gone'} {(row['run_id'] or '')[:8]}",
        ]
        for row in rows
    ]
    table(f"Versions of {name}", columns, lines)
    print()
    if not events:
        print("no promotion yet: `stocktake promote`")
        return
    told = [
        [
            event.at.replace("T", " ").removesuffix("Z"),
            f"{event.version} {event.action}",
            f"{event.before or 'none'} → {event.after or 'none'}",
            event.by,
            event.why or "",
            told_figures(event),
        ]
        for event in events
    ]
    table("History", ["when (UTC)", "version", "champion", "who", "why", "figures"], told)


def _score(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"
