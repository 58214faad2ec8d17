"""The files in the folder of a server: spec.json, what it shall serve; state.json, what its supervisor serves.

Imports nothing heavy: the supervisor reads and writes these in every container.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stocktake.errors import StocktakeError
from stocktake.files import atomic_write
from stocktake.serving.settings import ServerSettings

SPEC, STATE, LOG = "spec.json", "state.json", "server.log"
Status = Literal["starting", "serving", "updating", "failed", "stopped", "dead"]
"""failed: its workers did not start; dead: the supervisor was killed."""


@dataclass(frozen=True)
class Process:
    """One process of this machine, by its id and start time: an id alone is used again."""

    pid: int
    started: str

    def alive(self) -> bool:
        """Whether it still runs: not ended, not replaced by another program with its number."""
        return self.started != "" and process_start(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Signal it, if it is still there."""
        if self.alive():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)

    @classmethod
    def from_pid(cls, pid: int) -> Process:
        """The process that has this id now."""
        return cls(pid, process_start(pid))


@dataclass(frozen=True)
class Deployment:
    """What a server shall serve."""

    model: str
    """Folder with model.onnx and model.json, or an MLflow model folder around it."""
    model_uri: str
    """Where the model came from, for people."""
    version: str | None
    """What answers bear as model_version, such as stocktake/3. None: the digest of the model's files."""
    settings: dict[str, Any]
    """The server's, as they were given; what is not given has its default."""
    generation: int = 1
    """Counts the updates of an endpoint."""

    @property
    def server(self) -> ServerSettings:
        """All settings. Workers share the cores out, unless `threads` was given.

        Raises:
            StocktakeError: an unknown setting or a bad value.
        """
        settings = ServerSettings.read(self.settings)
        if "threads" in self.settings:
            return settings
        return dataclasses.replace(settings, threads=max(1, settings.threads // settings.workers))


@dataclass(frozen=True)
class State:
    """What the supervisor of a server last wrote down."""

    supervisor: Process
    status: Status
    address: str
    """http://host:port, as it is reached from this machine."""
    generation: int
    """The one that is served; 0 before any is."""
    workers: tuple[Process, ...] = ()
    failed_generation: int | None = None
    """The update that failed, if the last one did; the log says why."""


def read_spec(folder: Path) -> Deployment:
    """What a server shall serve.

    Raises:
        StocktakeError: the file is missing or damaged.
    """
    return Deployment(**_read(folder / SPEC, Deployment))


def write_spec(folder: Path, deployment: Deployment) -> None:
    """Replace what a server shall serve."""
    atomic_write(folder / SPEC, json.dumps(dataclasses.asdict(deployment), indent=2))


def read_state(folder: Path) -> State | None:
    """What the supervisor last wrote; None before it wrote anything.

    Raises:
        StocktakeError: the file is damaged.
    """
    if not (folder / STATE).exists():
        return None
    values = _read(folder / STATE, State)
    try:
        values["supervisor"] = Process(**values["supervisor"])
        values["workers"] = tuple(Process(**worker) for worker in values["workers"])
        return State(**values)
    except (KeyError, TypeError) as error:
        raise _damaged(folder / STATE, str(error)) from None


def write_state(folder: Path, state: State) -> None:
    """Replace the state."""
    atomic_write(folder / STATE, json.dumps(dataclasses.asdict(state), indent=2))


def process_start(pid: int) -> str:
    """When the process began, as text to compare; empty if there is none, or only its remains."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
        except OSError:
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    state, _, began = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    return "" if state.startswith("Z") else began.strip()


def log_tail(folder: Path, since: int = 0, lines: int = 15) -> str:
    """The last lines of an endpoint's log, written after the first `since` bytes, without those of requests."""
    try:
        with (folder / LOG).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(min(since, end), end - 2**20))
            written = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join([line for line in written.splitlines() if '"request": ' not in line][-lines:])


def version_of(model: Path) -> str | None:
    """NAME/VERSION of a model folder that MLflow fetched from a registry; None for any other."""
    import yaml

    try:
        fetched = yaml.safe_load((model / "registered_model_meta").read_text(encoding="utf-8"))
        return f"{fetched['model_name']}/{fetched['model_version']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return None


def _read(path: Path, kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(values, dict) or not values.keys() <= names:
        raise _damaged(path, "its content is something else")
    return values


def _damaged(path: Path, reason: str) -> StocktakeError:
    return StocktakeError(
        f"{path} cannot be read ({reason}): delete the endpoint {path.parent.name} and create it again"
    )
