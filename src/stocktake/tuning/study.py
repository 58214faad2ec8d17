"""Studies: what all trials share, samplers, pruners, how many trials are left, and why trials failed."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from stocktake.config.runs import ImageConfig
from stocktake.config.training import TuneConfig
from stocktake.errors import StocktakeError
from stocktake.stages.table import STAGES
from stocktake.tuning.config_overrides import flat_settings, with_overrides
from stocktake.tuning.space import Space, parse_space

OBJECTIVES = ("val/macro_f1", "latency_ms")
"""What a study optimizes: the first alone, or both."""
_DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize")
_STARTUP_TRIALS = 6
"""Trials drawn at random before TPE begins: Optuna's 10 would be half of a small study."""
TRIALS = 20
"""Of a search that is given no number."""
_SPEC = "spec"
_NOT_SHARED = ("tracking", "workspace", "resume")
"""Settings of a machine and a moment, which a study does not keep."""

optuna.logging.set_verbosity(optuna.logging.ERROR)  # `tune` prints a line a trial itself


@dataclass(frozen=True)
class StudySpec:
    """What all trials of a study share. The study keeps it, so that a resumed one goes on as it was begun."""

    stage: str
    objectives: tuple[str, ...]
    sampler: str
    pruner: str
    seed: int
    trials: int
    """How many the study has in all."""
    fingerprint: str
    """Of the data."""
    space: Space
    config: ImageConfig
    """The settings that the space does not vary."""

    def to_dict(self) -> dict[str, Any]:
        """As the study keeps it."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings = flat_settings(self.config)
        shared = {name: value for name, value in settings.items() if name.partition(".")[0] not in _NOT_SHARED}
        return kept | {"space": self.space.to_dict(), "config": shared, "objectives": [*self.objectives]}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], config: ImageConfig | None = None) -> StudySpec:
        """The spec of `to_dict`; settings that it does not keep come from `config`."""
        stage_config = with_overrides(config or STAGES[kept["stage"]].config(), kept["config"])
        space = parse_space(kept["space"], stage_config, "the study's space")
        return cls(**{**kept, "objectives": tuple(kept["objectives"]), "space": space, "config": stage_config})

    def max_epochs(self) -> int:
        """The longest that a trial may train."""
        return int(self.space.highest("epochs", getattr(self.config, "epochs", 1)))


def create_study(storage: BaseStorage, name: str, spec: StudySpec) -> Study:
    """A new study; or the one of this name that another machine has begun with the same spec.

    Raises:
        StocktakeError: there is a study of this name with another spec.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of metric names
        study = optuna.create_study(
            storage=storage, study_name=name, directions=_DIRECTIONS[: len(spec.objectives)], load_if_exists=True
        )
        kept = study.user_attrs.get(_SPEC)
        if kept is not None:
            changed = differences(spec.to_dict(), kept)
            if changed:
                raise StocktakeError(f"the study {name} exists with another {', '.join(changed)}: choose another name")
        else:
            study.set_metric_names([*spec.objectives])
            save_spec(study, spec)
    study.pruner = make_pruner(spec.pruner, spec.max_epochs())
    return study


def load_study(storage: BaseStorage, name: str, config: ImageConfig | None = None) -> tuple[Study, StudySpec]:
    """A study that exists, and its spec with the machine's own settings from `config`.

    Raises:
        StocktakeError: there is none of this name.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        spec = StudySpec.from_dict(study.user_attrs[_SPEC], config)
    except KeyError:
        raise StocktakeError(f"there is no study {name} in the database") from None
    study.pruner = make_pruner(spec.pruner, spec.max_epochs())
    return study, spec


def save_spec(study: Study, spec: StudySpec) -> None:
    """Keep the spec in its study."""
    study.set_user_attr(_SPEC, spec.to_dict())


def differences(spec: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what two kept specs do not share. `trials` may differ, and `root`: the data's fingerprint decides."""
    names = [name for name in spec if name not in ("trials", "config") and spec[name] != other.get(name)]
    settings = spec["config"].keys() | other["config"].keys()
    changed = {name for name in settings if spec["config"].get(name) != other["config"].get(name)}
    return [*names, *sorted(changed - {"root"})]


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial, by its number: with `random`, its parameters depend on seed and number alone."""
    derived = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    if name == "random":
        return RandomSampler(derived)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of multivariate, constant_liar
        return TPESampler(n_startup_trials=_STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=derived)


def choose_pruner(config: TuneConfig) -> str:
    """The pruner of a study: asha, hyperband, median or none."""
    if config.pruner != "auto":
        return config.pruner
    has_epochs = hasattr(STAGES[config.stage].config, "epochs")
    return "asha" if has_epochs and len(config.objectives) == 1 else "none"


def make_pruner(name: str, max_epochs: int) -> BasePruner:
    """What ends trials early, by the values that they report at epochs 1, 2, ...

    Args:
        name: asha, hyperband, median or none.
        max_epochs: the longest that a trial may train.
    """
    if name == "none" or max_epochs < 2:
        return NopPruner()
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=3)
    if name == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=max_epochs // 4)
    # Halves, not the paper's quarters, and not after the first epoch of many: what a network shows there says little.
    return SuccessiveHalvingPruner(min_resource=max(1, max_epochs // 4), reduction_factor=2)


def trials_left(study: Study, total: int) -> int:
    """How many trials may still be started. A trial that is repeated after its process was killed does not count."""
    trials = study.get_trials(deepcopy=False)
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    started = [trial for trial in trials if trial.state is not TrialState.WAITING and trial.number not in repeated]
    return total - len(started)


def best_trial(study: Study) -> FrozenTrial | None:
    """The completed trial with the highest first objective, of equals the first; None when none is completed."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.values[0], -trial.number), default=None)


# Failures -------------------------------------------------------------------------------------------------------------

REASON, KIND = "failure.reason", "failure.kind"
"""Attributes of a failed trial."""
_PARTICULARS = re.compile(r"\w+://\S+|[\w.~-]*/\S+|\b0x[0-9a-f]+|[-+]?\d[\d.]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b", re.I)


def failure_kind(error: BaseException) -> str:
    """What failures for the same cause share: the error's type, and its first line without numbers and paths."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {' '.join(_PARTICULARS.sub('#', first).split())[:200]}"


def failure_streak(study: Study, length: int = 3) -> str | None:
    """Why the last trials failed, if the last `length` to finish all failed with one kind; else None."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ended.sort(key=lambda trial: (trial.datetime_complete.timestamp() if trial.datetime_complete else 0, trial.number))
    last = ended[-length:]
    kinds = {trial.user_attrs.get(KIND) if trial.state is TrialState.FAIL else None for trial in last}
    if len(last) < length or len(kinds) > 1 or None in kinds:
        return None
    return str(last[-1].user_attrs[REASON])


# Words ----------------------------------------------------------------------------------------------------------------


def format_params(params: Mapping[str, Any]) -> str:
    """lr=0.001 batch_size=32"""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )


def best_table(objectives: Sequence[str], trials: Sequence[tuple[str, Sequence[float], Mapping[str, Any]]]) -> str:
    """The ten trials that did best, as a Markdown table.

    Args:
        objectives: their names; the first one is to be large.
        trials: number, one value an objective, params.
    """
    lines = ["| trial | " + " | ".join(objectives) + " | settings |", "|" + "---|" * (len(objectives) + 2)]
    for number, values, params in sorted(trials, key=lambda trial: -trial[1][0])[:10]:
        lines.append(f"| {number} | {' | '.join(f'{value:.4g}' for value in values)} | {format_params(params)} |")
    return "\n".join(lines)
