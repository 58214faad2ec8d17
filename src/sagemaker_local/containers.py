"""Containers as processes of this machine: their folder, environment, host names, log lines, and their end."""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import stocktake
from sagemaker_local import container_init
from sagemaker_local.container_init import MODEL_FOLDER, NOT_CONFINED

ACCESS_KEY = "testing"
"""moto takes any; this one cannot be mistaken for a real one."""
_TRAIN = Path(stocktake.__file__).parents[2] / "deploy" / "container" / "training" / "train"
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_KEPT_PREFIXES = ("PIP_", "UV_")
"""Of this process's environment, what a container is given: the way to programs and packages, nothing of the user's."""


@dataclass(frozen=True)
class Machine:
    """What every container of one local AWS shares."""

    folder: Path
    """Theirs alone; removed with the server."""
    region: str
    confined: bool
    """Whether a container has a mount namespace, and so an /opt/ml, of its own."""
    grace: float
    """Seconds between SIGTERM and SIGKILL."""
    startup: float
    """Seconds that a model server may take until it answers /ping."""
    images: Mapping[str, str]
    """From a pattern of image names to the words that such an image's containers start with."""
    endpoint: str = ""
    """Address of this AWS."""
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    running: set[Container] = field(default_factory=set)
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Kill every container; none starts any more."""
        self.closed.set()
        left = list(self.running)
        for container in left:
            container.kill()
        for container in left:
            container.wait()

    def new_number(self) -> int:
        """Of a job or server: names its folder and its loopback addresses."""
        return next(self.numbers)

    def entry_point(self, image: str) -> list[str]:
        """The words that an image starts with, before `train` or `serve`; none unless they were given.

        The training image of this checkout, named stocktake-training, starts with its own `train`.
        """
        for pattern, words in self.images.items():
            if fnmatch.fnmatchcase(image, pattern):
                return shlex.split(words)
        return ["sh", str(_TRAIN)] if "stocktake-training" in image and _TRAIN.is_file() else []

    def aws_environment(self) -> dict[str, str]:
        """What makes a client talk to this AWS."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
        }

    def environment(self, scratch: Path, isolated: bool = False) -> dict[str, str]:
        """Of a container, before what its request sets; without a way to AWS if it is isolated."""
        kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
        # The programs of this environment are the image's.
        kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
        temporary = scratch / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        kept |= {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "AWS_REGION": self.region}
        return kept if isolated else kept | self.aws_environment()


class Container:
    """A program that runs in a folder seen as /opt/ml; its whole tree of processes ends with it."""

    def __init__(
        self,
        machine: Machine,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        on_end: Callable[[], None] = lambda: None,
        addresses: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `addresses` are of its network: host name to address. Lines are told as they come."""
        if machine.closed.is_set():
            raise RuntimeError("the server is ending")
        environment = dict(environment)
        words = list(command)
        if not machine.confined:
            words = [word.replace(MODEL_FOLDER, str(folder)) for word in words]
            environment["SAGEMAKER_BASE_DIR"] = str(folder)
        order = {
            "command": words,
            "folder": str(folder) if machine.confined else None,
            "hosts": _hosts_file(folder.parent / "hosts", addresses or {}),
        }
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", container_init.__file__, json.dumps(order)],
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
        self._running = machine.running
        self._running.add(self)
        if machine.closed.is_set():  # in between
            self.kill()
        self._reader = threading.Thread(target=self._read, args=(on_line, on_end), daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and until its last line has been told."""
        return None if self._reader.is_alive() else self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, or None if it still runs."""
        self._reader.join(timeout)
        return self.exit_code

    def terminate(self) -> None:
        """SIGTERM to the program."""
        with self._guard:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all of it."""
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
            # The first process holds the pipe as well: it has ended, or a line could not be told and it has to.
            self.kill()
            self._process.wait()
            self._running.discard(self)
            on_end()


def stop(containers: Sequence[Container], grace: float) -> None:
    """SIGTERM to all, SIGKILL to those that still run after `grace` seconds; returns when all have ended."""
    for container in containers:
        container.terminate()
    deadline = time.monotonic() + grace
    for container in containers:
        if container.wait(max(0.0, deadline - time.monotonic())) is None:
            container.kill()
    for container in containers:
        container.wait()


def can_confine(folder: Path) -> bool:
    """Whether this machine allows a private mount namespace; tried in `folder`."""
    root = folder / "trial" / "ml"
    root.mkdir(parents=True, exist_ok=True)
    order = {"command": ["true"], "folder": str(root), "hosts": None}
    command = [sys.executable, "-I", "-S", container_init.__file__, json.dumps(order)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as trial:
        return trial.wait() != NOT_CONFINED


def _hosts_file(path: Path, addresses: Mapping[str, str]) -> str | None:
    if not addresses:
        return None
    there = Path("/etc/hosts").read_text(encoding="utf-8") if Path("/etc/hosts").exists() else ""
    path.write_text(there + "".join(f"\n{address} {name}" for name, address in addresses.items()) + "\n")
    return str(path)
