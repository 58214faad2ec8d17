"""One trial of a study: settings from Optuna, a child run, a value. And what a study's processes know of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from optuna.study import Study
from optuna.trial import Trial, TrialState

from stocktake.bins.photos import prepare_photos
from stocktake.config import ClassicalConfig, FinetuneConfig, FrozenConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.models.checkpoint import save_model
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.serving.counter import Counter
from stocktake.tracking.folder import write_json
from stocktake.tracking.runs import TrackedRun, start_run
from stocktake.training.fit import EpochVerdict
from stocktake.tuning.space import Space, configure
from stocktake.tuning.study import failure_kind, finish, load_study, make_pruner, open_storage
from stocktake.workflows.classical import train_classical
from stocktake.workflows.finetune import train_network
from stocktake.workflows.frozen import train_frozen
from stocktake.workflows.rung import Bench, flatten, log_setting, record_split, run_tags

StageConfig: TypeAlias = FinetuneConfig | FrozenConfig | ClassicalConfig
STAGES: dict[str, type[StageConfig]] = {
    "finetune": FinetuneConfig,
    "frozen": FrozenConfig,
    "classical": ClassicalConfig,
}
"""What can be searched, and the config whose settings are varied."""

CHECKPOINT = "checkpoint"
"""Where a completed trial's model lies in its run's artifacts."""
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
            config = configure(STAGES[content["stage"]](), settings)
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
        epochs = getattr(self.config, "epochs", 1)
        for dimension in self.space.all_dimensions():
            if dimension.setting == "epochs":
                epochs = max(epochs, *_reach(dimension))
        pruner = make_pruner(self.pruner, epochs, self.objectives)
        return load_study(open_storage(self.storage), self.path.name, pruner)


def _reach(dimension: Any) -> list[int]:
    values = [choice for choice, _ in dimension.branches] if hasattr(dimension, "branches") else [dimension.high]
    return [int(value) for value in values]


def run_trial(folder: StudyFolder, study: Study, trial: Trial, bench: Bench) -> TrialState:
    """Train what the trial says in a child run, and tell the study how it ended.

    A trial that was begun before goes on in its own run, from its last epoch. The test split is not read.

    Returns:
        COMPLETE, PRUNED or FAIL.

    Raises:
        KeyboardInterrupt, SystemExit: the process was asked to end; the trial stays RUNNING, for a resumed study.
    """
    try:
        state, values = _run(folder, trial, bench)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finish(study, trial, TrialState.FAIL, reason=reason, kind=failure_kind(error))
        return TrialState.FAIL
    finish(study, trial, state, values)
    return state


def _run(folder: StudyFolder, trial: Trial, bench: Bench) -> tuple[TrialState, list[float] | None]:
    config = configure(folder.config, folder.space.suggest(trial))
    workspace = Path(config.workspace)
    begun = trial.user_attrs.get("folder")
    tags = run_tags(config, bench.manifest, "trial") | {
        "trial": str(trial.number),
        "trial.stage": folder.stage,
        "trial.state": "running",
    }
    with start_run(
        config.tracking,
        workspace=workspace,
        name=f"trial-{trial.number:03d}",
        tags=tags,
        parent=folder.path,
        reopen=workspace / "runs" / begun if begun and (workspace / "runs" / begun).is_dir() else None,
    ) as run:
        trial.set_user_attr("folder", run.folder.name)
        if run.run_id:
            trial.set_user_attr("run", run.run_id)
        log_setting(run, config, STAGES[folder.stage], bench.manifest)
        word = "interrupted"
        try:
            with (run.artifacts / "log.txt").open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
                state, values = _train(run, folder, config, trial, bench)
                word = state.name.lower()
        except Exception:
            word = "failed"
            raise
        finally:
            run.set_tags({"trial.state": word})
    return state, values


def _train(
    run: TrackedRun, folder: StudyFolder, config: StageConfig, trial: Trial, bench: Bench
) -> tuple[TrialState, list[float] | None]:
    photos = prepare_photos(bench.manifest.source, bench.manifest.bins, config.image_size, Path(config.workspace))
    bench = dataclasses.replace(bench, photos=photos)
    verdict = Verdict(trial, getattr(config, "epochs", 1))
    model = _TRAIN[folder.stage](run, config, bench, verdict)
    if verdict.pruned:
        run.set_tags({"trial.reason": verdict.reason})
        return TrialState.PRUNED, None
    metrics = record_split(run, model, config, bench, "val", batch_size=getattr(config, "batch_size", 64))
    values = [metrics["val/macro_f1"]]
    if "latency_ms" in folder.objectives:
        metrics["latency_ms"] = measure_latency(model, bench)
        values.append(metrics["latency_ms"])
    run.log_metrics(metrics, step=verdict.epoch + 1)
    save_model(model, run.artifacts / CHECKPOINT)
    return TrialState.COMPLETE, values


class Verdict:
    """Tells the study each epoch's val/macro_f1, and ends the training when the study's pruner would."""

    def __init__(self, trial: Trial, epochs: int) -> None:
        self._trial = trial
        self._epochs = epochs
        self._is_pruned = len(trial.study.directions) == 1
        """Optuna takes no figures of epochs where there are several objectives."""
        self._known = {*trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values}
        """Epochs reported before the trial was cut off."""
        self.epoch = 0
        self.pruned = False
        self.reason = ""

    def __call__(self, figures: Mapping[str, float], epoch: int) -> bool:
        """Whether to stop after this epoch."""
        self.epoch = epoch
        if self._is_pruned:
            value = figures["val/macro_f1"]
            if epoch not in self._known:
                self._trial.report(value, epoch)
            if epoch < self._epochs and self._trial.should_prune():  # the last epoch is paid for already
                self.pruned = True
                self.reason = f"pruned after epoch {epoch} at val/macro_f1 {value:.3f}"
        return self.pruned


def measure_latency(model: CountingModel, bench: Bench) -> float:
    """Milliseconds of one photo, from JPEG bytes to a quantity: the median over some val photos, by the exported model.

    It is the time of one thread of the processor, so that other trials on the machine do not count.
    """
    source, bins = bench.manifest.source, bench.manifest.split("val")
    photos = [source.photo(str(bin_id)) for bin_id in bins["id"].head(_LATENCY_PHOTOS)]
    with tempfile.TemporaryDirectory() as exported:
        export_model(model, Path(exported))
        counter = Counter(Path(exported), threads=1)
    counter.count(photos[:2])  # the first ones allocate
    seconds = []
    for photo in photos:
        start = time.thread_time()
        counter.count([photo])
        seconds.append(time.thread_time() - start)
    return 1000 * statistics.median(seconds)


def _finetune(run: TrackedRun, config: Any, bench: Bench, verdict: EpochVerdict) -> CountingModel:
    return train_network(run, config, bench, verdict)[0]


def _frozen(run: TrackedRun, config: Any, bench: Bench, _verdict: EpochVerdict) -> CountingModel:
    return train_frozen(run, config, bench)


def _classical(run: TrackedRun, config: Any, bench: Bench, _verdict: EpochVerdict) -> CountingModel:
    return train_classical(run, config, bench)


_TRAIN: dict[str, Callable[[TrackedRun, Any, Bench, EpochVerdict], CountingModel]] = {
    "finetune": _finetune,
    "frozen": _frozen,
    "classical": _classical,
}
