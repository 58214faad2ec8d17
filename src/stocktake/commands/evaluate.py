"""`stocktake evaluate`: a registered or saved model on a split of any root, as it would be served."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from tqdm import trange

from stocktake.config.runs import EvaluateConfig
from stocktake.data.manifest import build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError
from stocktake.evaluation.calibration import Calibration
from stocktake.evaluation.evaluation import Evaluation
from stocktake.registry.models import fetch_model, resolve_alias, version_label
from stocktake.serving.predictor import FOLDER, Predictor
from stocktake.stages.run import dataset_record
from stocktake.tracking.runs import start_run


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Count every bin of the split with the exported model and log the figures as a run.

    Returns:
        `<split>/...` metrics with intervals.
    """
    address = resolve_alias(config.model, config.tracking)  # the alias may move meanwhile
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch_model(address, Path(temporary) / "model", config.tracking)
        predictor = Predictor(folder / "artifacts" / FOLDER, threads=2)
    labels = parse_task(config.task)
    if predictor.labels != labels:
        fitting = f"{predictor.labels[0]}-{predictor.labels[-1]}"
        raise StocktakeError(f"--task {config.task} does not fit {config.model}: give its own, {fitting}")
    manifest = build_manifest(config)
    bins = manifest.split(config.on)
    if bins.empty:
        raise StocktakeError(f"the {config.on} split of {manifest.source.root} is empty: choose another with --on")
    photos = prepare_photos(manifest.source, bins, predictor.size, Path(config.workspace))
    tags = {
        "stage": "evaluate",
        "task": config.task,
        "data.root": manifest.source.root,
        "data.fingerprint": manifest.fingerprint,
        "model": config.model,
        "on": config.on,
    }
    if (version := version_label(address)) is not None:
        tags["model.version"] = version
    with start_run(config.tracking, workspace=Path(config.workspace), name="evaluate", tags=tags) as run:
        run.log_params({"model": config.model, "on": config.on, "task": config.task, "seed": config.seed})
        run.log_dataset(dataset_record(manifest), "evaluation")
        parts = []
        for start in trange(0, len(bins), config.batch_size, desc="predicting", leave=False, disable=None):
            hashes = bins["hash"].iloc[start : start + config.batch_size].tolist()
            parts.append(predictor.probabilities(photos.read(hashes), calibrated=False))
        evaluation = Evaluation(
            np.concatenate(parts),
            bins,
            labels,
            config.on,
            title=f"{config.model}, {config.on} split",
            calibration=Calibration.read(predictor.description["calibration"]),
            seed=config.seed,
        )
        evaluation.log(run)
    print(evaluation.summary)
    metrics = evaluation.metrics
    low, high = metrics[f"{config.on}/macro_f1_low"], metrics[f"{config.on}/macro_f1_high"]
    print(
        f"{config.model} on {len(bins)} {config.on} bins of {manifest.source.root}: "
        f"macro-F1 {metrics[f'{config.on}/macro_f1']:.3f} [{low:.3f}, {high:.3f}], "
        f"accuracy {metrics[f'{config.on}/accuracy']:.3f}, RMSE {metrics[f'{config.on}/rmse']:.3f}"
    )
    return metrics
