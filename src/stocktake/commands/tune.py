"""`stocktake tune`: a study of trials in worker processes, as one run with a child run a trial."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from stocktake.config.training import TuneConfig
from stocktake.errors import StocktakeError
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import log_config, run_tags
from stocktake.stages.table import STAGES, stage_config
from stocktake.tracking.local_store import KILLED, RUNNING, LocalRun
from stocktake.tracking.past_runs import best_settings
from stocktake.tracking.runs import TrackedRun, start_run
from stocktake.tracking.sync import end_run
from stocktake.tuning.config_overrides import flat_settings
from stocktake.tuning.results import record_best, record_study
from stocktake.tuning.space import find_space
from stocktake.tuning.storage import (
    DATABASE,
    GRACE_SECONDS,
    HEARTBEAT_SECONDS,
    STORAGE_VARIABLE,
    external_storage,
    open_storage,
    sqlite_url,
)
from stocktake.tuning.study import (
    OBJECTIVES,
    TRIALS,
    StudySpec,
    best_trial,
    choose_pruner,
    failure_streak,
    format_params,
    load_study,
    save_spec,
    trials_left,
)
from stocktake.tuning.workers import Job, TrialWorkers

_POLL_SECONDS = 0.5


def tune(config: TuneConfig) -> dict[str, float]:
    """Search, then evaluate the best trial's model on test, once.

    Returns:
        The best trial's metrics.
    """
    url = external_storage(config.storage)
    if config.resume is not None:
        return _resume(config, Path(config.resume), url)
    if len(config.objectives) > 1 and choose_pruner(config) != "none":
        raise StocktakeError(f"--pruner {config.pruner} needs one objective: give --pruner none")
    base = stage_config(config)
    space = find_space(config.space, STAGES[config.stage].search_space, base)
    if url is not None:
        open_storage(url)  # refused before anything is written
    prepared = prepare_data(base)
    spec = StudySpec(
        stage=config.stage,
        objectives=OBJECTIVES[: len(config.objectives)],
        sampler=config.sampler,
        pruner=choose_pruner(config),
        seed=config.seed,
        trials=config.trials or TRIALS,
        fingerprint=prepared.manifest.fingerprint,
        space=space,
        config=base,
    )
    tags = run_tags(base, prepared.manifest, "tune")
    with start_run(config.tracking, workspace=Path(base.workspace), name="tune", tags=tags) as run:
        name = config.study or run.folder.name
        run.set_tags({"study": name})
        log_config(run, config, TuneConfig, prepared.manifest)
        (run.artifacts / "space.yaml").write_text(yaml.safe_dump(space.to_dict(), sort_keys=False))
        job = Job(url or sqlite_url(run.folder), name, spec, run.folder)
        study = job.open()
        _warm_start(config, spec, study)
        _search(config, job, study, run)
        return record_best(run, spec, study, prepared)


def _resume(config: TuneConfig, folder: Path, url: str | None) -> dict[str, float]:
    """Go on with the study of an earlier run, in that run. Only its length may change.

    Raises:
        StocktakeError: there is no study in the folder, its process is alive, or it was begun with other settings.
    """
    if (folder / DATABASE).is_file():
        url = sqlite_url(folder)
    elif url is None:
        raise StocktakeError(
            f"--resume {folder}: there is no {DATABASE} in it; of a study in a database give --storage, or "
            f"{STORAGE_VARIABLE}"
        )
    own = dataclasses.replace(
        STAGES[config.stage].config(), tracking=config.tracking, workspace=str(folder.parent.parent)
    )
    name = LocalRun.open(folder).tags.get("study", folder.name)
    study, spec = load_study(open_storage(url), name)
    spec = dataclasses.replace(
        spec,
        trials=config.trials or spec.trials,
        config=dataclasses.replace(spec.config, tracking=own.tracking, workspace=own.workspace),
    )
    _check_unchanged(config, spec, folder)
    prepared = prepare_data(spec.config)
    if prepared.manifest.fingerprint != spec.fingerprint:
        raise StocktakeError(f"--resume {folder}: the study was begun with other data than is now in --root")
    tags = run_tags(spec.config, prepared.manifest, "tune")
    with start_run(
        config.tracking, workspace=Path(spec.config.workspace), name="tune", tags=tags, reopen=folder
    ) as run:
        save_spec(study, spec)
        job = Job(url, name, spec, run.folder)
        study = job.open()
        _search(config, job, study, run)
        return record_best(run, spec, study, prepared)


def _check_unchanged(config: TuneConfig, spec: StudySpec, folder: Path) -> None:
    """Raises StocktakeError for a setting that is given and differs from what the study was begun with."""
    now, defaults = flat_settings(config), flat_settings(TuneConfig())
    then = flat_settings(spec.config) | {"stage": spec.stage, "sampler": spec.sampler, "pruner": spec.pruner}
    then["objectives"] = ["macro_f1", "latency"][: len(spec.objectives)]
    ignored = {"trials", "timeout", "workers", "storage", "study", "warm_start", "space", "resume", "workspace"}
    changed = [
        f"--{name} {then.get(name)} (now {value})"
        for name, value in now.items()
        if name.partition(".")[0] not in ignored | {"tracking"} and value not in (defaults[name], then.get(name))
    ]
    if config.space is not None and find_space(config.space, {}, spec.config) != spec.space:
        changed.append("another --space")
    if changed:
        raise StocktakeError(f"--resume {folder}: the study was begun with {', '.join(changed)}: leave that out")


def _warm_start(config: TuneConfig, spec: StudySpec, study: Study) -> None:
    if not config.warm_start:
        return
    enqueued: list[dict[str, Any]] = []
    for run_name, score, settings in best_settings(
        config.tracking, config.task, spec.stage, is_distributed=STAGES[spec.stage].is_distributed
    ):
        params = spec.space.params_of(settings)
        if params is not None and params not in enqueued and len(enqueued) < config.warm_start:
            study.enqueue_trial(params, user_attrs={"warm_start": run_name})
            enqueued.append(params)
            print(f"begins with the settings of {run_name} (val/macro_f1 {score:.3f})", flush=True)
    if not enqueued:
        print(f"no earlier run of {spec.stage} on task {config.task} lies in the space: no warm start", flush=True)


def _search(config: TuneConfig, job: Job, study: Study, run: TrackedRun) -> None:
    """Run trials until the study has them all or the time is over; record it however it ends."""
    print(f"{job.spec.trials} trials of {job.spec.stage} in {config.workers} processes: {run.folder}", flush=True)
    deadline = time.time() + (math.inf if config.timeout is None else config.timeout)
    job = dataclasses.replace(job, deadline=None if config.timeout is None else deadline)
    ended = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    try:
        while trials_left(study, job.spec.trials) > 0 or _repeats_killed_trials(study, job.spec.trials):
            if time.time() >= deadline:
                print(f"--timeout {config.timeout:g}: no further trial was begun", flush=True)
                break
            with TrialWorkers(job, config.workers) as workers:
                is_running = True
                while is_running:
                    is_running = workers.poll(study)
                    _log_ended(study, run, ended)
                    time.sleep(_POLL_SECONDS if is_running else 0)
    finally:
        _end_runs_of_dead(study, job)
        record_study(run, job.spec, study)


def _repeats_killed_trials(study: Study, total: int) -> bool:
    """Whether a trial whose process was killed is to be repeated. Waits until its last heartbeat is old enough."""
    deadline = time.monotonic() + GRACE_SECONDS + 2 * HEARTBEAT_SECONDS
    while study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
    return trials_left(study, total) > 0


def _log_ended(study: Study, run: TrackedRun, ended: set[int]) -> None:
    """A line and the run's metrics for each trial that has ended since the last look.

    Raises:
        StocktakeError: the last three failed for the same reason.
    """
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    fresh = [trial for trial in finished if trial.number not in ended]
    best = best_trial(study)
    for trial in fresh:
        ended.add(trial.number)
        states = [other.state.name.lower() for other in finished if other.number in ended]
        metrics = {f"trials/{state}": float(states.count(state)) for state in states}
        if best is not None:
            metrics["best/val_macro_f1"] = best.values[0]
        run.log_metrics(metrics, step=len(ended))
        print(_line(trial, best), flush=True)
    reason = failure_streak(study) if any(trial.state is TrialState.FAIL for trial in fresh) else None
    if reason:
        raise StocktakeError(f"three trials in a row failed for the same reason, so the study ends: {reason}")


def _line(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    if trial.state is TrialState.FAIL:
        end = f"failed: {trial.user_attrs.get('failure.reason', 'its process was killed')}"
    else:
        end = f"{trial.state.name.lower()} val_macro_f1={trial.values[0] if trial.values else math.nan:.4f}"
    so_far = f" best={best.values[0]:.4f} (trial {best.number})" if best is not None else ""
    return f"trial={trial.number} {end}{so_far} seconds={seconds:.1f} {format_params(trial.params)}"


def _end_runs_of_dead(study: Study, job: Job) -> None:
    """No run stays RUNNING of a trial whose worker has ended."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = job.folder.parent / str(trial.user_attrs.get("folder"))
        if (folder / "run.json").is_file() and LocalRun.open(folder).state.status == RUNNING:
            reason = f"its process ended; `stocktake tune --resume {job.folder}` repeats it"
            end_run(folder, job.spec.config.tracking, status=KILLED, reason=reason)
