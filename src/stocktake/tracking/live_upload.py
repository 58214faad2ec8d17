"""Upload of live runs in a thread, so that a training does not wait for a server and does not fail with it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from stocktake.errors import StocktakeError
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import LocalRun
from stocktake.tracking.uploader import RunUploader, StoreAwayError, UploadError

_ROUND_SECONDS = 5.0
_PAUSE_SECONDS = 30.0
"""Between attempts while the store fails."""
_FLUSH_SECONDS = 10.0
_LAST_ATTEMPTS = 3


class LiveUploader:
    """Uploads a run and its children every few seconds. A store that fails is reported once and tried again later."""

    def __init__(self, connection: Connection, workspace: Path) -> None:
        """`workspace` is named in the warning."""
        self.connection = connection
        self._workspace = workspace
        self._uploaders: list[RunUploader] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="live-upload", daemon=True)
        self._next_attempt = 0.0
        self._warned = False

    def begin(self, run: LocalRun) -> None:
        """Create the MLflow run of the first run, and upload from now on.

        Raises UploadError or StocktakeError: unlike later, while no work is lost yet.
        """
        self.add(run)
        self._uploaders[0].upload()
        self._thread.start()

    def add(self, run: LocalRun) -> None:
        """Upload a child too, until it has ended."""
        self._uploaders.append(RunUploader(run, self.connection))

    def flush(self) -> None:
        """Upload what there is now. Returns at once if the store failed lately, and after 10 seconds at the latest
        if the thread is stuck in a request."""
        if self._lock.acquire(timeout=_FLUSH_SECONDS):
            try:
                self._round()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Upload the rest, and end. A server that is away costs one health check."""
        self._closing.set()
        with self._lock:
            for attempt in range(_LAST_ATTEMPTS):
                self._next_attempt = 0.0
                if self._round() or self.connection.health_check() is not None:
                    break
                time.sleep(1 + attempt)  # a busy SQLite file, or a hiccup
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._closing.wait(_ROUND_SECONDS):
            with self._lock:
                if not self._closing.is_set():
                    self._round()

    def _should_retry(self) -> bool:
        return not self._next_attempt or (
            time.monotonic() >= self._next_attempt and self.connection.health_check() is None
        )

    def _round(self) -> bool:
        """Whether all went well, of runs that need it, parents before children."""
        failure: Exception | None = None
        if not self._should_retry():
            return False
        for uploader in list(self._uploaders):
            try:
                uploader.upload()
            except (UploadError, StocktakeError, OSError, ValueError) as error:
                failure = failure or error
                if isinstance(error, StoreAwayError):
                    break
        self._uploaders = [uploader for uploader in self._uploaders if not uploader.is_complete]
        if failure is None:
            self._next_attempt = 0.0
            return True
        self._next_attempt = time.monotonic() + _PAUSE_SECONDS
        self._warn(failure)
        return False

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"warning: cannot log to {self.connection.shown} ({brief(error)}); the run goes on, its results are"
                f" kept in {self._workspace / 'runs'}: upload them later with"
                f" `stocktake sync --workspace {self._workspace}`",
                file=sys.stderr,
            )
