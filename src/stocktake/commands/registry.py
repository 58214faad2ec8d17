"""`stocktake registry`: the versions of a model with their aliases and figures, and who promoted what, when and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from stocktake.config.versions import RegistryConfig
from stocktake.registry.model_card import format_figures
from stocktake.registry.model_card_data import gather_card_data
from stocktake.registry.promotion import Event, history
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.tables import show_table


def registry(config: RegistryConfig) -> dict[str, Any]:
    """Print the versions and the history.

    Returns:
        What --format json prints: `versions` and `history`, both in order.

    Raises:
        StocktakeError: there is no such registered model, naming those that exist.
    """
    models = ModelRegistry(config.tracking)
    with models.opened():
        rows = [_row(models, version) for version in models.versions()]
        events = history(models)
    listing = {"model": models.name, "versions": rows, "history": [asdict(event) for event in events]}
    if config.format == "json":
        print(json.dumps(listing, indent=2))
    else:
        _show(models.name, rows, events)
    return listing


def _row(models: ModelRegistry, version: Version) -> dict[str, Any]:
    card = gather_card_data(models, version, figures_only=True)
    metrics, tags = card.metrics, {**version.tags, **card.tags}
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
        "export_check": card.check.get("passed") if card.check else None,
        "size_mb": card.size_mb,
        "registered": f"{datetime.fromtimestamp(version.created_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "run": card.run_name or None,
        "run_id": version.run_id,
    }


def _show(name: str, rows: list[dict[str, Any]], events: list[Event]) -> None:
    versions = [
        {
            "version": row["version"],
            "aliases": row["aliases"],
            "stage": row["stage"],
            "task": row["task"],
            "val F1": row["val/macro_f1"],
            "test F1": _interval(row),
            "n": row["test/n"],
            "data": row["data.fingerprint"],
            "export check": {True: "passed", False: "not passed", None: "none"}[row["export_check"]],
            "date": row["registered"][:10],
            "run": f"{row['run'] or 'gone'} {(row['run_id'] or '')[:8]}",
        }
        for row in rows
    ]
    show_table(versions, title=f"Versions of {name}")
    print()
    if not events:
        print("no promotion yet: `stocktake promote`")
        return
    lines = [
        {
            "when (UTC)": event.at.replace("T", " ").removesuffix("Z"),
            "version": f"{event.version} {event.action}",
            "champion": f"{event.before or 'none'} → {event.after or 'none'}",
            "who": event.by,
            "why": event.reason,
            "figures": format_figures(event),
        }
        for event in events
    ]
    show_table(lines, title="History")


def _interval(row: dict[str, Any]) -> str:
    value, low, high = (row[f"test/macro_f1{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"
