"""`stocktake tune`: a study of trials in worker processes, as one run with a child run a trial."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import yaml
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from stocktake.commands.stage_runs import log_config, prepare_data, run_tags
from stocktake.commands.study_results import record_best, record_study
from stocktake.commands.trial import StudyFolder
from stocktake.commands.trial_workers import TrialWorkers
from stocktake.config import TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import KILLED, RUNNING, LocalRun
from stocktake.tracking.past_runs import best_settings
from stocktake.tracking.runs import TrackedRun, start_run
from stocktake.tracking.sync import end_run
from stocktake.tuning.search_defaults import STAGES, TRIALS, StageConfig, choose_pruner, find_space, stage_config
from stocktake.tuning.space import Space
from stocktake.tuning.storage import open_storage
from stocktake.tuning.study import (
    OBJECTIVES,
    best_trial,
    create_study,
    failure_streak,
    make_pruner,
    requeue_unfinished,
)
from stocktake.tuning.summary import in_words

_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 40.0


def tune(config: TuneConfig) -> dict[str, float]:
    """Search, then evaluate the best trial's model on test, once.

    Returns:
        The best trial's metrics.
    """
    base = stage_config(config)
    resumed = Path(config.resume) if config.resume else None
    if resumed is not None:
        folder = _resumed(config, StudyFolder.open(resumed, config.tracking, config.storage))
        base = folder.config
    else:
        space = find_space(config.space, config.stage, base)
    prepared = prepare_data(base)
    tags = run_tags(base, prepared.manifest, "tune")
    workspace = Path(base.workspace)
    with start_run(config.tracking, workspace=workspace, name="tune", tags=tags, reopen=resumed) as run:
        if resumed is None:
            folder = _begun(run, config, base, space)
            study = create_study(open_storage(folder.storage), run.folder.name, folder.objectives)
            log_config(run, config, TuneConfig, prepared.manifest)
            (run.artifacts / "space.yaml").write_text(
                yaml.safe_dump(json.loads(folder.space.to_json()), sort_keys=False)
            )
            _warm_start(config, folder, study)
        else:
            study = folder.load()
            _wait_for_earlier_workers(study, folder)
            again = requeue_unfinished(study)
            if again:
                print(f"goes on with trial {', '.join(map(str, again))}, cut off before", flush=True)
        print(f"{folder.trials} trials of {folder.stage} in {config.workers} processes: {run.folder}", flush=True)
        try:
            _search(config, folder, study, run)
        finally:
            _end_dead_trials(study, folder, config)
            record_study(run, folder, study)
        return record_best(run, folder, study, prepared)


def _begun(run: TrackedRun, config: TuneConfig, base: StageConfig, space: Space) -> StudyFolder:
    objectives = OBJECTIVES[: len(config.objectives)]
    pruner = choose_pruner(config)
    make_pruner(pruner, 1, objectives)  # refuses what does not go together
    folder = StudyFolder(
        path=run.folder,
        stage=config.stage,
        objectives=objectives,
        sampler=config.sampler,
        pruner=pruner,
        seed=config.seed,
        trials=config.trials or TRIALS,
        nproc=config.nproc,
        space=space,
        config=base,
        database=config.storage,
    )
    folder.write()
    return folder


def _resumed(config: TuneConfig, folder: StudyFolder) -> StudyFolder:
    """The study as it was begun; only its length may change.

    Raises:
        StocktakeError: another setting is given than it was begun with.
    """
    given, usual = stage_config(config), STAGES[config.stage]()
    asked: dict[str, tuple[Any, Any, Any]] = {
        field.name: (getattr(given, field.name), getattr(usual, field.name), getattr(folder.config, field.name, None))
        for field in dataclasses.fields(given)
        if field.name not in ("tracking", "workspace", "resume")
    }
    plain = TuneConfig()
    asked |= {name: (getattr(config, name), getattr(plain, name), getattr(folder, name)) for name in ("stage", "nproc")}
    asked["sampler"] = (config.sampler, plain.sampler, folder.sampler)
    asked["pruner"] = (config.pruner, plain.pruner, folder.pruner)
    asked["objectives"] = (OBJECTIVES[: len(config.objectives)], OBJECTIVES[:1], folder.objectives)
    changed = [f"--{name} {then} (now {now})" for name, (now, usual, then) in asked.items() if now not in (usual, then)]
    if changed:
        raise StocktakeError(f"--resume {folder.path}: the study was begun with {', '.join(changed)}: leave them out")
    if config.space is not None:
        difference = find_space(config.space, folder.stage, folder.config).difference(folder.space)
        if difference:
            raise StocktakeError(f"--resume {folder.path} with another --space: {difference}; leave it out")
    longer = dataclasses.replace(folder, trials=config.trials or folder.trials)
    longer.write()
    return longer


def _warm_start(config: TuneConfig, folder: StudyFolder, study: Study) -> None:
    if not config.warm_start:
        return
    tried: list[dict[str, Any]] = []
    for run_name, score, settings in best_settings(config.tracking, config.task, folder.stage):
        params = folder.space.params(settings)
        if params is not None and params not in tried and len(tried) < config.warm_start:
            study.enqueue_trial(params, user_attrs={"from": run_name})
            tried.append(params)
            print(f"begins with the settings of {run_name} (val/macro_f1 {score:.3f})", flush=True)
    if not tried:
        print(f"no earlier run of {folder.stage} on task {config.task} lies in the space: no warm start", flush=True)


def _search(config: TuneConfig, folder: StudyFolder, study: Study, run: TrackedRun) -> None:
    """Keep the workers at it until the trials are used up or the time is over, and tell how each ends."""
    told = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    deadline = time.monotonic() + (math.inf if config.timeout is None else config.timeout)
    seconds = None if config.timeout is None else config.timeout
    with TrialWorkers(folder, config.tracking, config.workers, seconds) as workers:
        while True:
            alive = workers.tend(study)
            fresh = _tell(study, run, told)
            streak = failure_streak(study) if any(trial.state is TrialState.FAIL for trial in fresh) else None
            if streak:
                raise StocktakeError(f"three trials in a row failed for the same reason, so the study ends: {streak}")
            if not alive:
                break
            time.sleep(_LOOK_SECONDS)
    if time.monotonic() > deadline:
        print(f"--timeout {config.timeout:g}: no further trial was begun", flush=True)


def _tell(study: Study, run: TrackedRun, told: set[int]) -> list[FrozenTrial]:
    """A line and the run's metrics for each trial that has ended since the last look; those trials."""
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    fresh = [trial for trial in finished if trial.number not in told]
    for trial in fresh:
        told.add(trial.number)
        states = [one.state for one in finished if one.number in told]
        figures = {f"trials/{state.name.lower()}": float(states.count(state)) for state in set(states)}
        best = best_trial(study)
        if best is not None:
            figures["best/val_macro_f1"] = best.values[0]
        run.log_metrics(figures, step=len(told))
        print(_line(trial, best), flush=True)
    return fresh


def _line(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    if trial.state is TrialState.FAIL:
        ended = f"failed: {trial.user_attrs.get('failure.reason')}"
    else:
        value = trial.values[0] if trial.values else math.nan
        ended = f"{trial.state.name.lower()} val_macro_f1={value:.4f}"
    ahead = f" best={best.values[0]:.4f} (trial {best.number})" if best is not None else ""
    return f"trial={trial.number} {ended}{ahead} seconds={seconds:.1f} {in_words(trial.params)}"


def _wait_for_earlier_workers(study: Study, folder: StudyFolder) -> None:
    """Workers of the study's earlier process end with it; wait until the last one has closed its run."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        while (run := _run_folder(trial, folder)) is not None and not run.lock.try_acquire():
            if time.monotonic() > deadline:
                raise StocktakeError(
                    f"trial {trial.number} of {folder.path} is still in work (process {run.state.pid}): end it first"
                )
            time.sleep(_LOOK_SECONDS)
        if run is not None:
            run.lock.release()


def _end_dead_trials(study: Study, folder: StudyFolder, config: TuneConfig) -> None:
    """No run stays RUNNING of a trial that nobody is at."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
        run = _run_folder(trial, folder)
        if run is not None and run.state.status == RUNNING:
            reason = f"cut off; `stocktake tune --resume {folder.path}` goes on with it"
            end_run(run.path, config.tracking, status=KILLED, reason=reason)


def _run_folder(trial: FrozenTrial, folder: StudyFolder) -> LocalRun | None:
    path = folder.path.parent / str(trial.user_attrs.get("folder"))
    return LocalRun.open(path) if (path / "run.json").is_file() else None
