"""The processes of a study: each takes trials until none is left; the study outlives any of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from optuna.study import Study
from optuna.trial import TrialState

from stocktake.commands.stage_runs import prepare_data
from stocktake.commands.trial import StudyFolder, run_trial
from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.machine import share_the_machine
from stocktake.tracking.local_store import FAILED
from stocktake.tracking.sync import end_run
from stocktake.tuning.study import failure_streak, finish, take_trial

_PATIENCE = 3
"""Workers that may die one after the other without having begun a trial."""
_GRACE_SECONDS = 20.0
"""For a worker to close its run after SIGTERM."""


class TrialWorkers:
    """As a context manager: started with the block, gone after it."""

    def __init__(self, folder: StudyFolder, tracking: TrackingConfig, count: int, seconds: float | None) -> None:
        """`count` processes at a time; none begins a trial after `seconds`."""
        self._folder = folder
        self._tracking = tracking
        self._count = count
        self._deadline = None if seconds is None else time.time() + seconds
        self._processes: list[BaseProcess] = []
        self._idle_deaths = 0

    def __enter__(self) -> TrialWorkers:
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM to those still at it, so that they close their runs; then SIGKILL."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def tend(self, study: Study) -> bool:
        """Whether somebody is still at work. A worker that died is replaced, the trial it was at has failed.

        Raises:
            StocktakeError: the workers die before they begin a trial.
        """
        for process in [process for process in self._processes if process.exitcode is not None]:
            self._processes.remove(process)
            if process.exitcode == 0:
                continue
            self._idle_deaths = 0 if self._end_trial_of(process, study) else self._idle_deaths + 1
            if self._idle_deaths >= _PATIENCE:
                raise StocktakeError(
                    f"{_PATIENCE} workers {_death(process)} before they could begin a trial: see their errors above"
                )
            self._start()
        return bool(self._processes)

    def _start(self) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._count)
        process = multiprocessing.get_context("spawn").Process(
            target=_work,
            args=(self._folder.path, self._tracking, self._folder.database, threads, self._deadline),
            name=f"stocktake-trials-{len(self._processes)}",
        )
        share_the_machine()  # for the worker: OpenMP reads its settings when it is loaded, before a worker's first line
        held = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            process.start()
        finally:
            if held is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = held
        self._processes.append(process)

    def _end_trial_of(self, process: BaseProcess, study: Study) -> bool:
        """Whether it was at a trial."""
        with self._folder.lock:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            its_own = [trial for trial in running if trial.user_attrs.get("worker") == process.pid]
        for trial in its_own:
            reason = f"its process {_death(process)}"
            finish(study, trial.number, TrialState.FAIL, reason=reason, kind=reason)
            if "folder" in trial.user_attrs:
                path = self._folder.path.parent / trial.user_attrs["folder"]
                end_run(path, self._tracking, status=FAILED, reason=reason)
        return bool(its_own)


def _death(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _work(path: Path, tracking: TrackingConfig, database: str | None, threads: int, deadline: float | None) -> None:
    """The life of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_the_machine()
    import torch

    torch.set_num_threads(threads)
    try:
        folder = StudyFolder.open(path, tracking, database)
        study = folder.load()
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            prepared = prepare_data(folder.config)
        while deadline is None or time.time() < deadline:
            trial = take_trial(
                study, folder.space, sampler=folder.sampler, seed=folder.seed, budget=folder.trials, lock=folder.lock
            )
            if trial is None:
                break
            if run_trial(folder, study, trial, prepared) is TrialState.FAIL and failure_streak(study):
                break  # the process that tends the workers sees it too, and ends the study
    except StocktakeError as error:
        print(f"stocktake: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    """Without the process that tends them, workers would go on unseen, beside those of the resumed study."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)
