"""Containers as processes of this machine: their folder, environment, host names, log lines, and their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from sagemaker_local import container_init
from sagemaker_local.container_init import MODEL_FOLDER, NO_NAMESPACE
from sagemaker_local.context import EmulatorContext

_INIT = [sys.executable, "-I", "-S", container_init.__file__]


class Container:
    """A program that runs with a folder as its /opt/ml; its whole tree of processes ends with it."""

    def __init__(
        self,
        context: EmulatorContext,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        on_end: Callable[[], None] = lambda: None,
        addresses: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            context: of the emulator.
            command: words of the program.
            folder: what the program sees as /opt/ml; `hosts` beside it is written.
            environment: all of the program's variables.
            on_line: called with every line of its output.
            on_end: called once it has ended.
            addresses: host name -> address, for its /etc/hosts.

        Raises:
            OSError: it cannot be started.
        """
        if context.closed.is_set():
            raise OSError("the emulator is ending")
        environment, words = dict(environment), list(command)
        if not context.has_namespaces:
            words = [word.replace(MODEL_FOLDER, str(folder)) for word in words]
            environment["SAGEMAKER_BASE_DIR"] = str(folder)
        order = {
            "command": words,
            "folder": str(folder) if context.has_namespaces else None,
            "hosts": _write_hosts(folder.parent / "hosts", addresses or {}),
        }
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*_INIT, json.dumps(order)],
                stdin=lifeline,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
        except OSError:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        self._guard = threading.Lock()
        self._running = context.running
        self._running.add(self)
        if context.closed.is_set():  # in between
            self.kill()
        self._reader = threading.Thread(target=self._read, args=(on_line, on_end), daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and until its last line has been passed on."""
        return None if self._reader.is_alive() else self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None if it still runs after `timeout` seconds."""
        self._reader.join(timeout)
        return self.exit_code

    def terminate(self) -> None:
        """Send SIGTERM to the program."""
        with self._guard:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to all of its processes."""
        with self._guard:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1

    def _read(self, on_line: Callable[[str], None], on_end: Callable[[], None]) -> None:
        try:
            with self._process.stdout or nullcontext(()) as lines:
                for line in lines:
                    on_line(line.decode("utf-8", "replace").rstrip("\r\n"))
        finally:
            # The first process holds the pipe as well: it has ended, or `on_line` failed and it has to end.
            self.kill()
            self._process.wait()
            self._running.discard(self)
            on_end()


def start_all(starts: Iterable[Callable[[], Container]], grace: float) -> list[Container]:
    """Start containers that belong together; if one cannot be started, stop the others and raise its error."""
    containers: list[Container] = []
    try:
        for start in starts:
            containers.append(start())
    except BaseException:
        stop(containers, grace)
        raise
    return containers


def stop(containers: Sequence[Container], grace: float) -> None:
    """Send SIGTERM to all, SIGKILL to those that still run after `grace` seconds; return when all have ended."""
    for container in containers:
        container.terminate()
    deadline = time.monotonic() + grace
    for container in containers:
        if container.wait(max(0.0, deadline - time.monotonic())) is None:
            container.kill()
    for container in containers:
        container.wait()


def supports_namespaces(folder: Path) -> bool:
    """Return True if this machine allows a private mount namespace; tried in `folder`."""
    root = folder / "trial" / "ml"
    root.mkdir(parents=True, exist_ok=True)
    order = {"command": ["true"], "folder": str(root), "hosts": None}
    with subprocess.Popen([*_INIT, json.dumps(order)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as trial:
        return trial.wait() != NO_NAMESPACE


def _write_hosts(path: Path, addresses: Mapping[str, str]) -> str | None:
    if not addresses:
        return None
    own = Path("/etc/hosts").read_text(encoding="utf-8") if Path("/etc/hosts").exists() else ""
    path.write_text(own + "".join(f"\n{address} {name}" for name, address in addresses.items()) + "\n")
    return str(path)
