"""The processes of a server: uvicorn's `Multiprocess` over workers that load the model of spec.json.

SIGHUP replaces the workers one by one: each new one reads spec.json, and the old one ends once the new one answers. If
a new one does not start, the old ones go on. Imports nothing heavy: containers start with it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from uvicorn import Config
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from stocktake.errors import StocktakeError
from stocktake.serving import deployment as files
from stocktake.serving.deployment import Process, State, Status
from stocktake.serving.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

START_SECONDS = 120
"""A worker that is not ready by then has failed. It takes about one second; a machine may be busy."""
MAX_CONNECTIONS = 800
"""Of a worker, at once: fewer than the 1024 files that a process may usually have open."""
MAX_HEAD_BYTES = 32_768
"""Of a request's line and headers; uvicorn answers 400 beyond."""
KEEP_ALIVE_SECONDS = 65
"""Longer than the minute after which load balancers close idle connections: the client closes first."""
_MAX_LOG_BYTES = 10_000_000  # and as many in the older file
log = logging.getLogger("stocktake.serving")


class Supervisor(Multiprocess):
    """Serves what spec.json of a folder says until SIGTERM or SIGINT; SIGHUP reads it again."""

    def __init__(self, folder: Path, refresh: Callable[[], None] | None = None, *, is_endpoint: bool = False) -> None:
        """Listen.

        Args:
            folder: with spec.json; state.json is written into it.
            refresh: brings spec.json up to date before it is read again.
            is_endpoint: the folder belongs to an endpoint: old copies of models and a long log are removed from it,
                and the server ends when somebody removes the folder.

        Raises:
            StocktakeError: a bad setting, or the port is in use.
        """
        configure_logging()
        self._folder, self._refresh, self._is_endpoint = folder, refresh, is_endpoint
        self._spec = files.read_spec(folder)
        settings = self._spec.server
        listener = listen(settings, previous_port(folder))
        self.address = address_of(listener)
        super().__init__(server_config(partial(create_worker_app, folder), settings), [listener])
        self._is_up = False
        self._failed_generation: int | None = None
        self._written: State | None = None

    def serve(self) -> int:
        """Serve; the exit code: 0 after SIGTERM or SIGINT, 1 if the workers did not start (their log says why)."""
        self._write_state("starting")
        try:
            self.run()
        finally:
            for process in self.processes:
                process.process.kill()
            for listener in self.sockets:
                listener.close()
        failed = any(process.exitcode == STARTUP_FAILURE for process in self.processes)
        self._write_state("failed" if failed else "stopped")
        return 1 if failed else 0

    def keep_subprocess_alive(self) -> None:
        """Replace workers that died or hang; called twice a second."""
        for process in self.processes:
            process.child_conn.close()  # the worker's end: a worker that dies is seen at once, not after START_SECONDS
        super().keep_subprocess_alive()
        if not self._is_up and all(process.is_ready(timeout=1) for process in self.processes):
            self._is_up = True
            self._log_serving()
        self._write_state("serving" if self._is_up else "starting")
        if self._is_endpoint:
            if not self._folder.is_dir():  # removed by hand: nobody could find this process again
                self.should_exit.set()
            else:
                _rotate(self._folder / files.LOG)

    def handle_hup(self) -> None:
        """Replace the workers by ones that serve what spec.json says now; keep the old ones if that fails."""
        if sys.stderr.isatty():  # a terminal that is closed sends it too
            self.should_exit.set()
            return
        former = self._spec
        try:
            if self._refresh is not None:
                self._refresh()
            self._spec = files.read_spec(self._folder)
            settings = self._spec.server
        except StocktakeError as error:
            self._spec = former
            self._keep_former(former.generation + 1, str(error))
            return
        self._write_state("updating")
        self.config.timeout_graceful_shutdown = round(settings.drain_seconds)
        replaced = list(self.processes)
        super().handle_hup()
        if any(process in replaced for process in self.processes):
            failed, self._spec = self._spec.generation, former
            self._keep_former(failed, "its workers did not start")
            return
        while self.processes_num < settings.workers:
            self.handle_ttin()
        while self.processes_num > settings.workers:
            self.handle_ttou()
        self._failed_generation = None
        self._log_serving()

    def _keep_former(self, generation: int, reason: str) -> None:
        self._failed_generation = generation
        if self._is_endpoint:
            with suppress(OSError):  # a full disk ends no server
                files.write_spec(self._folder, self._spec)
        self._remove_old_models()
        log.error(
            "serve: generation %d is not served: %s; %s is served as before", generation, reason, self._spec.model_uri
        )
        self._write_state("serving")

    def _log_serving(self) -> None:
        self._remove_old_models()
        log.info("serve: serving %s on %s", self._spec.model_uri, self.address)

    def _remove_old_models(self) -> None:
        if self._is_endpoint:
            for copy in (self._folder / "model").glob("*"):
                if copy != Path(self._spec.model):
                    shutil.rmtree(copy, ignore_errors=True)

    def _write_state(self, status: Status) -> None:
        pids = [process.pid for process in self.processes if process.exitcode is None]
        state = State(
            supervisor=Process.from_pid(os.getpid()),
            status=status,
            address=self.address,
            generation=self._spec.generation if self._is_up else 0,
            workers=tuple(Process.from_pid(pid) for pid in pids if pid is not None),
            failed_generation=self._failed_generation,
        )
        if state != self._written and self._folder.is_dir():
            self._written = state
            with suppress(OSError):
                files.write_state(self._folder, state)


def server_config(create_app: Callable[[], Starlette], settings: ServerSettings) -> Config:
    """uvicorn's configuration."""
    return Config(
        create_app,
        factory=True,
        workers=settings.workers,
        http="stocktake.serving.connection:TimedConnection",  # by name: only the workers import it
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.drain_seconds),
        timeout_worker_healthcheck=START_SECONDS,
    )


def create_worker_app(folder: Path) -> Starlette:
    """A worker's application, created in its process; the worker ends with its supervisor.

    Exits with STARTUP_FAILURE, its reason in the log, where the model cannot be loaded.
    """
    configure_logging()
    supervisor = parent_process()
    if supervisor is not None:
        threading.Thread(target=_end_with, args=(supervisor.sentinel,), daemon=True).start()
    try:
        from stocktake.serving.app import MAX_PIXELS, create_app
        from stocktake.serving.predictor import Predictor

        spec = files.read_spec(folder)
        settings = spec.server
        predictor = Predictor(Path(spec.model), threads=settings.threads, version=spec.version, max_pixels=MAX_PIXELS)
    except Exception as error:
        log.log(logging.ERROR, "serve: %s", error, exc_info=not isinstance(error, StocktakeError))
        sys.exit(STARTUP_FAILURE)
    is_batch_transform = os.environ.get("SAGEMAKER_BATCH", "").lower() == "true"
    return create_app(predictor, settings, batch_mode=is_batch_transform)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def configure_logging() -> None:
    """Log to stderr, a message and its newline in one write: workers share the file."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each malformed request


def address_of(listener: socket.socket) -> str:
    """http://host:port as this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def previous_port(folder: Path) -> int:
    """The port of the folder's last server; 0 if there was none."""
    with suppress(StocktakeError):
        if state := files.read_state(folder):
            return int(state.address.rpartition(":")[2])
    return 0


def listen(settings: ServerSettings, port_before: int = 0) -> socket.socket:
    """A listening socket; if any free port will do, the former one where it is still free.

    Raises:
        StocktakeError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    if port_before and not settings.port:
        with suppress(OSError):
            return socket.create_server((settings.host, port_before), family=family, backlog=2048)
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs more rights"}
        reason = reasons.get(error.errno or 0, f"cannot be used on host {settings.host}: {error.strerror or error}")
        raise StocktakeError(f"port {settings.port} {reason}: choose another, or 0 for any free one") from None


def _rotate(path: Path) -> None:
    """Keep the log small. Every process appends to it, so it can be cut in place."""
    with suppress(OSError):
        if path.stat().st_size > _MAX_LOG_BYTES:
            shutil.copyfile(path, path.with_suffix(".log.1"))
            os.truncate(path, 0)
