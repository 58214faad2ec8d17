"""One trial of a study: settings from Optuna, a child run, a value. And what a study's processes know of it."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import Trial, TrialState

from stocktake import distributed
from stocktake.commands.classical import train_classical
from stocktake.commands.ddp import launch
from stocktake.commands.finetune import train_network
from stocktake.commands.frozen import train_frozen
from stocktake.commands.stage_runs import (
    PreparedData,
    end_failed_run,
    evaluate_split,
    flatten,
    log_config,
    own_run,
    prepare_data,
    run_tags,
    split_probabilities,
)
from stocktake.config import FinetuneConfig, TrackingConfig, TrialConfig
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.models.checkpoint import save_model
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.serving.predictor import Predictor
from stocktake.tracking.local_store import FAILED, write_json
from stocktake.tracking.runs import TrackedRun
from stocktake.training.fit import EpochVerdict
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.search_defaults import STAGES, StageConfig
from stocktake.tuning.space import Space
from stocktake.tuning.storage import open_storage
from stocktake.tuning.study import OBJECTIVES, failure_kind, finish, load_study, make_pruner

CHECKPOINT = "checkpoint"
"""Where a completed trial's model lies in its run's artifacts."""
STORAGE = "STOCKTAKE_STUDY_STORAGE"
"""Variable of the environment by which the processes of a trial know the study's database."""
_STUDY = "study.json"
_NOT_OF_THE_STUDY = ("tracking", "workspace", "resume")
_LATENCY_PHOTOS = 30


@dataclass(frozen=True)
class StudyFolder:
    """A study as its run's folder has it: all that a process needs to take part."""

    path: Path
    """Of the run of `tune`."""
    stage: str
    objectives: tuple[str, ...]
    sampler: str
    pruner: str
    seed: int
    trials: int
    nproc: int
    """Processes a trial."""
    space: Space
    config: StageConfig
    """What all trials have in common."""
    database: str | None = field(repr=False)
    """URL of the study's database, which may hold a password and is not written down; None: a journal in the folder."""

    def write(self) -> None:
        """Keep it in the folder; the database is named by the user again when the study goes on."""
        settings = dataclasses.asdict(self.config)
        content = {
            "stage": self.stage,
            "objectives": self.objectives,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seed": self.seed,
            "trials": self.trials,
            "nproc": self.nproc,
            "space": json.loads(self.space.to_json()),
            "settings": {name: settings[name] for name in settings if name not in _NOT_OF_THE_STUDY},
            "in_database": self.database is not None,
        }
        write_json(self.path / _STUDY, content)

    @classmethod
    def open(cls, path: Path, tracking: TrackingConfig, database: str | None = None) -> StudyFolder:
        """The study of a run's folder.

        Raises:
            StocktakeError: there is none in it, or its database is not given.
        """
        try:
            content = json.loads((path / _STUDY).read_text(encoding="utf-8"))
            in_database = bool(content.pop("in_database"))
            settings = flatten(content.pop("settings"))
            config = with_overrides(STAGES[content["stage"]](), settings)
            config = dataclasses.replace(config, tracking=tracking, workspace=str(path.parent.parent))
            content["objectives"] = tuple(content["objectives"])
            space = Space.from_json(json.dumps(content.pop("space")))
            found = cls(path=path, space=space, config=config, database=database, **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StocktakeError(
                f"{path} holds no study ({type(error).__name__} in {_STUDY}): give the folder of a run of tune,"
                " such as workspace/runs/tune-1a2b3c"
            ) from None
        if in_database != (database is not None):
            needed = "in a database: give its --storage" if in_database else "in its own folder: leave out --storage"
            raise StocktakeError(f"the study of {path} is {needed}")
        return found

    @property
    def lock(self) -> FileLock:
        """Held by whoever takes a trial, or ends one that is not its own."""
        return FileLock(self.path / "study.lock")

    @property
    def storage(self) -> str | Path:
        """For `open_storage`."""
        return self.database or self.path / "study.journal"

    def load(self) -> Study:
        """The study, opened for this process."""
        epochs = self.space.highest("epochs", getattr(self.config, "epochs", 1))
        pruner = make_pruner(self.pruner, int(epochs), self.objectives)
        return load_study(open_storage(self.storage), self.path.name, pruner)


def trial(config: TrialConfig) -> None:
    """`stocktake trial`: train a study's trial in the processes that torchrun has started, and tell the study.

    Raises:
        StocktakeError: no such study or trial, or what the training failed for; its worker tells the study of that.
    """
    folder = StudyFolder.open(Path(config.study), config.tracking, os.environ.get(STORAGE))
    given = folder.config
    timeout = given.training.collective_timeout if isinstance(given, FinetuneConfig) else 300.0
    with distributed.process_group(timeout=timeout, expected=folder.nproc):
        study = folder.load() if distributed.is_rank_zero() else None
        own = None if study is None else _trial(study, config.number)
        with _silent():
            prepared = prepare_data(folder.config)
        state, values = _run(folder, own, config.number, prepared)
        if study is not None:
            finish(study, config.number, state, values)


def _trial(study: Study, number: int) -> Trial:
    numbered = [trial for trial in study.get_trials(deepcopy=False) if trial.number == number]
    if not numbered or numbered[0].state is not TrialState.RUNNING:
        raise StocktakeError(f"--number {number}: no trial of the study {study.study_name} that is in work")
    return Trial(study, numbered[0]._trial_id)


def run_trial(folder: StudyFolder, study: Study, trial: Trial, prepared: PreparedData) -> TrialState:
    """Train what the trial says in a child run, and tell the study how it ended.

    A trial that was begun before goes on in its own run, from its last checkpoint. The test split is not read. Where
    the study's trials have several processes, they are started here.

    Returns:
        COMPLETE, PRUNED or FAIL.

    Raises:
        KeyboardInterrupt, SystemExit: the process was asked to end; the trial stays RUNNING, for a resumed study.
    """
    try:
        if folder.nproc > 1:
            return _launch(folder, study, trial)
        state, values = _run(folder, trial, trial.number, prepared)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finish(study, trial, TrialState.FAIL, reason=reason, kind=failure_kind(error))
        return TrialState.FAIL
    finish(study, trial, state, values)
    return state


def _launch(folder: StudyFolder, study: Study, trial: Trial) -> TrialState:
    """The trial as a job of its own; its first process tells the study how it went."""
    tracking = folder.config.tracking
    words = ["trial", "--study", str(folder.path), "--number", str(trial.number)]
    words += ["--tracking.offline", str(tracking.offline).lower(), "--tracking.experiment", tracking.experiment]
    words += ["--tracking.system_metrics", str(tracking.system_metrics).lower()]
    secret = {
        STORAGE: folder.database,
        "MLFLOW_TRACKING_URI": tracking.uri,
        "MLFLOW_REGISTRY_URI": tracking.registry_uri,
    }
    os.environ.update({name: value for name, value in secret.items() if value})  # not for all to see in a process list
    try:
        launch(words, nproc=folder.nproc)
    except StocktakeError as error:
        begun = study.get_trials(deepcopy=False)[trial.number].user_attrs.get("folder")
        if begun:
            end_failed_run(folder.path.parent / begun, tracking, FAILED, str(error))
        raise
    return study.get_trials(deepcopy=False)[trial.number].state


def _run(
    folder: StudyFolder, trial: Trial | None, number: int, prepared: PreparedData
) -> tuple[TrialState, list[float] | None]:
    """Train in a child run. The processes of a distributed job call this together; the first one has the trial."""
    settings = distributed.run_on_rank_zero(lambda: folder.space.suggest(trial) if trial else {})
    config = with_overrides(folder.config, settings)
    begun = folder.path.parent / str(trial.user_attrs.get("folder", "-")) if trial else None
    tags = run_tags(config, prepared.manifest, "trial") | {
        "trial": str(number),
        "trial.stage": folder.stage,
        "trial.state": "running",
    }
    name = f"trial-{number:03d}"
    reopen = begun if begun and begun.is_dir() else None
    with own_run(config, name, tags, parent=folder.path, reopen=reopen) as run:
        if trial is None:
            with _silent():
                return train_trial(run, folder.stage, config, None, prepared, folder.objectives)
        trial.set_user_attr("folder", run.folder.name)
        if run.run_id:
            trial.set_user_attr("run", run.run_id)
        log_config(run, config, STAGES[folder.stage], prepared.manifest)
        word = "interrupted"
        try:
            with (run.artifacts / "log.txt").open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
                state, values = train_trial(run, folder.stage, config, trial, prepared, folder.objectives)
                word = state.name.lower()
        except Exception:
            word = "failed"
            raise
        finally:
            run.set_tags({"trial.state": word})
    return state, values


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def train_trial(
    run: TrackedRun,
    stage: str,
    config: StageConfig,
    trial: Trial | None,
    prepared: PreparedData,
    objectives: tuple[str, ...] = OBJECTIVES[:1],
) -> tuple[TrialState, list[float] | None]:
    """Train, evaluate on val and keep the model, never looking at test.

    The processes of a distributed job call this together; the first one has the trial, if there is a study at all.

    Returns:
        COMPLETE with a value an objective, or PRUNED.
    """
    with distributed.local_rank_zero_first():
        photos = prepare_photos(
            prepared.manifest.source, prepared.manifest.bins, config.image_size, Path(config.workspace)
        )
    prepared = dataclasses.replace(prepared, photos=photos)
    verdict = Verdict(trial, getattr(config, "epochs", 1))
    model = _TRAIN[stage](run, config, prepared, verdict)
    if distributed.broadcast(verdict.pruned):
        run.set_tags({"trial.reason": verdict.reason})
        return TrialState.PRUNED, None
    probabilities = split_probabilities(model, prepared, "val", getattr(config, "batch_size", 64))

    def log() -> float:
        evaluation = evaluate_split(run, model, config, prepared, "val", probabilities)
        evaluation.log(run, verdict.epoch + 1)
        return evaluation.metrics["val/macro_f1"]

    values = [distributed.run_on_rank_zero(log)]
    if "latency_ms" in objectives:
        values.append(distributed.run_on_rank_zero(lambda: measure_latency(model, prepared)))
        run.log_metrics({"latency_ms": values[-1]}, step=verdict.epoch + 1)
    if distributed.is_rank_zero():
        save_model(model, run.artifacts / CHECKPOINT)
    return TrialState.COMPLETE, values


class Verdict:
    """Tells the study each epoch's val/macro_f1, and ends the training when the study's pruner would."""

    def __init__(self, trial: Trial | None, epochs: int) -> None:
        """trial: None in a process that has none, and that is never asked."""
        self._trial = trial
        self._epochs = epochs
        self._known: set[int] = set()
        """Epochs reported before the trial was cut off."""
        if trial is not None:
            self._known = {*trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values}
        self.epoch = 0
        self.pruned = False
        self.reason = ""

    def __call__(self, figures: Mapping[str, float], epoch: int) -> bool:
        """Whether to stop after this epoch."""
        self.epoch = epoch
        # Optuna takes no figures of epochs where there are several objectives
        if self._trial is not None and len(self._trial.study.directions) == 1:
            value = figures["val/macro_f1"]
            if epoch not in self._known:
                self._trial.report(value, epoch)
            if epoch < self._epochs and self._trial.should_prune():  # the last epoch is paid for already
                self.pruned = True
                self.reason = f"pruned after epoch {epoch} at val/macro_f1 {value:.3f}"
        return self.pruned


def measure_latency(model: CountingModel, prepared: PreparedData) -> float:
    """Milliseconds of one photo, from JPEG bytes to a quantity: the median over some val photos, by the exported model.

    It is the time of one thread of the processor, so that other trials on the machine do not count.
    """
    source, bins = prepared.manifest.source, prepared.manifest.split("val")
    photos = [source.photo(str(bin_id)) for bin_id in bins["id"].head(_LATENCY_PHOTOS)]
    with tempfile.TemporaryDirectory() as exported:
        export_model(model, Path(exported))
        counter = Predictor(Path(exported), threads=1, engine="onnxruntime")  # computes in the thread that calls it
    counter.predict(photos[:2])  # the first ones allocate
    seconds = []
    for photo in photos:
        start = time.thread_time()
        counter.predict([photo])
        seconds.append(time.thread_time() - start)
    return 1000 * statistics.median(seconds)


def _finetune(run: TrackedRun, config: Any, prepared: PreparedData, verdict: EpochVerdict) -> CountingModel:
    return train_network(run, config, prepared, verdict)[0]


def _frozen(run: TrackedRun, config: Any, prepared: PreparedData, _verdict: EpochVerdict) -> CountingModel:
    return train_frozen(run, config, prepared)


def _classical(run: TrackedRun, config: Any, prepared: PreparedData, _verdict: EpochVerdict) -> CountingModel:
    return train_classical(run, config, prepared)


_TRAIN: dict[str, Callable[[TrackedRun, Any, PreparedData, EpochVerdict], CountingModel]] = {
    "finetune": _finetune,
    "frozen": _frozen,
    "classical": _classical,
}
