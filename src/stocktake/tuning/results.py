"""What a study leaves behind in its run: trials, plots, the best settings, and the best model's figures."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from pathlib import Path

from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from stocktake.config.runs import ImageConfig
from stocktake.config.yaml_io import BEST, write_experiment
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import load_model
from stocktake.stages.prepare import PreparedData
from stocktake.stages.run import evaluate_and_log
from stocktake.tracking.runs import TrackedRun
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.plots import plot_study
from stocktake.tuning.study import StudySpec, best_table, best_trial, format_params
from stocktake.tuning.trial import CHECKPOINT


def record_study(run: TrackedRun, spec: StudySpec, study: Study) -> None:
    """The table of trials, the plots, and the best trials as experiments, into the run's artifacts."""
    study.trials_dataframe().to_csv(run.artifacts / "trials.csv", index=False)
    plot_study(study, run.artifacts / "figures")
    best = best_trial(study)
    if best is None:
        return
    _write_trial(run.artifacts / BEST, spec, study, best)
    if len(spec.objectives) > 1:
        for trial in study.best_trials:
            _write_trial(run.artifacts / "pareto" / f"trial-{trial.number:03d}.yaml", spec, study, trial)
    run.set_tags({"best": f"trial-{best.number:03d}", "mlflow.note.content": _note(spec, study, best)})


def _write_trial(path: Path, spec: StudySpec, study: Study, trial: FrozenTrial) -> None:
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(spec.objectives, trial.values, strict=True))
    header = (
        f"stocktake {spec.stage} --experiment {shlex.quote(path.name)}",
        "",
        f"Trial {trial.number} of {spec.trials} in {study.study_name}: {values}.",
    )
    write_experiment(path, trial_config(spec, trial), header)


def trial_config(spec: StudySpec, trial: FrozenTrial) -> ImageConfig:
    """What a finished trial was trained with."""
    return with_overrides(spec.config, spec.space.suggest(FixedTrial(trial.params, trial.number)))


def _note(spec: StudySpec, study: Study, best: FrozenTrial) -> str:
    """The run's description: what was searched, and the trials that did best."""
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name.lower() for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    first = (
        f"{len(trials)} trials of {spec.stage} ({counts}), sampler {spec.sampler}, pruner {spec.pruner}. "
        f"Best: trial {best.number}, in the artifacts as `{BEST}`."
    )
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    rows = [(str(trial.number), trial.values, trial.params) for trial in complete]
    return f"{first}\n\n{best_table(spec.objectives, rows)}"


def record_best(run: TrackedRun, spec: StudySpec, study: Study, prepared: PreparedData) -> dict[str, float]:
    """Evaluate the best trial's model, on test for the first time, as the study's own figures.

    Of a study that several machines share, the one that has trained the best trial does it.

    Raises:
        StocktakeError: no trial was completed.
    """
    best = best_trial(study)
    if best is None:
        raise StocktakeError(f"no trial was completed; their reasons are in {run.artifacts / 'trials.csv'}")
    print(f"\nbest: trial {best.number}, {format_params(best.params)}", flush=True)
    checkpoint = run.folder.parent / str(best.user_attrs["folder"]) / "artifacts" / CHECKPOINT
    if not checkpoint.is_dir():
        print(f"its model is on {best.user_attrs['host']}, where `stocktake tune` evaluates it", flush=True)
        return {"val/macro_f1": best.values[0]}
    config = trial_config(spec, best)
    photos = prepare_photos(prepared.manifest.source, prepared.manifest.bins, config.image_size, Path(config.workspace))
    metrics = evaluate_and_log(
        run,
        load_model(checkpoint),
        config,
        dataclasses.replace(prepared, photos=photos),
        step=len(study.get_trials(deepcopy=False)) + 1,
        batch_size=getattr(config, "batch_size", 64),
    )
    print(
        f"val/macro_f1 {metrics['val/macro_f1']:.3f}, test/macro_f1 {metrics['test/macro_f1']:.3f} "
        f"[{metrics['test/macro_f1_low']:.3f}, {metrics['test/macro_f1_high']:.3f}], n {metrics['test/n']:.0f}"
    )
    print(f"train it again: stocktake {spec.stage} --experiment {run.artifacts / BEST}")
    print(f"results on disk: {run.folder}", flush=True)
    return metrics
