"""`stocktake evaluate`: a registered or saved model on a split of any root, as it would be served."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd

from stocktake.config.runs import EvaluateConfig
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.overlap import CHOSEN, TRAINED, describe_overlap, find_seen, overlap_label
from stocktake.data.photos import prepare_photos
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError
from stocktake.evaluation.calibration import Calibration
from stocktake.evaluation.evaluation import Evaluation
from stocktake.registry.gate_inputs import ENGINE_TAG
from stocktake.registry.lineage import Lineage, open_store, run_of_model, trained_bins
from stocktake.registry.models import fetch_model, resolve_alias, version_label
from stocktake.serving.predictor import FOLDER, Predictor
from stocktake.stages.run import dataset_record, plain, served_probabilities
from stocktake.tracking.runs import start_run


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Count every bin of the split with the exported model and log the figures as a run.

    Returns:
        `<split>/...` metrics with intervals.

    Raises:
        StocktakeError: no such model, root, or bins; or the model has seen some of the bins.
    """
    address = resolve_alias(config.model, config.tracking)  # the alias may move meanwhile
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch_model(address, Path(temporary) / "model", config.tracking)
        predictor = Predictor(folder / "artifacts" / FOLDER, threads=2)
        lineage = trained_bins(open_store(config.tracking), run_of_model(folder))
    labels = parse_task(config.task)
    if predictor.labels != labels:
        fitting = f"{predictor.labels[0]}-{predictor.labels[-1]}"
        raise StocktakeError(f"--task {config.task} does not fit {config.model}: give its own, {fitting}")
    manifest = build_manifest(config)
    bins, dropped = unseen_bins(config, manifest, lineage)
    photos = prepare_photos(manifest.source, bins, predictor.size, Path(config.workspace))
    tags = {
        "stage": "evaluate",
        "task": config.task,
        "data.root": manifest.source.root,
        "data.fingerprint": manifest.fingerprint,
        "model": config.model,
        "on": config.on,
        "overlap": overlap_label(is_auditable=not lineage.unknown, dropped=dropped),
        ENGINE_TAG: predictor.engine,
    }
    if (version := version_label(address)) is not None:
        tags["model.version"] = version
    with start_run(config.tracking, workspace=Path(config.workspace), name="evaluate", tags=tags) as run:
        run.log_params({"model": config.model, "on": config.on, "task": config.task, "seed": config.seed})
        run.log_params({"overlap": config.overlap, "overlap.dropped": dropped})
        run.log_params({f"split.{name}": value for name, value in plain(vars(manifest.split_config)).items()})
        run.log_dataset(dataset_record(manifest), "evaluation")
        evaluation = Evaluation(
            served_probabilities(predictor, photos, bins["hash"].tolist(), config.batch_size),
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


def unseen_bins(config: EvaluateConfig, manifest: Manifest, lineage: Lineage) -> tuple[pd.DataFrame, int]:
    """The bins to evaluate on, and how many were dropped because the model has seen them.

    Raises:
        StocktakeError: there are none; or the model has seen some, and they are not to be dropped.
    """
    root = manifest.source.root
    is_chosen = (manifest.bins["split"] == config.on) | (config.on == "all")
    if not is_chosen.any():
        raise StocktakeError(f"the {config.on} split of {root} is empty: choose another with --on")
    if lineage.unknown:
        print(f"warning: {config.model} is {lineage.warning}", file=sys.stderr)
    splits = TRAINED if config.on in ("train", "val") else CHOSEN
    by, distance = manifest.split_config.by, manifest.split_config.near_duplicate_distance
    seen = find_seen(manifest.bins, root, lineage.training, splits, by, distance) & is_chosen.to_numpy()
    bins = manifest.bins[is_chosen & ~seen].reset_index(drop=True)
    if seen.any():
        overlap = (
            f"{describe_overlap(config.model, manifest.bins[seen], int(is_chosen.sum()))} of {root}, --on {config.on}"
        )
        if config.overlap == "refuse":
            raise StocktakeError(f"{overlap}: give --overlap drop to leave them out, or another --on or --root")
        if bins.empty:
            raise StocktakeError(f"{overlap}: no bin is left to evaluate on, give another --on or --root")
        print(f"{overlap}: left out", flush=True)
    return bins, int(seen.sum())
