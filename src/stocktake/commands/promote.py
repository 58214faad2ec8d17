"""`stocktake promote`: a version becomes the challenger and, if the gate lets it pass, the champion."""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from stocktake.config import PromoteConfig
from stocktake.errors import StocktakeError
from stocktake.registry.gate import GateResult, Rule, Served, run_gate
from stocktake.registry.gate_inputs import Challenger, gather
from stocktake.registry.model_card_data import try_to_publish_card
from stocktake.registry.models import fetch_model
from stocktake.registry.promotion import challenge, note_challenger, refuse, set_champion
from stocktake.registry.promotion_lock import promotion_lock
from stocktake.registry.versions import CHAMPION, ModelRegistry, Version
from stocktake.serving.predictor import Predictor

_PHOTOS, _SECONDS = 50, 5.0
"""A latency is the median of so many photos, or of as many as are counted in so many seconds."""
_WIDTH = 120
_RULE_LENGTH = 200


def promote(config: PromoteConfig) -> GateResult | None:
    """Move the alias challenger onto the version and then, unless a rule of the gate is missed, champion.

    Returns:
        What the gate found; None on the way to challenger.

    Raises:
        StocktakeError: refused, saying by which rules; no such version; or somebody else is promoting.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # a promotion is no run
    registry = ModelRegistry(config.tracking)
    with registry.opened():
        registry.aliases()  # says what there is before there is a lock
        with promotion_lock(registry.client, registry.name) as lock:
            version = registry.version(config.version)
            lock.still_held()
            challenge(registry, version)
            if config.to == "challenger":
                note_challenger(registry, version, config.reason)
                print(f"challenger: {version.label}")
                _card(registry, version, config)
                return None
            champion = registry.champion()
            served = measure(version, config)
            lock.still_held()
            challenger = gather(registry, version, champion, config.workspace)
            lock.still_held()
            judgement = run_gate(
                challenger.predictions, challenger.references, served, config.gate, trouble=challenger.trouble
            )
            show(judgement, version, champion)
            figures = _figures(judgement, challenger)
            if not judgement.passed and not config.force:
                refuse(registry, version, champion, config.reason, figures)
                _card(registry, version, config)
                raise StocktakeError(_refusal(judgement, version))
            forced = not judgement.passed
            set_champion(registry, lock, version, champion, forced=forced, reason=config.reason, figures=figures)
        verdict = f", by force: {len(judgement.failed)} of {len(judgement.rules)} rules missed" if forced else ""
        was = f", it was {champion.label}" if champion else ""
        print(f"champion: {version.label}{was}{verdict}; models:/{registry.name}@{CHAMPION}")
        if champion is not None:
            try_to_publish_card(registry, champion, Path(config.workspace))
        _card(registry, version, config)
        return judgement


def measure(version: Version, config: PromoteConfig) -> Served:
    """How the version answers on this machine.

    Raises:
        StocktakeError: its model cannot be fetched or loaded: such a one cannot be promoted by force either.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch_model(version.uri, Path(temporary) / "model", config.tracking)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        counter = Predictor(folder)
        photo = example_photo(folder)
    for _ in range(3):
        counter.predict([photo])
    seconds: list[float] = []
    while len(seconds) < _PHOTOS and (sum(seconds) < _SECONDS or not seconds):
        began = time.perf_counter()
        counter.predict([photo])
        seconds.append(time.perf_counter() - began)
    milliseconds = 1000 * statistics.median(seconds)
    return Served(milliseconds, size / 1e6, counter.engine, counter.description.get("check"))


def example_photo(folder: Path) -> bytes:
    """The photo of a model's input example; a grey one where it has none."""
    try:
        example = json.loads((folder / "input_example.json").read_text(encoding="utf-8"))
        return base64.b64decode(example["data"][0][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        from PIL import Image

        photo = io.BytesIO()
        Image.new("RGB", (500, 500), (128, 128, 128)).save(photo, "JPEG")
        return photo.getvalue()


def show(judgement: GateResult, version: Version, champion: Version | None) -> None:
    """Print all rules as a table, and the commands after which those that could not be judged can be."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    against = champion.label if champion else "the baselines, there is no champion yet"
    console = Console(width=max(_WIDTH, Console().width) if Console().is_terminal else _WIDTH)
    title = f"The gate: {version.label} against {against}"
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "rule", "value", "limit", "margin", ""):
        table.add_column(name, overflow="fold")
    for rule in judgement.rules:
        cells = ["passed" if rule.passed else "FAILED", rule.name, rule.found, rule.wanted, rule.margin, rule.note]
        table.add_row(*map(escape, cells), style=None if rule.passed else "bold")
    console.print(table)
    for rule in judgement.failed:
        if rule.way_out:
            print(f"for the rule `{rule.name}`:\n  {rule.way_out}", flush=True)


def _refusal(judgement: GateResult, version: Version) -> str:
    failed = judgement.failed
    rules = "; ".join(str(rule) + (f" (make it with: {rule.way_out})" if rule.way_out else "") for rule in failed)
    return (
        f"{version.label} is refused by {len(failed)} of {len(judgement.rules)} rules: {rules}. It stays the"
        " challenger; --force --reason TEXT promotes it nonetheless, and is logged"
    )


def _figures(judgement: GateResult, challenger: Challenger) -> dict[str, Any]:
    """What the history keeps."""
    rounded = {
        name: round(value, 6) if isinstance(value, float) else value for name, value in judgement.figures.items()
    }
    rules: list[Rule] = judgement.failed
    return {
        **rounded,
        "task": challenger.task,
        "data.fingerprint": challenger.fingerprint,
        "git.commit": challenger.commit,
        **({"failed": [str(rule)[:_RULE_LENGTH] for rule in rules]} if rules else {}),
    }


def _card(registry: ModelRegistry, version: Version, config: PromoteConfig) -> None:
    page = try_to_publish_card(registry, version, Path(config.workspace))
    if page is not None:
        print(f"model card: {page}", flush=True)
