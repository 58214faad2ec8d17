"""What every rung of the ladder does alike: its run, its figures, its model."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from stocktake.bins.array_cache import ArrayCache
from stocktake.bins.manifest import Manifest, build_manifest
from stocktake.bins.photos import prepare_photos
from stocktake.bins.splits import Split
from stocktake.config import ImageConfig
from stocktake.evaluation.metrics import confusion_matrix
from stocktake.evaluation.report import write_report
from stocktake.models.checkpoint import save_model
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.models.inference import pick_device, predict
from stocktake.serving.counter import FOLDER
from stocktake.tracking.folder import DatasetRecord
from stocktake.tracking.runs import TrackedRun, start_run

MODEL = "model"


@dataclass(frozen=True)
class Bench:
    """What the rungs of one ladder share."""

    manifest: Manifest
    photos: ArrayCache
    """Every photo of the manifest, at the config's size."""


@dataclass(frozen=True)
class Rung:
    """A finished model."""

    stage: str
    metrics: dict[str, float]
    run: TrackedRun
    seconds: float
    backbone: str | None


def set_up(config: ImageConfig) -> Bench:
    """The manifest and its prepared photos; tells what the bins are.

    Raises:
        StocktakeError: bins, task or workspace cannot be used, or a quantity has no bin to learn from.
    """
    manifest = build_manifest(config)
    manifest.require_train_classes()
    counts = manifest.counts().sum()
    aside = f", {len(manifest.set_aside)} set aside" if len(manifest.set_aside) else ""
    print(
        f"{len(manifest.bins)} bins of task {config.task} in {manifest.source.root}: "
        f"{counts['train']} train, {counts['val']} val, {counts['test']} test{aside} "
        f"(data fingerprint {manifest.fingerprint})",
        flush=True,
    )
    bare = [f"{split} {label}" for split, label, n in manifest.counted() if n == 0]
    if bare:
        print(f"warning: no bin in {', '.join(bare)}; such a class counts 0 in macro-F1", flush=True)
    return Bench(manifest, prepare_photos(manifest.source, manifest.bins, config.image_size, Path(config.workspace)))


@contextmanager
def rung_run(
    config: ImageConfig, kind: type[ImageConfig], bench: Bench, stage: str, parent: TrackedRun | None
) -> Iterator[tuple[TrackedRun, float]]:
    """The run of one rung: a child of the ladder's, or its own. Yields it with the time it began.

    Of a ladder's config only the settings of this `kind` are logged: a majority class has no backbone.
    """
    began = time.monotonic()
    tags = run_tags(config, bench.manifest, stage)
    opened = (
        parent.child(stage, tags)
        if parent is not None
        else start_run(config.tracking, workspace=Path(config.workspace), name=stage, tags=tags)
    )
    with opened as run:
        log_setting(run, config, kind, bench.manifest)
        yield run, began


def run_tags(config: ImageConfig, manifest: Manifest, stage: str) -> dict[str, str]:
    """The tags by which runs are found and compared."""
    return {
        "stage": stage,
        "task": config.task,
        "data.root": manifest.source.root,
        "data.fingerprint": manifest.fingerprint,
    }


def log_setting(run: TrackedRun, config: ImageConfig, kind: type[ImageConfig], manifest: Manifest) -> None:
    """Params, the resolved config, the data, the environment."""
    names = {field.name for field in dataclasses.fields(kind)} - {"tracking", "workspace", "resume"}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    run.log_params(flatten(settings))
    (run.artifacts / "config.yaml").write_text(yaml.safe_dump(_plain(settings), sort_keys=False))
    installed = {f"{one.metadata['Name']}=={one.version}" for one in distributions()}
    (run.artifacts / "environment.txt").write_text("\n".join(sorted(installed, key=str.lower)) + "\n")
    run.log_dataset(dataset_record(manifest), "training")


def dataset_record(manifest: Manifest) -> DatasetRecord:
    """The manifest as MLflow's dataset input."""
    profile = {"bins": len(manifest.bins), "set_aside": len(manifest.set_aside), "outside": manifest.outside}
    profile |= {f"{split}/{label}": n for split, label, n in manifest.counted()}
    return DatasetRecord(
        name=Path(manifest.source.root).name or "bins",
        digest=manifest.fingerprint,
        source=manifest.source.root,
        rows=len(manifest.bins),
        profile=profile,
    )


def record_model(
    run: TrackedRun, model: CountingModel, config: ImageConfig, bench: Bench, *, step: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """Evaluate a finished model on val and test, save it, and hand all of it to its run.

    The test split is read here and nowhere else: everything was chosen on val before.

    Returns:
        `val/...` and `test/...` metrics with intervals.
    """
    from stocktake.serving.pyfunc import save_pyfunc

    metrics = record_split(run, model, config, bench, "val", batch_size=batch_size)
    metrics |= record_split(run, model, config, bench, "test", batch_size=batch_size)
    run.log_metrics(metrics, step=step)
    save_model(model, run.artifacts / "checkpoint")
    example = bench.manifest.source.photo(str(bench.manifest.bins["id"].iloc[0]))
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(temporary) / FOLDER
        export_model(model, exported)
        run.log_model(save_pyfunc(exported, run.folder / "models" / MODEL, example), MODEL)
    return metrics


def record_split(
    run: TrackedRun, model: CountingModel, config: ImageConfig, bench: Bench, split: Split, *, batch_size: int = 64
) -> dict[str, float]:
    """Evaluate a finished model on one split; the report goes to the run's artifacts.

    Returns:
        `SPLIT/...` metrics with intervals, for the run to log.
    """
    bins = bench.manifest.split(split)
    probabilities = predict(model, bench.photos, bins["hash"].tolist(), batch_size, pick_device())
    predictions = prediction_table(bins, probabilities, model.spec.labels)
    title = f"{run.run_folder.tags['stage']}, {split} split"
    metrics = write_report(
        run.artifacts / "evaluation", predictions, model.spec.labels, split=split, title=title, seed=config.seed
    )
    if split == "test":
        print_test_lines(metrics, predictions, model.spec.labels)
    return metrics


def prediction_table(
    bins: pd.DataFrame, probabilities: npt.NDArray[np.float64], labels: tuple[int, ...]
) -> pd.DataFrame:
    """A row a bin: id, group, quantity, predicted, confidence, and p_<label> for each label."""
    best = probabilities.argmax(1)
    columns = {f"p_{label}": probabilities[:, column] for column, label in enumerate(labels)}
    return bins[["id", "group", "quantity"]].assign(
        predicted=np.array(labels)[best], confidence=probabilities.max(1), **columns
    )


def print_test_lines(
    metrics: Mapping[str, float], predictions: pd.DataFrame, labels: tuple[int, ...], split: str = "test"
) -> None:
    """The first seed's lines of a test."""
    of = {name.removeprefix(f"{split}/"): value for name, value in metrics.items()}
    matrix = confusion_matrix(labels, predictions["quantity"].to_numpy(), predictions["predicted"].to_numpy())
    word = split.upper()
    print(f"{word}: loss={of['loss']:.6f} acc={of['accuracy']:.6f} macro_f1={of['macro_f1']:.6f}")
    print(f"{word}: macro_precision={of['macro_precision']:.6f} macro_recall={of['macro_recall']:.6f}")
    print(f"{word}: confusion_matrix=\n{matrix}", flush=True)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names, as they are given on the command line."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
