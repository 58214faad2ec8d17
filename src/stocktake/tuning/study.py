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
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # what a lock must be; exported nowhere
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

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

# Storages -------------------------------------------------------------------------------------------------------------

_RECORD = b'{"op_code":'
"""How every line of a journal begins."""


class _JournalLock(BaseJournalFileLock):
    """Locks and mends a journal before something is appended to it.

    Optuna's own locks are files that exist: one stays behind when its process is killed, and the others wait half a
    minute for it. The kernel lets go of this one. And Optuna appends to whatever is there: after half a line, as a
    process killed in mid-write leaves it, the next record would be lost and the one after it make the journal
    unreadable for good.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        # not .lock: that is what Optuna's own locks are called, so that its other tools would wait for it
        self._lock = FileLock(journal.with_name(f"{journal.name}.flock"))

    def acquire(self) -> bool:
        self._lock.__enter__()
        try:
            _cut_torn_line(self._journal)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


def _cut_torn_line(journal: Path) -> None:
    """Cut off a last line that was not written to its end. A file that is no journal is left as it is.

    Raises:
        StocktakeError: the file is no journal.
    """
    with journal.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start and b"\n" not in tail:
            block = min(start, 4096)
            start = file.seek(start - block)
            tail = file.read(block) + tail
        torn = tail.rpartition(b"\n")[2]
        if not torn:
            return
        written = torn.rstrip(b"\0")  # a crash of the machine can leave the length without the bytes
        if not (written.startswith(_RECORD) or _RECORD.startswith(written)):
            raise StocktakeError(f"{journal} is no journal of a study; name another file")
        file.truncate(end - len(torn))


def open_storage(where: str | Path) -> BaseStorage:
    """The storage of studies: a journal in a file, or a database by its URL.

    Open it in the process that uses it. Everything written to a journal is on disk when the call returns.

    Args:
        where: path of a journal; or a URL that SQLAlchemy takes, such as sqlite:///study.db or
            postgresql://user:password@host/studies, whose driver must be installed. A journal, and SQLite's file, are
            made with their folder when they are not there.

    Raises:
        StocktakeError: the file is something else or cannot be written, the database cannot be reached. The message
            holds no password.
    """
    if isinstance(where, str) and re.match(r"[A-Za-z][\w+.-]*:", where):
        return _open_database(where)
    path = Path(where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"), path.open("rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and not first.startswith(_RECORD):
            raise StocktakeError(f"{path} is no journal of a study; name another file")
        lock = _JournalLock(path)
        lock.acquire()
        lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock))
    except OSError as error:
        raise StocktakeError(
            f"the study's journal {path} cannot be used: {error.strerror}; name another file"
        ) from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise StocktakeError(f"the study's journal {path} is damaged ({error}); name another file") from None


def _open_database(url: str) -> BaseStorage:
    sqlite = _sqlite_file(url)
    if url.startswith("sqlite") and sqlite is None:
        raise StocktakeError(
            f"{_without_credentials(url)} keeps nothing: give the database a file, as sqlite:///study.db"
        )
    # A second connection waits for a lock on the file instead of failing at once; others find out when theirs is gone.
    settings: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite is not None else {"pool_pre_ping": True}
    try:
        if sqlite is None:
            return get_storage(RDBStorage(url, settings))
        # Two processes that both find no tables would both make them, and one fail.
        with FileLock(sqlite.with_name(f"{sqlite.name}.flock")):
            return get_storage(RDBStorage(url, settings))
    except (SQLAlchemyError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise StocktakeError(
            f"the study's storage {_without_credentials(url)} cannot be used: {_reason(error, url)}; "
            "correct it, or give a file for a journal"
        ) from None


def _sqlite_file(url: str) -> Path | None:
    path = re.sub(r"^sqlite(\+\w+)?:///", "", url).partition("?")[0]
    return None if path == url.partition("?")[0] or path in ("", ":memory:") else Path(path)


def _without_credentials(url: str) -> str:
    """A URL as it may be shown: no user, password or options; the scheme alone where they cannot be told apart."""
    scheme, mark, rest = url.partition("://")
    if scheme.startswith("sqlite") or not mark:
        return url
    netloc, slash, path = rest.partition("/")
    host = netloc.rpartition("@")[2]
    if "@" in path or re.search(r"[?#]", netloc) or not re.fullmatch(r"(\[[\w:.]*\]|[\w.-]*)(:\d*)?", host):
        return f"{scheme}://..."  # a password that is not quoted, or stands where a host does
    return f"{scheme}://{host}{slash}{re.split('[?#]', path)[0]}"


def _reason(error: Exception, url: str) -> str:
    """The first line of an error, without what must stay secret; of an import, what to install."""
    if isinstance(error, ImportError):
        missing = error.__cause__ or error
        return f"its driver is not installed ({missing})"
    if _without_credentials(url).endswith("://..."):
        return type(error).__name__  # what the driver took for a host or a port may be in its message
    text = next(iter(str(getattr(error, "orig", None) or error).strip().splitlines()), type(error).__name__)
    password = url.partition("://")[2].partition("/")[0].rpartition("@")[0].partition(":")[2]
    options = parse_qsl(url.partition("?")[2])
    secrets = [value for name, value in options if re.search("pass|pwd|token|secret|key", name.lower())]
    for secret in (password, unquote(password), *secrets):
        text = text.replace(secret, "***") if secret else text
    return text


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
