"""The supervisor of a server: owns the listening socket, starts workers on it, replaces them, ends them.

A new model is served by new workers on the same socket before the old ones are told to end, so that no request is
refused in between; if the new ones do not come up, the old ones stay. Imports nothing heavy: containers start with it.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from stocktake.errors import StocktakeError
from stocktake.serving import deployment as files
from stocktake.serving.crew import START_SECONDS, Crew, Worker
from stocktake.serving.deployment import Deployment, Process, State, Status
from stocktake.serving.settings import ServerSettings
from stocktake.serving.worker import READY

_WELL_SECONDS = 60.0  # a worker that lived for so long is started again at once when it dies
_LONGEST_PAUSE = 30.0
_LARGEST_LOG = 10_000_000  # bytes, and as many in the older file
_TICK_SECONDS = 2.0


class Supervisor:
    """Serves what is wanted until SIGTERM or SIGINT; SIGHUP asks anew what is wanted."""

    def __init__(self, wanted: Callable[[], Deployment], folder: Path | None = None) -> None:
        """Listen.

        Args:
            wanted: says what to serve: at the start, and at every SIGHUP.
            folder: of an endpoint; its state is kept there, and its old models are removed.

        Raises:
            StocktakeError: nothing to serve, a bad setting, or the port is in use.
        """
        self._wanted, self._folder = wanted, folder
        deployment = wanted()
        self._listener = _listen(deployment.server, read_port(folder))
        self.address = address_of(self._listener)
        self._error: str | None = None
        self._failed: int | None = None
        self._status: Status = "starting"
        self._serving = Crew(deployment, [])
        self._coming: Crew | None = None
        self._leaving: list[Worker] = []
        self._told_to_end = self._asked_anew = self._came_up = False
        self._selector = selectors.DefaultSelector()
        self._next_look = time.monotonic() + _TICK_SECONDS
        self._metrics = _metrics_folder(folder)

    def run(self) -> int:
        """Serve; the exit code: 0 when it was told to end, 1 when it never came up (the reason is on stderr)."""
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ)
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        try:
            if reason := self._start(self._serving):
                raise StocktakeError(reason)
            self._report()
            while self._serving.workers or self._serving.again_at or self._coming or self._leaving:
                for key, _ in self._selector.select(self._pause()):
                    if key.fileobj is woken:
                        with suppress(BlockingIOError):
                            woken.recv(4096)
                    else:
                        self._hear(key.data)
                self._tend()
            return 0 if self._came_up or self._told_to_end else 1
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            for worker in [*self._serving.workers, *(self._coming.workers if self._coming else []), *self._leaving]:
                worker.process.kill()
            self._listener.close()
            self._selector.close()
            if self._metrics:
                shutil.rmtree(self._metrics, ignore_errors=True)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP and not sys.stderr.isatty():  # a terminal that is closed sends it too
            self._asked_anew = True
        elif self._told_to_end:  # the second time: at once
            for worker in self._leaving:
                worker.deadline = 0
        else:
            self._told_to_end = True

    def _pause(self) -> float | None:
        """Seconds until something is due."""
        crews = [self._serving, *([self._coming] if self._coming else [])]
        workers = [*self._leaving, *(worker for crew in crews for worker in crew.workers)]
        due = [worker.deadline for worker in workers if worker.deadline is not None] + self._serving.again_at
        if self._folder:
            due.append(self._next_look)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _tend(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        crews = [self._serving, *([self._coming] if self._coming else [])]
        for worker in [*self._leaving, *(worker for crew in crews for worker in crew.workers)]:
            if worker.deadline is not None and worker.deadline <= now:
                if worker not in self._leaving:
                    worker.reason = f"a worker was not ready after {START_SECONDS:g} s"
                worker.deadline = None
                worker.process.kill()
        if self._told_to_end:
            self._end_all()
            return
        if any(at <= now for at in self._serving.again_at):
            self._serving.again_at = [at for at in self._serving.again_at if at > now]
            if reason := self._start(self._serving):
                self._serving.again_at.append(now + _LONGEST_PAUSE)
                self._say(f"{reason}; tried again in {_LONGEST_PAUSE:g} s")
            self._report()
        if self._asked_anew and self._came_up and self._coming is None:
            self._asked_anew = False
            self._update()
        if self._folder and now >= self._next_look:
            self._next_look = now + _TICK_SECONDS
            if not self._folder.is_dir():  # removed by hand: nobody could find this process again
                self._told_to_end = True
            else:
                _rotate(self._folder / files.LOG)

    def _start(self, crew: Crew) -> str | None:
        """Start the workers that the crew lacks, but for those that wait; why that failed."""
        for _ in range(crew.deployment.server.workers - len(crew.workers) - len(crew.again_at)):
            try:
                worker = Worker(crew.deployment, self._listener, self._metrics)
            except OSError as error:
                return f"no process can be started: {error.strerror}"
            crew.workers.append(worker)
            self._selector.register(worker.line, selectors.EVENT_READ, worker)
        return None

    def _hear(self, worker: Worker) -> None:
        """A worker is ready, tells why it fails, or is gone."""
        try:
            said = worker.line.recv(65_536)
        except ConnectionResetError:  # gone with something unread
            said = b""
        if said.startswith(READY):
            worker.deadline, worker.ready_since = None, time.monotonic()
            version, _, fault = said.removeprefix(READY).decode("utf-8", "replace").partition("\n")
            worker.version, worker.reason = version, fault
            self._arrived()
        elif said:
            worker.reason += said.decode("utf-8", "replace")
        else:
            self._selector.unregister(worker.line)
            self._gone(worker, worker.gone())

    def _arrived(self) -> None:
        if self._coming and all(worker.ready_since for worker in self._coming.workers):
            before, self._serving, self._coming = self._serving, self._coming, None
            self._leave(before.workers)
            self._up()
        elif not self._came_up and all(worker.ready_since for worker in self._serving.workers):
            self._up()
        else:
            self._report()

    def _up(self) -> None:
        """What is wanted is served."""
        self._came_up, self._error, self._failed = True, None, None
        self._forget_models(self._serving.deployment)
        self._report()
        one = self._serving.deployment
        self._say(f"serving {one.model_uri} on {self.address}", workers=one.server.workers, generation=one.generation)

    def _gone(self, worker: Worker, reason: str) -> None:
        for gauge in self._metrics.glob(f"gauge_live*_{worker.process.pid}.db") if self._metrics else ():
            gauge.unlink(missing_ok=True)  # what it holds now is nothing; what it has counted stays counted
        if worker in self._leaving:
            self._leaving.remove(worker)
            self._report()
        elif self._coming and worker in self._coming.workers:
            self._coming.workers.remove(worker)
            failed, self._coming = self._coming, None
            self._leave(failed.workers)
            self._refused(failed.deployment.generation, reason)
        elif not self._came_up:
            self._serving.workers.remove(worker)
            self._leave(self._serving.workers)
            self._serving.workers = []
            if not self._told_to_end:
                self._error = reason
                self._report("failed")
                print(f"serve: {self._serving.deployment.model_uri} did not come up: {reason}", file=sys.stderr)
        else:
            crew = self._serving
            crew.workers.remove(worker)
            well = worker.ready_since is not None and time.monotonic() - worker.ready_since > _WELL_SECONDS
            crew.deaths = 1 if well else crew.deaths + 1
            pause = 0.0 if crew.deaths == 1 else min(_LONGEST_PAUSE, 0.5 * 2 ** (crew.deaths - 2))
            crew.again_at.append(time.monotonic() + pause)
            self._say(f"{reason}; another is started", died=worker.process.pid, pause_seconds=pause)
            self._report()

    def _update(self) -> None:
        """Start workers for what is wanted now, beside those that serve."""
        generation = self._serving.deployment.generation + 1
        held = self._serving.deployment.server
        try:
            deployment = self._wanted()
            generation, asked = deployment.generation, deployment.server
        except Exception as error:
            self._refused(generation, str(error) or type(error).__name__)
            return
        if (held.host, held.port) != (asked.host, asked.port):
            self._refused(generation, "host and port cannot change while it serves: delete the endpoint and create it")
            return
        coming = Crew(deployment, [])
        if reason := self._start(coming):
            self._leave(coming.workers)
            self._refused(generation, reason)
            return
        self._coming = coming
        self._report()

    def _refused(self, generation: int, reason: str) -> None:
        """An update failed: what served goes on, and is what is wanted again."""
        one = self._serving.deployment
        self._error, self._failed = reason, generation
        if self._folder:
            with suppress(OSError):  # a full disk ends no server
                files.write_wanted(self._folder, one)
        self._forget_models(one)
        self._report()
        self._say(f"generation {generation} did not come up: {reason}; {one.model_uri} is served as before")

    def _leave(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.end()
        self._leaving += workers

    def _end_all(self) -> None:
        for crew in [self._serving, *([self._coming] if self._coming else [])]:
            self._leave(crew.workers)
            crew.workers, crew.again_at = [], []
        self._coming = None
        self._report("stopped")

    def _forget_models(self, kept: Deployment) -> None:
        """Remove the endpoint's copies of models that are no longer served."""
        if self._folder:
            for copy in (self._folder / "model").glob("*"):
                if copy != Path(kept.model):
                    shutil.rmtree(copy, ignore_errors=True)

    def _report(self, status: Status | None = None) -> None:
        """Write the state down."""
        if self._folder is None or not self._folder.is_dir():
            return
        serves = any(worker.ready_since for worker in self._serving.workers)
        if status is None and self._status in ("failed", "stopped"):
            status = self._status
        elif status is None and not self._came_up:
            status = "starting"
        elif status is None and (self._coming or self._leaving):  # those that leave may still take a request
            status = "updating"
        elif status is None:
            status = "serving" if serves else "failing"
        self._status = status
        others = [*(self._coming.workers if self._coming else []), *self._leaving]
        state = State(
            supervisor=Process.known_as(os.getpid()),
            status=status,
            address=self.address,
            generation=self._serving.deployment.generation if self._came_up else 0,
            version=next((worker.version for worker in self._serving.workers if worker.version), None),
            workers=tuple(worker.identity for worker in self._serving.workers),
            others=tuple(worker.identity for worker in others),
            error=self._error,
            failed_generation=self._failed,
        )
        with suppress(OSError):
            files.write_state(self._folder, state)

    def _say(self, message: str, **fields: object) -> None:
        line = f"serve: {message}"
        if not sys.stderr.isatty():
            moment = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": moment, "message": message, **fields})
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def address_of(listener: socket.socket) -> str:
    """http://host:port as this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_port(folder: Path | None) -> int:
    """The port that the endpoint had when its supervisor was last alive; 0 if it had none."""
    with suppress(StocktakeError):
        if folder and (state := files.read_state(folder)):
            return int(state.address.rpartition(":")[2])
    return 0


def _listen(settings: ServerSettings, port_before: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    ports = [settings.port] if settings.port or not port_before else [port_before, 0]
    for port in ports:
        try:
            return socket.create_server((settings.host, port), family=family, backlog=2048)
        except OSError as error:
            if port != ports[-1]:
                continue
            if error.errno == errno.EADDRINUSE:
                raise StocktakeError(f"port {port} is in use: choose another, or 0 for any free one") from None
            if error.errno == errno.EACCES:
                raise StocktakeError(f"port {port} needs more rights: choose one from 1024, or 0") from None
            raise StocktakeError(f"cannot listen on host {settings.host}, port {port}: {error}") from None
    raise AssertionError("unreachable")


def _metrics_folder(folder: Path | None) -> Path | None:
    """An empty folder for the workers' counts; None where nothing can be written: then each worker tells its own."""
    with suppress(OSError):
        if folder is None:
            return Path(tempfile.mkdtemp(prefix="stocktake-metrics-"))
        shutil.rmtree(folder / "metrics", ignore_errors=True)
        (folder / "metrics").mkdir()
        return folder / "metrics"
    return None


def _rotate(log: Path) -> None:
    """Keep the log small. All write at its end, so it can be cut under their hands."""
    with suppress(OSError):
        if log.stat().st_size > _LARGEST_LOG:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)
