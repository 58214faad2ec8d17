"""`stocktake promote`: a version becomes the challenger and, if the gate lets it pass, the champion."""

from __future__ import annotations

import base64
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.config.versions import PromoteConfig
from stocktake.data.overlap import overlap_label
from stocktake.errors import StocktakeError
from stocktake.registry.gate import GateResult, ServingStats, comparison_key, run_gate
from stocktake.registry.gate_inputs import GateInputs, gather_inputs
from stocktake.registry.model_card_data import try_to_publish_card
from stocktake.registry.models import fetch_model
from stocktake.registry.promotion import record_challenger, record_rejection, set_challenger, set_champion
from stocktake.registry.split_uses import SplitUse, record_outcome, record_use
from stocktake.registry.versions import CHAMPION, ModelRegistry, Version
from stocktake.serving.predictor import Predictor
from stocktake.tables import show_table

if TYPE_CHECKING:
    import pandas as pd

_PHOTOS, _SECONDS = 50, 5.0
"""A latency is the median of so many photos, or of as many as are counted in so many seconds."""
_RULE_LENGTH = 200


class GateError(StocktakeError):
    """The gate rejected the version; it stays the challenger."""

    def __init__(self, version: Version, result: GateResult) -> None:
        self.result = result
        rules = "; ".join(f"{rule} (make it with: {rule.hint})" if rule.hint else str(rule) for rule in result.failed)
        super().__init__(
            f"{version.label} is refused by {len(result.failed)} of {len(result.rules)} rules: {rules}. It stays the"
            " challenger; --force --reason TEXT promotes it nonetheless, and is logged"
        )


def promote(config: PromoteConfig) -> GateResult | None:
    """Move the alias challenger onto the version and then, unless a rule of the gate is missed, champion.

    Returns:
        The gate's result; None on the way to challenger.

    Raises:
        GateError: rejected, naming the rules.
        ChampionMovedError: somebody else promotes or rolls back.
        StocktakeError: no such version, or it is the champion.
    """
    registry, workspace = ModelRegistry(config.tracking), Path(config.workspace)
    with registry.opened():
        version = registry.version(config.version)
        set_challenger(registry, version)
        if config.to == "challenger":
            record_challenger(registry, version, config.reason)
            print(f"challenger: {version.label}")
            try_to_publish_card(registry, version, workspace)
            return None
        champion = registry.champion()
        serving = measure(version, config)
        inputs = gather_inputs(registry, version, champion, config.workspace, config.overlap, config.gate.metric)
        for warning in inputs.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if inputs.dropped:
            print(f"--overlap drop: {inputs.dropped} test bins that a model was trained on are left out", flush=True)

        def count_use(bins: pd.DataFrame) -> SplitUse:
            return record_use(registry, comparison_key(bins, inputs.references, config.gate.metric), bins)

        result = run_gate(inputs.predictions, inputs.references, serving, config.gate, count_use, reason=inputs.reason)
        if result.use is not None:
            record_outcome(registry, result.use, has_gain=result.has_gain)
        show(result, version, champion)
        figures = _figures(result, inputs)
        if not result.passed and not config.force:
            record_rejection(registry, version, champion, config.reason, figures)
            try_to_publish_card(registry, version, workspace)
            raise GateError(version, result)
        forced = not result.passed
        set_champion(registry, version, champion, forced=forced, reason=config.reason, figures=figures)
        by_force = f", by force: {len(result.failed)} of {len(result.rules)} rules missed" if forced else ""
        was = f", it was {champion.label}" if champion else ""
        print(f"champion: {version.label}{was}{by_force}; models:/{registry.name}@{CHAMPION}", flush=True)
        for changed in filter(None, (champion, version)):
            try_to_publish_card(registry, changed, workspace)
        return result


def measure(version: Version, config: PromoteConfig) -> ServingStats:
    """Measure how the version answers on this machine.

    Raises:
        StocktakeError: its model cannot be fetched or loaded: such a one cannot be promoted by force either.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch_model(version.uri, Path(temporary) / "model", config.tracking)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        predictor = Predictor(folder)
        photo = example_photo(folder)
    for _ in range(3):
        predictor.predict([photo])
    seconds: list[float] = []
    while len(seconds) < _PHOTOS and (sum(seconds) < _SECONDS or not seconds):
        start = time.perf_counter()
        predictor.predict([photo])
        seconds.append(time.perf_counter() - start)
    milliseconds = 1000 * statistics.median(seconds)
    return ServingStats(milliseconds, size / 1e6, predictor.engine, predictor.description.get("check"))


def example_photo(folder: Path) -> bytes:
    """Return the photo of a model's input example; a grey one where it has none."""
    try:
        example = json.loads((folder / "input_example.json").read_text(encoding="utf-8"))
        return base64.b64decode(example["data"][0][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        from PIL import Image

        photo = io.BytesIO()
        Image.new("RGB", (500, 500), (128, 128, 128)).save(photo, "JPEG")
        return photo.getvalue()


def show(result: GateResult, version: Version, champion: Version | None) -> None:
    """Print all rules as a table, the remarks, and the commands that make what rules lacked."""
    rows = [
        {
            "": "passed" if rule.passed else "FAILED",
            "rule": rule.name,
            "value": rule.shown_value,
            "limit": rule.shown_limit,
            "margin": rule.margin,
            "note": rule.note,
        }
        for rule in result.rules
    ]
    against = champion.label if champion else "the baselines, there is no champion yet"
    title = f"The gate: {version.label} against {against}"
    show_table(rows, title=title, style=lambda row: None if row[""] == "passed" else "bold")
    for remark in result.remarks:
        print(remark, flush=True)
    for rule in result.failed:
        if rule.hint:
            print(f"for the rule `{rule.name}`:\n  {rule.hint}", flush=True)


def _figures(result: GateResult, inputs: GateInputs) -> dict[str, Any]:
    """What the history keeps."""
    figures = {name: round(value, 6) if isinstance(value, float) else value for name, value in result.figures.items()}
    figures |= {"task": inputs.task, "data.fingerprint": inputs.fingerprint, "git.commit": inputs.commit}
    figures["overlap"] = overlap_label(is_auditable=not inputs.warnings, dropped=inputs.dropped)
    failed = [str(rule)[:_RULE_LENGTH] for rule in result.failed]
    return figures | ({"failed": failed} if failed else {})
