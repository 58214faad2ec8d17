"""What a study leaves behind in its run: trials, figures, the best settings, and the best model's figures."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from pathlib import Path

from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from stocktake.commands.stage_runs import PreparedData, evaluate_and_log
from stocktake.commands.trial import CHECKPOINT, StudyFolder
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import load_model
from stocktake.tracking.runs import TrackedRun
from stocktake.tuning.config_overrides import with_overrides
from stocktake.tuning.experiment import BEST, write_experiment
from stocktake.tuning.figures import plot_study
from stocktake.tuning.search_defaults import TRAINED_BY, StageConfig
from stocktake.tuning.study import best_trial, pareto_front, trials_table
from stocktake.tuning.summary import best_table, in_words


def record_study(run: TrackedRun, folder: StudyFolder, study: Study) -> None:
    """The table of trials, the figures, and the best trials as experiments, into the run's artifacts."""
    table = trials_table(study)
    table.to_csv(run.artifacts / "trials.csv", index=False)
    skipped = plot_study(study, run.artifacts / "figures")
    (run.artifacts / "figures").mkdir(exist_ok=True)
    reasons = [f"{name}: {reason}" for name, reason in skipped.items() if reason]
    (run.artifacts / "figures" / "left_out.txt").write_text("\n".join(reasons) + "\n")
    best = best_trial(study)
    if best is None:
        return
    _write_trial(run.artifacts / BEST, folder, best, len(table))
    if len(folder.objectives) > 1:
        front = pareto_front(study)
        for trial in front:
            _write_trial(run.artifacts / "pareto" / f"trial-{trial.number:03d}.yaml", folder, trial, len(table))
        table[table["number"].isin([trial.number for trial in front])].to_csv(
            run.artifacts / "pareto" / "front.csv", index=False
        )
    run.set_tags({"best": f"trial-{best.number:03d}", "mlflow.note.content": _note(folder, study, best)})


def _write_trial(path: Path, folder: StudyFolder, trial: FrozenTrial, trials: int) -> None:
    config = trial_config(folder, trial)
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(folder.objectives, trial.values, strict=True))
    header = (
        f"stocktake {TRAINED_BY[folder.stage]} --experiment {shlex.quote(path.name)}",
        "",
        f"Trial {trial.number} of {trials} in {folder.path.name}: {values}.",
    )
    write_experiment(path, config, header)


def trial_config(folder: StudyFolder, trial: FrozenTrial) -> StageConfig:
    """What a finished trial was trained with."""
    return with_overrides(folder.config, folder.space.suggest(FixedTrial(trial.params, trial.number)))


def _note(folder: StudyFolder, study: Study, best: FrozenTrial) -> str:
    """The run's description: what was searched, and the trials that did best."""
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name.lower() for trial in trials)
    said = ", ".join(f"{count} {state}" for state, count in states.most_common())
    lines = [
        f"{len(trials)} trials of {folder.stage} ({said}), sampler {folder.sampler}, pruner {folder.pruner}. "
        f"Best: trial {best.number}, in the artifacts as `{BEST}`.",
        "",
    ]
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    rows = [(str(trial.number), trial.values, trial.params) for trial in complete]
    return "\n".join([*lines, *best_table(folder.objectives, rows)])


def record_best(run: TrackedRun, folder: StudyFolder, study: Study, prepared: PreparedData) -> dict[str, float]:
    """Evaluate the best trial's model, on test for the first time, as the run's own.

    Raises:
        StocktakeError: no trial was completed.
    """
    best = best_trial(study)
    if best is None:
        raise StocktakeError(f"no trial was completed; their reasons are in {run.artifacts / 'trials.csv'}")
    config = trial_config(folder, best)
    checkpoint = folder.path.parent / str(best.user_attrs["folder"]) / "artifacts" / CHECKPOINT
    photos = prepare_photos(prepared.manifest.source, prepared.manifest.bins, config.image_size, Path(config.workspace))
    own = dataclasses.replace(prepared, photos=photos)
    print(f"\nbest: trial {best.number}, {in_words(best.params)}", flush=True)
    metrics = evaluate_and_log(
        run,
        load_model(checkpoint),
        config,
        own,
        step=len(study.get_trials(deepcopy=False)) + 1,
        batch_size=getattr(config, "batch_size", 64),
    )
    found = {name.replace("/", "_"): value for name, value in metrics.items()}
    print(
        "val/macro_f1 {val_macro_f1:.3f}, test/macro_f1 {test_macro_f1:.3f} "
        "[{test_macro_f1_low:.3f}, {test_macro_f1_high:.3f}], n {test_n:.0f}".format(**found)
    )
    print(f"train it again: stocktake {TRAINED_BY[folder.stage]} --experiment {run.artifacts / BEST}")
    print(f"results on disk: {run.folder}", flush=True)
    return metrics
