"""The worker processes of a study: each runs trials until the study has them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from stocktake.errors import StocktakeError
from stocktake.machine import share_the_machine
from stocktake.stages.prepare import prepare_data
from stocktake.tracking.local_store import FAILED
from stocktake.tracking.sync import end_run
from stocktake.tuning.storage import GRACE_SECONDS, open_storage
from stocktake.tuning.study import StudySpec, create_study, failure_streak, make_sampler, trials_left
from stocktake.tuning.trial import run_trial

_MOST_RETRIES = 2
"""How often a trial is repeated whose process was killed."""
_MOST_DEATHS = 3
"""Workers that may die one after the other without starting a trial."""
_END_SECONDS = 20.0
"""For a worker to close its run after SIGTERM."""


@dataclass(frozen=True)
class Job:
    """What a worker is given; it travels through a pipe, so the URL may hold a password."""

    url: str
    """Of the study's database."""
    study: str
    spec: StudySpec
    folder: Path
    """Of the study's run on this machine."""
    deadline: float | None = None
    """No trial begins after this time, in seconds since 1970."""

    def open(self) -> Study:
        """The study, opened for this process."""
        return create_study(open_storage(self.url, self.repeat), self.study, self.spec)

    def repeat(self, study: Study, trial: FrozenTrial) -> None:
        """End the run of a trial whose process was killed, and let the study try its parameters again."""
        folder = self.folder.parent / str(trial.user_attrs.get("folder"))
        if (folder / "run.json").is_file():
            reason = f"its process was killed: no heartbeat for {GRACE_SECONDS} s"
            end_run(folder, self.spec.config.tracking, status=FAILED, reason=reason)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            retry = RetryHeartbeatStaleTrialCallback(_MOST_RETRIES, inherit_intermediate_values=True)
        retry(study, trial)


class TrialWorkers:
    """As a context manager: started with the block, gone after it."""

    def __init__(self, job: Job, count: int) -> None:
        """`count` processes at a time."""
        self._job = job
        self._count = count
        self._processes: list[BaseProcess] = []
        self._deaths = 0
        self._trials_at_death = -1

    def __enter__(self) -> TrialWorkers:
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM to those still running, so that they close their runs; then SIGKILL."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def poll(self, study: Study) -> bool:
        """Whether a worker is running. A worker that died is replaced.

        Raises:
            StocktakeError: the workers die before they start a trial.
        """
        for process in [process for process in self._processes if process.exitcode is not None]:
            self._processes.remove(process)
            if process.exitcode == 0:
                continue
            trials = len(study.get_trials(deepcopy=False))
            self._deaths = self._deaths + 1 if trials == self._trials_at_death else 1
            self._trials_at_death = trials
            if self._deaths >= _MOST_DEATHS:
                raise StocktakeError(
                    f"{_MOST_DEATHS} workers ended with exit code {process.exitcode} before they could start a trial: "
                    "see their errors above"
                )
            self._start()
        return bool(self._processes)

    def _start(self) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._count)
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(self._job, threads))
        share_the_machine()  # for the worker: OpenMP reads its settings when it is loaded, before a worker's first line
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        self._processes.append(process)


def _work(job: Job, threads: int) -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers with SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_the_machine()
    import torch

    torch.set_num_threads(threads)
    try:
        study = job.open()
        with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull):
            prepared = prepare_data(job.spec.config)
        lock = FileLock(job.folder / "study.lock")

        def objective(trial: Trial) -> tuple[float, ...]:
            return run_trial(trial, job.spec, job.folder, prepared, lock.release)

        while job.deadline is None or time.time() < job.deadline:
            # One worker at a time counts and asks: never more trials than the study shall have (on one machine; over a
            # database, several machines may each start one at the same moment)
            lock.acquire()
            try:
                if trials_left(study, job.spec.trials) <= 0:
                    break
                study.sampler = make_sampler(job.spec.sampler, job.spec.seed, len(study.get_trials(deepcopy=False)))
                study.optimize(objective, n_trials=1, catch=(Exception,))
            finally:
                lock.release(force=True)
            if failure_streak(study):
                break
    except StocktakeError as error:
        print(f"stocktake: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Without their parent, workers would go on unseen, beside those of the resumed study."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_END_SECONDS)
        os._exit(1)
