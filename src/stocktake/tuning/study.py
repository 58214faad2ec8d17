"""Optuna without surprises: storages that survive a kill, trials that are repeatable and handed out once.

One process, or several side by side: each opens the storage itself (never across a fork, where two would pass for one)
and takes trials under one lock.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tuning.space import Space

OBJECTIVES = ("val/macro_f1", "latency_ms")
"""What a study may be after: the first alone, or both."""
DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize")
SAMPLERS = ("tpe", "random")
PRUNERS = ("asha", "hyperband", "median", "none")

# Optuna tells of every trial on stderr; a study here has a log of its own.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Studies --------------------------------------------------------------------------------------------------------------


def create_study(
    storage: BaseStorage, name: str, objectives: Sequence[str] = OBJECTIVES[:1], pruner: BasePruner | None = None
) -> Study:
    """A new study.

    Args:
        storage: of `open_storage`.
        name: of the study.
        objectives: the first of OBJECTIVES to make large, or both, with the second to make small.
        pruner: of `make_pruner`. Default: none; Optuna's own default would prune.

    Raises:
        StocktakeError: there is a study of this name, or objectives that are none.
    """
    objectives = tuple(objectives)
    if objectives not in (OBJECTIVES[:1], OBJECTIVES):
        raise StocktakeError(
            f"a study cannot be after {', '.join(objectives) or 'nothing'}: "
            f"take {OBJECTIVES[0]} alone, or {' and '.join(OBJECTIVES)}"
        )
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=DIRECTIONS[: len(objectives)], pruner=pruner or NopPruner()
        )
    except DuplicatedStudyError:
        raise StocktakeError(f"there is a study {name} already; resume it, or choose another name") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([*objectives])  # for the axes of figures, and for other tools that open the storage
    return study


def load_study(storage: BaseStorage, name: str, pruner: BasePruner | None = None) -> Study:
    """A study that is there.

    Raises:
        StocktakeError: there is none of this name.
    """
    try:
        return optuna.load_study(study_name=name, storage=storage, pruner=pruner or NopPruner())
    except KeyError:
        there = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise StocktakeError(f"there is no study {name}; the studies there are: {there}") from None


def objectives_of(study: Study) -> tuple[str, ...]:
    """What the study is after."""
    return OBJECTIVES[: len(study.directions)]


# Samplers and pruners -------------------------------------------------------------------------------------------------

_STARTUP = 6
"""Trials drawn at random before TPE begins: Optuna's 10 would be half of a small study."""


class _RandomByName(RandomSampler):
    """Draws each parameter at random, from seed, trial number and parameter name alone.

    So that nothing else matters: not which parameters were drawn before it, by whom, or whether the worker that drew
    them was killed halfway.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = RandomSampler(_derived(self._seed, trial.number, zlib.crc32(param_name.encode())))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _derived(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial.

    Made anew for each: its state would not outlive a process, nor be shared by several.

    Args:
        name: tpe or random.
        seed: of the study.
        number: of the trial.

    Raises:
        StocktakeError: no such sampler.
    """
    if name not in SAMPLERS:
        raise StocktakeError(f"there is no sampler {name}: take one of {', '.join(SAMPLERS)}")
    if name == "random":
        return _RandomByName(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of group: what holds only under a choice is modelled too
        return TPESampler(
            n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True, seed=_derived(seed, number)
        )


def make_pruner(name: str, max_epochs: int, objectives: Sequence[str] = OBJECTIVES[:1]) -> BasePruner:
    """What ends trials early, by the values they report.

    Report a trial's epochs by their numbers, from 1, and do not ask about the last one: it would save nothing.

    Args:
        name: asha, hyperband, median or none.
        max_epochs: the longest that a trial may train.
        objectives: of the study.

    Raises:
        StocktakeError: no such pruner, or two objectives.
    """
    if name not in PRUNERS:
        raise StocktakeError(f"there is no pruner {name}: take one of {', '.join(PRUNERS)}")
    if name != "none" and len(objectives) > 1:
        raise StocktakeError(
            f"the pruner {name} cannot weigh {' against '.join(objectives)}: take none, or one objective alone"
        )
    if name == "none" or max_epochs < 2:
        return NopPruner()
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=3)
    if name == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=max_epochs // 4)
    # Halves, not the paper's quarters, and not after the first epoch of many: what a network shows there says little.
    return SuccessiveHalvingPruner(min_resource=max(1, max_epochs // 4), reduction_factor=2)


# Trials ---------------------------------------------------------------------------------------------------------------


def take_trial(study: Study, space: Space, *, sampler: str, seed: int, budget: int, lock: FileLock) -> Trial | None:
    """The next trial, RUNNING and with its parameters stored; `space.suggest(trial)` has them as settings.

    Trials that wait (enqueued, or re-queued after a kill) come first, by number. Workers on one machine never get the
    same trial, nor more than the budget together. (On several machines, over a database, they never get the same one
    either; but with a lock for each machine, the last ones at once may exceed the budget.)

    Args:
        study: of this process.
        space: the study's.
        sampler: tpe or random.
        seed: makes trial k's parameters; with `random` nothing but seed and k does.
        budget: how many trials the study may have; those that wait count when they are taken.
        lock: the same file for all workers of the study.

    Returns:
        None when the budget is used up. The trial's attribute `worker` is this process's id.
    """
    with lock:
        trials = study.get_trials(deepcopy=False)
        if sum(trial.state is not TrialState.WAITING for trial in trials) >= budget:
            return None
        make_sampler(sampler, seed, 0)  # refuses a name before there is a trial
        trial = study.ask()
        trial.set_user_attr("worker", os.getpid())
        study.sampler = make_sampler(sampler, seed, trial.number)
        space.suggest(trial)  # here, so that the next worker's sampler sees what this one is about to try
        return trial


def requeue_unfinished(study: Study) -> list[int]:
    """Let trials that were running when their process ended wait again; their numbers.

    They keep their numbers, parameters, attributes and reported values. Only for when no worker is at the study: a
    trial in work would be handed out twice.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        # Optuna has no public way back to WAITING; every storage of it allows the step.
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return [trial.number for trial in running]


def finish(
    study: Study,
    trial: Trial | int,
    state: TrialState,
    values: Sequence[float] | None = None,
    reason: str | None = None,
    kind: str | None = None,
) -> None:
    """End a trial that is running.

    Args:
        study: its study.
        trial: it, or its number.
        state: COMPLETE, PRUNED (its last reported value is its value) or FAIL. A trial that is COMPLETE with a value
            that is no finite number has failed.
        values: one an objective; looked at only of COMPLETE ones.
        reason: why it failed, in a line; kept as the attribute failure.reason.
        kind: of `failure_kind`, kept as failure.kind. Default: the reason's own.
    """
    number = trial if isinstance(trial, int) else trial.number
    if state is TrialState.COMPLETE:
        told = dict(zip(objectives_of(study), values or (), strict=True))
        lost = [f"{name} is {value}" for name, value in told.items() if not math.isfinite(value)]
        if lost:
            state, reason, kind = TrialState.FAIL, ", ".join(lost), None
    if state is TrialState.FAIL:
        reason = reason or "no reason is known"
        trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        for key, text in (("failure.reason", reason), ("failure.kind", kind or _alike(reason))):
            study._storage.set_trial_user_attr(trial_id, key, text)
    study.tell(number, [*values] if state is TrialState.COMPLETE and values else None, state)


# Failures -------------------------------------------------------------------------------------------------------------

_PARTICULARS = re.compile(
    r"0x[0-9a-fA-F]+"
    r"|\b\w+://\S+"
    r"|(?:(?<![\w.])[.~]{0,2}/|\b\w+/)[^\s'\",;:()\[\]]+"  # paths
    r"|\b(?=\w*\d)[0-9a-fA-F]{6,}\b"  # digests
    r"|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    r"|\b(?:nan|inf)\b"
)


def failure_kind(error: BaseException) -> str:
    """What failures for the same cause have in common: the error's type, and the first line of its message without
    numbers, paths and digests."""
    return f"{type(error).__name__}: {_alike(str(error))}"


def _alike(message: str) -> str:
    first = next(iter(message.strip().splitlines()), "")
    return " ".join(_PARTICULARS.sub("#", first).split())[:200]


def failure_streak(study: Study, length: int = 3) -> str | None:
    """Why the last trials failed, if the last `length` to finish all failed with one kind; else None.

    Ask after a trial has failed, not before the first one of a resumed study: the cause may have been mended.
    """
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ended.sort(key=lambda trial: (trial.datetime_complete.timestamp() if trial.datetime_complete else 0, trial.number))
    last = ended[-length:]
    kinds = {trial.user_attrs.get("failure.kind") for trial in last if trial.state is TrialState.FAIL}
    if len(last) < length or len(kinds) > 1 or any(trial.state is not TrialState.FAIL for trial in last):
        return None
    return str(last[-1].user_attrs.get("failure.reason", "no reason is known"))


# Results --------------------------------------------------------------------------------------------------------------


def trials_table(study: Study) -> pd.DataFrame:
    """One row a trial, by number.

    Columns: number, state (complete, pruned, fail, running, waiting), an objective each, seconds (of its last try;
    until it ended), a parameter each by Optuna's name (missing where it does not hold), reason (of a failure), run
    (the MLflow run that the attribute `run` names).
    """
    objectives = objectives_of(study)
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for trial in trials for name in trial.params})
    rows = []
    for trial in trials:
        values = dict(zip(objectives, _values(trial), strict=False))  # a pruned trial may have none
        row = {"number": trial.number, "state": trial.state.name.lower()}
        row |= {name: values.get(name) for name in objectives}
        row |= {"seconds": trial.duration.total_seconds() if trial.duration else None}
        row |= {name: trial.params.get(name) for name in names}
        rows.append(row | {"reason": trial.user_attrs.get("failure.reason"), "run": trial.user_attrs.get("run")})
    columns = ["number", "state", *objectives, "seconds", *names, "reason", "run"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys((*objectives, "seconds"), "float64"))


def best_trial(study: Study) -> FrozenTrial | None:
    """The completed trial with the highest first objective, of equals the first one; None when none is completed."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (_values(trial)[0], -trial.number), default=None)


def pareto_front(study: Study) -> list[FrozenTrial]:
    """The completed trials that no other one beats in all objectives, highest first objective first."""
    return sorted(study.best_trials, key=lambda trial: (-_values(trial)[0], trial.number))


def _values(trial: FrozenTrial) -> Sequence[float]:
    return trial.values or ()  # noqa: PD011 - no pandas here
