"""What a model card is made of, fetched from the store; and the card, attached to its version and its run."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocktake.config import TrackingConfig
from stocktake.registry.model_card import CONFUSION, RELIABILITY, Facts, as_description, as_html, as_markdown
from stocktake.registry.promotion import history
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.tracking.connection import brief

FOLDER = "model-card"
"""Of the run's artifacts."""
_EVALUATION = "evaluation"
_COUNTER = "artifacts/exported/model.json"
_DEPTH = 8


def publish_card(registry: ModelRegistry, version: Version, workspace: Path) -> Path:
    """Write the card of a version as it is now.

    It becomes the version's description, the artifacts model-card/card.md and card.html of its run, and the same
    files in WORKSPACE/registry/NAME-NUMBER.

    Returns:
        The HTML page in the workspace.

    Raises:
        StocktakeError: the version is gone.
        OSError: the workspace cannot be written.
    """
    facts = gather_facts(registry, registry.version(str(version.number)))
    folder = workspace / "registry" / f"{version.name}-{version.number}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"card.md": as_markdown(facts), "card.html": as_html(facts)}.items():
        beside = folder / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / name)
        if facts.run_id:
            registry.client.log_artifact(facts.run_id, str(folder / name), FOLDER)
    registry.client.update_model_version(version.name, str(version.number), description=as_description(facts))
    return folder / "card.html"


def try_to_publish_card(registry: ModelRegistry, version: Version, workspace: Path) -> Path | None:
    """`publish_card`, after what matters is done: what goes wrong is a warning."""
    try:
        return publish_card(registry, version, workspace)
    except Exception as error:  # a store, a disk, an artifact of another form
        print(f"warning: no model card of {version.label}: {brief(error)}", file=sys.stderr)
        return None


def card_of_candidate(tracking: TrackingConfig, number: str, workspace: Path) -> Path | None:
    """The card of a version that a run has just registered; a warning if it cannot be written."""
    try:
        with ModelRegistry(tracking).opened() as registry:
            return try_to_publish_card(registry, registry.version(number), workspace)
    except Exception as error:
        print(f"warning: no model card of {tracking.model_name}/{number}: {brief(error)}", file=sys.stderr)
        return None


def gather_facts(registry: ModelRegistry, version: Version, *, figures_only: bool = False) -> Facts:
    """Everything that the store knows about a version; or without the history, the tables and the images."""
    from mlflow.exceptions import MlflowException

    events = [] if figures_only else history(registry.versions())
    measured = [event for event in events if event.version == version.number and "latency_ms" in event.figures]
    served = {**measured[-1].figures, "by": measured[-1].by} if measured else {}
    exported, size_mb = _exported(registry, version)
    try:
        run = registry.client.get_run(version.run_id) if version.run_id else None
    except MlflowException:
        run = None  # deleted
    if run is None:
        tags = version.tags
        return Facts(version, tags=tags, exported=exported, size_mb=size_mb, served=served, events=events)
    files = {} if figures_only else _evaluation(registry, run.info.run_id)
    datasets = run.inputs.dataset_inputs if run.inputs else []
    profile = read_json(datasets[0].dataset.profile.encode()) if datasets and datasets[0].dataset.profile else {}
    return Facts(
        version,
        run_id=run.info.run_id,
        run_name=run.info.run_name,
        experiment=registry.client.get_experiment(run.info.experiment_id).name,
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        params=dict(sorted(run.data.params.items())),
        counts={key: int(n) for key, n in profile.items() if key.startswith(("train/", "val/", "test/"))},
        per_class=list(csv.DictReader(io.StringIO(files.get("test_per_class.csv", b"").decode("utf-8", "replace")))),
        confusion=read_json(files.get("test_confusion_matrix.json", b"")),
        images={name: files[name] for name in (CONFUSION, RELIABILITY) if name in files},
        exported=exported,
        size_mb=size_mb,
        served=served,
        events=events,
    )


def read_json(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for what is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _evaluation(registry: ModelRegistry, run_id: str) -> dict[str, bytes]:
    """The files that a card shows, by name."""
    wanted = ("test_per_class.csv", "test_confusion_matrix.json", CONFUSION, RELIABILITY)
    there = {file.path for file in registry.client.list_artifacts(run_id, _EVALUATION)}
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in wanted:
            path = f"{_EVALUATION}/{name}"
            if path in there:
                found[name] = Path(registry.client.download_artifacts(run_id, path, temporary)).read_bytes()
    return found


def _exported(registry: ModelRegistry, version: Version) -> tuple[Mapping[str, Any], float | None]:
    """model.json and the megabytes of the model's files; nothing where they are out of reach."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if version.model_id is None:
        return {}, None
    stores = registry.connection.stores
    try:
        size = _bytes_below(registry, version.model_id, None, _DEPTH)
        with tempfile.TemporaryDirectory() as temporary:
            path = download_artifacts(
                f"{version.uri}/{_COUNTER}",
                dst_path=temporary,
                tracking_uri=stores.tracking,
                registry_uri=stores.registry,
            )
            return read_json(Path(path).read_bytes()), size / 1e6
    except (MlflowException, OSError):
        return {}, None


def _bytes_below(registry: ModelRegistry, model_id: str, folder: str | None, depth: int) -> int:
    files = registry.client.list_logged_model_artifacts(model_id, folder)
    return sum(
        (_bytes_below(registry, model_id, file.path, depth - 1) if depth else 0)
        if file.is_dir
        else int(file.file_size or 0)
        for file in files
    )
