"""One trial of a study: settings from Optuna, a child run, a value for each objective."""

from __future__ import annotations

import dataclasses
import math
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import optuna
from optuna.trial import Trial

from stocktake.config.runs import ImageConfig
from stocktake.config.training import FinetuneConfig
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import save_model
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.serving.predictor import Predictor
from stocktake.stages.prepare import PreparedData
from stocktake.stages.run import evaluate_split, log_config, run_tags, split_probabilities
from stocktake.stages.table import STAGES
from stocktake.tracking.runs import TrackedRun, start_run
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.study import KIND, OBJECTIVES, REASON, StudySpec, failure_kind

CHECKPOINT = "checkpoint"
"""Where a completed trial's model lies in its run's artifacts."""
_LATENCY_PHOTOS = 30


def run_trial(
    trial: Trial, spec: StudySpec, parent: Path, prepared: PreparedData, on_suggested: Callable[[], None]
) -> tuple[float, ...]:
    """Train what the trial says in a child run. The test split is not read.

    A trial that is repeated because its process was killed goes on from its last checkpoint on this machine.

    Args:
        trial: of Optuna.
        spec: of its study.
        parent: folder of the study's run.
        prepared: the study's data.
        on_suggested: called when the trial's parameters are stored, for the next worker's sampler to see.

    Returns:
        One value an objective.

    Raises:
        optuna.TrialPruned: the study's pruner ended it.
        Exception: what the training failed for; the trial's attributes hold the reason.
    """
    try:
        config = with_overrides(spec.config, spec.space.suggest(trial))
        on_suggested()
        outcome = _run(trial, spec, config, parent, prepared)
    except Exception as error:
        trial.set_user_attr(REASON, " ".join(f"{type(error).__name__}: {error}".split())[:500])
        trial.set_user_attr(KIND, failure_kind(error))
        raise
    if isinstance(outcome, optuna.TrialPruned):
        raise outcome
    return outcome


def _run(
    trial: Trial, spec: StudySpec, config: ImageConfig, parent: Path, prepared: PreparedData
) -> tuple[float, ...] | optuna.TrialPruned:
    """The trial's child run: its values, or why it was pruned, which is no failure of the run."""
    earlier = parent.parent / str(trial.user_attrs.get("folder"))
    if isinstance(config, FinetuneConfig):
        from stocktake.training.checkpoints import find_checkpoint  # Lightning takes seconds to import

        if find_checkpoint(earlier / "checkpoints"):
            config = dataclasses.replace(config, resume=str(earlier))
    tags = run_tags(config, prepared.manifest, "trial")
    tags |= {"trial": str(trial.number), "trial.stage": spec.stage, "trial.state": "running"}
    name, workspace = f"trial-{trial.number:03d}", Path(config.workspace)
    with start_run(config.tracking, workspace=workspace, name=name, tags=tags, parent=parent) as run:
        trial.set_user_attr("host", socket.gethostname())
        trial.set_user_attr("folder", run.folder.name)
        trial.set_user_attr("run", run.run_id)
        log_config(run, config, STAGES[spec.stage].config, prepared.manifest)
        try:
            with (run.artifacts / "log.txt").open("w", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
                values = train_trial(run, spec.stage, config, prepared, trial, spec.objectives)
        except optuna.TrialPruned as pruned:
            run.set_tags({"trial.state": "pruned", "trial.reason": str(pruned)})
            return pruned
        except BaseException as error:
            run.set_tags({"trial.state": "failed" if isinstance(error, Exception) else "interrupted"})
            raise
        run.set_tags({"trial.state": "complete"})
        return values


def train_trial(
    run: TrackedRun,
    stage: str,
    config: ImageConfig,
    prepared: PreparedData,
    trial: Trial | None = None,
    objectives: tuple[str, ...] = OBJECTIVES[:1],
) -> tuple[float, ...]:
    """Train, evaluate on val and keep the model, never looking at test.

    Args:
        run: its run.
        stage: what is trained.
        config: the stage's, with the trial's settings.
        prepared: the data; its photos may have another size.
        trial: gets each epoch's value reported, and may be pruned.
        objectives: of the study.

    Returns:
        One value an objective.
    """
    photos = prepare_photos(prepared.manifest.source, prepared.manifest.bins, config.image_size, Path(config.workspace))
    prepared = dataclasses.replace(prepared, photos=photos)
    epochs = 0

    def on_epoch(figures: Mapping[str, float], epoch: int) -> bool:
        nonlocal epochs
        epochs = epoch
        if trial is not None and len(objectives) == 1:  # Optuna prunes no trials with several objectives
            report_epoch(trial, figures["val/macro_f1"], epoch, is_last=epoch == getattr(config, "epochs", 1))
        return False

    model = STAGES[stage].train(run, config, prepared, on_epoch)
    probabilities = split_probabilities(model, prepared, "val", getattr(config, "batch_size", 64))
    evaluation = evaluate_split(run, model, config, prepared, "val", probabilities)
    evaluation.log(run, epochs + 1)
    metrics = dict(evaluation.metrics)
    if "latency_ms" in objectives:
        metrics["latency_ms"] = measure_latency(model, prepared)
        run.log_metrics({"latency_ms": metrics["latency_ms"]}, step=epochs + 1)
    values = tuple(metrics[name] for name in objectives)
    if not all(math.isfinite(value) for value in values):
        raise StocktakeError(f"{', '.join(objectives)} must be finite: {values}")
    save_model(model, run.artifacts / CHECKPOINT)
    return values


def report_epoch(trial: Trial, value: float, epoch: int, *, is_last: bool) -> None:
    """Report an epoch's val/macro_f1 to the study.

    Raises:
        optuna.TrialPruned: the study's pruner ends the trial; not after its last epoch, which would save nothing.
    """
    trial.report(value, epoch)
    if not is_last and trial.should_prune():
        raise optuna.TrialPruned(f"pruned after epoch {epoch} at val/macro_f1 {value:.3f}")


def measure_latency(model: CountingModel, prepared: PreparedData) -> float:
    """Milliseconds of one photo, from JPEG bytes to a quantity: the median over some val photos, by the exported model.

    It is the time of one thread of the processor, so that other trials on the machine do not count.
    """
    source, bins = prepared.manifest.source, prepared.manifest.split("val")
    photos = [source.photo(str(bin_id)) for bin_id in bins["id"].head(_LATENCY_PHOTOS)]
    with tempfile.TemporaryDirectory() as exported:
        export_model(model, Path(exported))
        predictor = Predictor(Path(exported), threads=1, engine="onnxruntime")  # computes in the thread that calls it
    predictor.predict(photos[:2])  # the first ones allocate
    seconds = []
    for photo in photos:
        start = time.thread_time()
        predictor.predict([photo])
        seconds.append(time.thread_time() - start)
    return 1000 * statistics.median(seconds)
