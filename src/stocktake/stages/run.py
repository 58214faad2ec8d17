"""What every stage does alike: its run, its figures, its model."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from tqdm import trange

from stocktake import distributed
from stocktake.config.runs import ImageConfig, TrackingConfig
from stocktake.data.array_cache import ArrayCache
from stocktake.data.ids_by_split import FILE, RUN_COLUMNS, write_ids_by_split
from stocktake.data.manifest import Manifest
from stocktake.data.splits import Split
from stocktake.errors import StocktakeError
from stocktake.evaluation.calibration import Calibration, fit_calibration
from stocktake.evaluation.evaluation import Evaluation
from stocktake.models.checkpoint import save_model
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.models.inference import pick_device, predict
from stocktake.registry.gate_inputs import ENGINE_TAG
from stocktake.serving.predictor import FOLDER, Predictor
from stocktake.stages import ROOT
from stocktake.stages.prepare import PreparedData
from stocktake.stages.table import STAGES
from stocktake.tracking.attached_run import attached_run_id, take_attached_run_id
from stocktake.tracking.local_store import FINISHED, DatasetRecord, LocalRun
from stocktake.tracking.runs import TrackedRun, start_run
from stocktake.tracking.sync import end_run

MODEL = "model"
_FITTED = ("temperature", "set_threshold", "n")
"""What of the calibration is logged as metrics."""
_JOB = "ddp.job"
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class StageResult:
    """A finished model."""

    stage: str
    metrics: dict[str, float]
    run: TrackedRun
    seconds: float
    backbone: str | None


@contextmanager
def stage_run(
    config: ImageConfig, kind: type[ImageConfig], prepared: PreparedData, stage: str, parent: TrackedRun | None
) -> Iterator[tuple[TrackedRun, float]]:
    """The run of one stage: a child of the ladder's, or its own. Yields it with the time it began.

    Of a ladder's config only the settings of this `kind` are logged: a majority class has no backbone. In a
    distributed job the first process has the run, and the others one that is thrown away.
    """
    began = time.monotonic()
    tags = run_tags(config, prepared.manifest, stage)
    with parent.child(stage, tags) if parent is not None else own_run(config, stage, tags) as run:
        if distributed.is_rank_zero():
            log_config(run, config, kind, prepared.manifest)
        yield run, began


@contextmanager
def own_run(
    config: ImageConfig,
    name: str,
    tags: Mapping[str, object],
    *,
    parent: Path | None = None,
    reopen: Path | None = None,
) -> Iterator[TrackedRun]:
    """A run of this process, or of the first one of a distributed job, which goes on with it after a restart.

    Args:
        config: its tracking and workspace.
        name: of the run.
        tags: of the run.
        parent: folder of another process's run, below which it is.
        reopen: folder of an earlier run to go on with.
    """
    workspace = Path(config.workspace)
    if not distributed.is_rank_zero():
        take_attached_run_id()
        with tempfile.TemporaryDirectory() as folder:  # only rank 0 logs
            yield TrackedRun.create(Path(folder), name=name)
        return
    job, restarts = distributed.job_id(), distributed.world_from_env().restarts
    interrupted = find_run(workspace / "runs", job) if job and restarts else None
    reason = LocalRun.open(interrupted).state.reason if interrupted else None
    reopen = interrupted or reopen or _same_run(getattr(config, "resume", None))
    with start_run(config.tracking, workspace=workspace, name=name, tags=tags, parent=parent, reopen=reopen) as run:
        if job:
            run.set_tags({_JOB: job, "restarts": restarts})
        if interrupted:
            print(f"restart {restarts} ({reason}): resuming {run.folder}", flush=True)
        yield run


def _same_run(resume: str | None) -> Path | None:
    """The folder to resume, if it is of the MLflow run that this process was given: an interrupted job goes on."""
    run_id = attached_run_id()
    if resume is None or not run_id or not (Path(resume) / "run.json").is_file():
        return None
    return Path(resume) if LocalRun.open(Path(resume)).state.attach_run_id == run_id else None


def find_run(runs: Path, job: str) -> Path | None:
    """The folder of the latest run of a distributed job, unless it has finished."""
    found: list[LocalRun] = []
    for path in runs.glob("*/tags.json"):
        try:
            if json.loads(path.read_text(encoding="utf-8")).get(_JOB) == job:
                found.append(LocalRun.open(path.parent))
        except (OSError, ValueError, StocktakeError):  # half written by a process that died
            continue
    latest = max(found, key=lambda folder: folder.state.start_ms, default=None)
    return latest.folder if latest and latest.state.status != FINISHED else None


def end_failed_run(folder: Path, tracking: TrackingConfig, status: str, reason: str) -> None:
    """End a run whose process has failed or was killed; wait for a process that is still closing it."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while not end_run(folder, tracking, status=status, reason=reason):
        if LocalRun.open(folder).state.status == FINISHED or time.monotonic() > deadline:
            break
        time.sleep(0.2)


def run_tags(config: ImageConfig, manifest: Manifest, stage: str) -> dict[str, str]:
    """The tags by which runs are found and compared."""
    return {
        "stage": stage,
        "task": config.task,
        "data.root": shown_root(manifest),
        "data.fingerprint": manifest.fingerprint,
    }


def shown_root(manifest: Manifest) -> str:
    """The root as whoever started this knows it: a training job reads it from a folder of its own."""
    return os.environ.get(ROOT) or manifest.source.root


def log_config(run: TrackedRun, config: ImageConfig, kind: type[ImageConfig], manifest: Manifest) -> None:
    """Params, the resolved config, the data, the ids by split, the environment."""
    names = {field.name for field in dataclasses.fields(kind)} - {"tracking", "workspace", "resume"}
    as_decided = dataclasses.replace(config, split=manifest.split_config)
    settings = {name: value for name, value in dataclasses.asdict(as_decided).items() if name in names}
    run.log_params(flatten(settings))
    (run.artifacts / "config.yaml").write_text(yaml.safe_dump(plain(settings), sort_keys=False))
    installed = {f"{one.metadata['Name']}=={one.version}" for one in distributions()}
    (run.artifacts / "environment.txt").write_text("\n".join(sorted(installed, key=str.lower)) + "\n")
    write_ids_by_split(run.artifacts / FILE, manifest.bins[RUN_COLUMNS])
    run.log_dataset(dataset_record(manifest), "training")


def dataset_record(manifest: Manifest) -> DatasetRecord:
    """The manifest as MLflow's dataset input."""
    profile = {"bins": len(manifest.bins), "rejected": len(manifest.rejected), "out_of_range": manifest.out_of_range}
    profile |= {f"{split}/{label}": n for split, label, n in manifest.counted()}
    return DatasetRecord(
        name=Path(shown_root(manifest)).name or "bins",
        digest=manifest.fingerprint,
        source=shown_root(manifest),
        rows=len(manifest.bins),
        profile=profile,
    )


def train_stage(stage: str, config: Any, prepared: PreparedData, parent: TrackedRun | None = None) -> StageResult:
    """Train a stage, evaluate and log it; alone, or as a child of the ladder's run."""
    row = STAGES[stage]
    name = stage if distributed.world().size == 1 else "ddp"
    with stage_run(config, row.config, prepared, name, parent) as (run, began):
        model = row.train(run, config, prepared)
        after = getattr(config, "epochs", -1) + 1  # beyond the steps of the epochs: these are the run's figures
        batch_size = getattr(config, "batch_size", 64)
        metrics = evaluate_and_log(run, model, config, prepared, step=after, batch_size=batch_size)
    return StageResult(name, metrics, run, time.monotonic() - began, model.spec.options.get("backbone"))


def evaluate_and_log(
    run: TrackedRun,
    model: CountingModel,
    config: ImageConfig,
    prepared: PreparedData,
    *,
    step: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Evaluate a finished model on val, save and export it, evaluate the export on test, and log all of it to its run.

    The test split is read here and nowhere else: everything was chosen on val before. Its figures are those of the
    exported model, in the engine and number format that serve it. The processes of a distributed job call this
    together: all predict val, the first one does the rest.

    Returns:
        `val/...` and `test/...` metrics with intervals.
    """
    val = split_probabilities(model, prepared, "val", batch_size)

    def log() -> dict[str, float]:
        quantities = prepared.manifest.split("val")["quantity"].to_numpy()
        calibration = fit_calibration(val, quantities, model.spec.labels)
        metrics = {f"calibration/{name}": float(getattr(calibration, name)) for name in _FITTED}
        run.log_metrics(metrics, step=step)
        of_val = evaluate_split(run, model, config, prepared, "val", val, calibration)
        of_val.log(run, step)
        predictor = _keep_model(run, model, prepared, calibration, calibration.apply(val))
        run.set_tags({ENGINE_TAG: predictor.engine})
        test = served_probabilities(predictor, prepared.photos, prepared.manifest.split("test")["hash"].tolist())
        of_test = evaluate_split(run, model, config, prepared, "test", test, calibration)
        of_test.log(run, step)
        print(of_test.summary, flush=True)
        metrics |= of_val.metrics | of_test.metrics
        return metrics

    return distributed.run_on_rank_zero(log)


def _keep_model(
    run: TrackedRun,
    model: CountingModel,
    prepared: PreparedData,
    calibration: Calibration,
    val: npt.NDArray[np.float64],
) -> Predictor:
    """Save and export the model; return the export, loaded."""
    from stocktake.serving.export_check import PHOTOS, check_export
    from stocktake.serving.pyfunc import save_pyfunc

    save_model(model, run.artifacts / "checkpoint")
    bins = prepared.manifest.split("val")
    rows = np.linspace(0, len(bins) - 1, min(PHOTOS, len(bins))).astype(int)
    shown = bins.iloc[rows]
    example = prepared.manifest.source.photo(str(shown["id"].iloc[0]))
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(temporary) / FOLDER
        export_model(model, exported, {**asdict(calibration), "fitted_on": "val"})
        check_export(exported, shown["id"].tolist(), prepared.photos.read(shown["hash"].tolist()), val[rows])
        run.log_model(save_pyfunc(exported, run.folder / "models" / MODEL, example), MODEL)
        return Predictor(exported, threads=2)


def served_probabilities(
    predictor: Predictor, photos: ArrayCache, hashes: list[str], batch_size: int = 64
) -> npt.NDArray[np.float64]:
    """(n, K) probabilities of prepared photos by an exported model, uncalibrated."""
    parts = []
    for start in trange(0, len(hashes), batch_size, desc="predicting", leave=False, disable=None):
        parts.append(predictor.probabilities(photos.read(hashes[start : start + batch_size]), calibrated=False))
    return np.concatenate(parts)


def split_probabilities(
    model: CountingModel, prepared: PreparedData, split: Split, batch_size: int = 64
) -> npt.NDArray[np.float64]:
    """(n, K) probabilities of a split's bins, uncalibrated. The processes of a distributed job call this together."""
    return predict(model, prepared.photos, prepared.manifest.split(split)["hash"].tolist(), batch_size, pick_device())


def evaluate_split(
    run: TrackedRun,
    model: CountingModel,
    config: ImageConfig,
    prepared: PreparedData,
    split: Split,
    probabilities: npt.NDArray[np.float64],
    calibration: Calibration | None = None,
) -> Evaluation:
    """The evaluation of a split's probabilities, titled by the run's stage."""
    return Evaluation(
        probabilities,
        prepared.manifest.split(split),
        model.spec.labels,
        split,
        title=f"{run.tags['stage']}, {split} split",
        calibration=calibration,
        seed=config.seed,
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names, as they are given on the command line."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def plain(value: Any) -> Any:
    """Nested settings as YAML takes them: no tuples."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
