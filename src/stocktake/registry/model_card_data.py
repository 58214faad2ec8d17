"""The data of a model card, fetched from the store; and the card, attached to its version and its run."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocktake.evaluation.evaluation import FOLDER as EVALUATION
from stocktake.files import atomic_write
from stocktake.registry.gate_inputs import get_run
from stocktake.registry.model_card import (
    CONFUSION,
    RELIABILITY,
    SPLITS,
    ModelCardData,
    as_description,
    as_html,
    as_markdown,
)
from stocktake.registry.promotion import history
from stocktake.registry.versions import ModelRegistry, Version
from stocktake.serving.predictor import FOLDER as EXPORTED
from stocktake.tracking.connection import brief

FOLDER = "model-card"
"""Of the run's artifacts."""
_PER_CLASS, _CONFUSION = "test_per_class.csv", "test_confusion_matrix.json"
_DEPTH = 8
"""Of the folders in a model."""


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
    card = gather_card_data(registry, registry.version(str(version.number)))
    folder = workspace / "registry" / f"{version.name}-{version.number}"
    for name, text in {"card.md": as_markdown(card), "card.html": as_html(card)}.items():
        atomic_write(folder / name, text)
        if card.run_id:
            registry.client.log_artifact(card.run_id, str(folder / name), FOLDER)
    registry.client.update_model_version(version.name, str(version.number), description=as_description(card))
    return folder / "card.html"


def try_to_publish_card(registry: ModelRegistry, version: Version, workspace: Path) -> Path | None:
    """Call `publish_card` after what matters is done: an error is a warning."""
    try:
        page = publish_card(registry, version, workspace)
    except Exception as error:  # a store, a disk, an artifact of another form
        print(f"warning: no model card of {version.label}: {brief(error)}", file=sys.stderr)
        return None
    print(f"model card: {page}", flush=True)
    return page


def gather_card_data(registry: ModelRegistry, version: Version, *, figures_only: bool = False) -> ModelCardData:
    """Fetch what the store knows about a version; or without the history, the tables and the images."""
    events = [] if figures_only else history(registry)
    measured = [event for event in events if event.version == version.number and "latency_ms" in event.figures]
    serving = {**measured[-1].figures, "by": measured[-1].by} if measured else {}
    exported, size_mb = _exported(registry, version)
    run = get_run(registry, version.run_id)
    if run is None:
        tags = version.tags
        return ModelCardData(version, tags=tags, exported=exported, size_mb=size_mb, serving=serving, events=events)
    files = {} if figures_only else _evaluation_files(registry, run.info.run_id)
    datasets = run.inputs.dataset_inputs if run.inputs else []
    profile = read_json(datasets[0].dataset.profile.encode()) if datasets and datasets[0].dataset.profile else {}
    return ModelCardData(
        version,
        run_id=run.info.run_id,
        run_name=run.info.run_name,
        experiment=registry.client.get_experiment(run.info.experiment_id).name,
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        params=dict(sorted(run.data.params.items())),
        counts={key: int(n) for key, n in profile.items() if key.partition("/")[0] in SPLITS and "/" in key},
        per_class=list(csv.DictReader(io.StringIO(files.get(_PER_CLASS, b"").decode("utf-8", "replace")))),
        confusion=read_json(files.get(_CONFUSION, b"")),
        images={name: files[name] for name in (CONFUSION, RELIABILITY) if name in files},
        exported=exported,
        size_mb=size_mb,
        serving=serving,
        events=events,
    )


def read_json(text: bytes) -> dict[str, Any]:
    """Read a JSON object; anything else is an empty one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _evaluation_files(registry: ModelRegistry, run_id: str) -> dict[str, bytes]:
    """The files that a card shows, by name."""
    existing = {Path(file.path).name for file in registry.client.list_artifacts(run_id, EVALUATION)}
    files = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in existing & {_PER_CLASS, _CONFUSION, CONFUSION, RELIABILITY}:
            path = registry.client.download_artifacts(run_id, f"{EVALUATION}/{name}", temporary)
            files[name] = Path(path).read_bytes()
    return files


def _exported(registry: ModelRegistry, version: Version) -> tuple[Mapping[str, Any], float | None]:
    """model.json and the megabytes of the model's files; nothing where they cannot be read."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if version.model_id is None:
        return {}, None
    stores = registry.connection.stores
    try:
        size = _bytes_below(registry, version.model_id, None, _DEPTH)
        with tempfile.TemporaryDirectory() as temporary:
            path = download_artifacts(
                f"{version.uri}/artifacts/{EXPORTED}/model.json",
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
