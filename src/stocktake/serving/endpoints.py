"""Endpoints on this machine: servers that outlive the command that started them, and are found again by later ones.

An endpoint is a folder with spec.json, state.json, server.log and model/<generation>/, and a supervisor
(serving/supervisor.py) that serves it in a process of its own. Nothing here needs mlflow.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stocktake.errors import StocktakeError
from stocktake.serving import deployment as files
from stocktake.serving.deployment import Deployment, Process, State, Status, version_of
from stocktake.serving.settings import ServerSettings
from stocktake.serving.supervisor import START_SECONDS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_PAUSE = 0.05
_LATER_SECONDS = 30.0  # beyond what the supervisor itself allows its workers
_started: list[subprocess.Popen[bytes]] = []  # by this process, which reaps those that end before it


@dataclass(frozen=True)
class Endpoint:
    """An endpoint as it is now."""

    name: str
    status: Status
    address: str
    """http://host:port; empty before it ever served."""
    model_uri: str
    version: str | None
    """The model's, as answers bear it: stocktake/3, or the digest of the model's files."""
    generation: int
    settings: dict[str, Any]
    """As given; what is not given has its default."""
    pid: int | None
    """Of the supervisor, if it lives."""
    workers: tuple[int, ...]
    """Pids of the processes that serve this generation."""
    error: str | None
    """What is wrong, and the way out."""
    model: Path
    """Folder of the model that is served."""
    log: Path


def state_folder() -> Path:
    """Where the endpoints' folders lie: $STOCKTAKE_STATE, $XDG_STATE_HOME/stocktake or ~/.local/state/stocktake."""
    if own := os.environ.get("STOCKTAKE_STATE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "stocktake"


def create(name: str, model: Path, *, model_uri: str, settings: Mapping[str, Any]) -> Endpoint:
    """Start an endpoint and wait until it answers. One that does not come up leaves nothing behind.

    Args:
        name: letters, digits, - and _.
        model: an MLflow model folder or an exported one; copied.
        model_uri: where it came from.
        settings: of ServerSettings.

    Raises:
        StocktakeError: a bad name or setting, the name is taken, or it did not come up, with the end of its log.
    """
    with _locked(name) as folder:
        if (folder / files.SPEC).exists():
            raise StocktakeError(
                f"there is an endpoint {name} already{'' if _lives(folder) else ' (dead: an update starts it again)'}:"
                " update it, delete it, or choose another name"
            )
        ServerSettings.read(settings)
        spec = Deployment("", model_uri, version_of(model), dict(settings))
        shutil.rmtree(folder, ignore_errors=True)  # what a killed command left
        try:
            folder.mkdir(mode=0o700)
            files.write_spec(folder, _with_model(folder, spec, model))
            _launch(folder)
        except BaseException:  # a Ctrl-C too
            _stop(folder)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _read(folder)


def update(
    name: str,
    model: Path | None = None,
    *,
    model_uri: str | None = None,
    settings: Mapping[str, Any] | None = None,
    exactly: bool = False,
) -> Endpoint:
    """Serve another model or with other settings, without dropping a request; a dead endpoint is started again.

    Args:
        name: of the endpoint.
        model: default: the model that it serves.
        model_uri: where `model` came from.
        settings: those that change.
        exactly: whether `settings` are all; else the others stay as they are.

    Raises:
        StocktakeError: no such endpoint, a bad setting, or the new workers did not come up: then the old ones serve on.
    """
    with _locked(name) as folder:
        _check_exists(folder)
        _wait_for_update(folder)
        before, state = files.read_spec(folder), files.read_state(folder)
        is_alive = state is not None and state.supervisor.alive()
        newest = max(before.generation, (state and state.failed_generation) or 0)
        spec = Deployment(
            before.model,
            model_uri or before.model_uri,
            version_of(model) if model else before.version,
            {**({} if exactly else before.settings), **(settings or {})},
            newest + 1,
        )
        if is_alive and (spec.server.host, spec.server.port) != (before.server.host, before.server.port):
            raise StocktakeError("host and port cannot change while it serves: delete the endpoint and create it")
        spec = _with_model(folder, spec, model or Path(before.model))
        files.write_spec(folder, spec)
        try:
            if state and is_alive:
                since = _log_size(folder)
                state.supervisor.signal(signal.SIGHUP)
                _wait(folder, spec.generation, since)
            else:
                _launch(folder)
        except StocktakeError:
            if not _lives(folder):
                files.write_spec(folder, before)
            shutil.rmtree(spec.model, ignore_errors=True)
            raise
        return _read(folder)


def get(name: str) -> Endpoint:
    """An endpoint.

    Raises:
        StocktakeError: there is none of that name, naming those that there are.
    """
    folder = state_folder() / _checked(name)
    _check_exists(folder)
    return _read(folder)


def list_endpoints() -> list[Endpoint]:
    """All endpoints, by name."""
    paths = sorted(state_folder().glob(f"*/{files.SPEC}"))
    return [_read(path.parent) for path in paths if _NAME.fullmatch(path.parent.name)]


def delete(name: str) -> None:
    """End an endpoint's processes, once they have answered what they had begun, and remove its folder.

    Raises:
        StocktakeError: there is none of that name.
    """
    with _locked(name) as folder:
        _check_exists(folder)
        _stop(folder)
        shutil.rmtree(folder)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StocktakeError(f"{name!r} is no name of an endpoint: use up to 63 letters, digits, - and _")
    return name


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    """The endpoint's folder, while no other command may change it."""
    root = state_folder()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StocktakeError(f"cannot keep endpoints in {root}: {error.strerror}; set STOCKTAKE_STATE") from None
    with _lock(root / _checked(name)):
        yield root / name


def _lock(folder: Path) -> FileLock:
    (folder.parent / ".locks").mkdir(mode=0o700, exist_ok=True)
    return FileLock(folder.parent / ".locks" / folder.name)


def _check_exists(folder: Path) -> None:
    if not (folder / files.SPEC).exists():
        names = ", ".join(endpoint.name for endpoint in list_endpoints()) or "none"
        raise StocktakeError(f"there is no endpoint {folder.name} in {folder.parent}; there are: {names}")


def _with_model(folder: Path, spec: Deployment, model: Path) -> Deployment:
    """The spec with a copy of the model of its own: later changes of the given folder do not matter."""
    from stocktake.serving.predictor import DESCRIPTION, GRAPH, digest, exported_folder

    exported = exported_folder(model)
    copy = folder / "model" / str(spec.generation)
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        for name in (DESCRIPTION, GRAPH):
            shutil.copyfile(exported / name, copy / name)
        version = spec.version or digest((copy / DESCRIPTION).read_bytes(), (copy / GRAPH).read_bytes())
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise StocktakeError(
            f"{spec.model_uri} holds no exported model ({error.strerror}: {error.filename}): give one that stocktake"
            " has logged or exported"
        ) from None
    return dataclasses.replace(spec, model=str(copy), version=version)


def _launch(folder: Path) -> None:
    """Start the supervisor and wait until it serves."""
    since = _log_size(folder)
    before = files.read_state(folder)
    with (folder / files.LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stocktake.serving.serve", "--endpoint", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=_environment(),
            start_new_session=True,  # it outlives the terminal
        )
    _started[:] = [started for started in [*_started, process] if started.poll() is None]
    deadline = time.monotonic() + START_SECONDS + _LATER_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            state = files.read_state(folder)
            if state and state.supervisor.pid == process.pid and state != before and state.status == "serving":
                return
            time.sleep(_PAUSE)
    except BaseException:
        process.kill()
        raise
    process.kill()
    process.wait()
    raise StocktakeError(f"the endpoint {folder.name} did not start{_end_of_log(folder, since)}")


def _wait(folder: Path, generation: int, since: int) -> None:
    """Until the supervisor serves the generation, and no other, or has given it up."""
    patience = START_SECONDS + files.read_spec(folder).server.drain_seconds + _LATER_SECONDS
    deadline = time.monotonic() + patience
    while True:
        state = files.read_state(folder)
        if state and state.generation == generation and state.status == "serving":
            return
        reason = None
        if state and state.failed_generation == generation and state.status != "updating":
            reason = "its workers did not start; the former model is served as before"
        elif not _lives(folder):
            reason = "its process was killed: an update starts it again"
        elif time.monotonic() > deadline:
            reason = f"it took more than {patience:g} s"
        if reason:
            tail = _end_of_log(folder, since)
            raise StocktakeError(f"the update of the endpoint {folder.name} failed: {reason}{tail}")
        time.sleep(_PAUSE)


def _wait_for_update(folder: Path) -> None:
    """Wait for the end of an update whose command was killed."""
    while (state := files.read_state(folder)) and state.status in ("starting", "updating"):
        if not state.supervisor.alive():
            return
        time.sleep(_PAUSE)


def _stop(folder: Path) -> None:
    """End every process of the endpoint."""
    try:
        state, patience = files.read_state(folder), files.read_spec(folder).server.drain_seconds
    except StocktakeError:  # a damaged file: the supervisor sees that its folder is gone
        return
    if state:
        state.supervisor.signal(signal.SIGTERM)
        _wait_for_end([state.supervisor], patience + _LATER_SECONDS)
        _wait_for_end(list(state.workers), _LATER_SECONDS)


def _wait_for_end(processes: list[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.alive() for process in processes):
        for started in _started:
            started.poll()
        if time.monotonic() > deadline:
            for process in processes:
                process.signal(signal.SIGKILL)
        time.sleep(_PAUSE)


def _lives(folder: Path) -> bool:
    state = files.read_state(folder)
    return state is not None and state.supervisor.alive()


def _end_of_log(folder: Path, since: int) -> str:
    tail = files.log_tail(folder, since)
    return f"\nits log ended with:\n{tail}" if tail else ""


def _log_size(folder: Path) -> int:
    log = folder / files.LOG
    return log.stat().st_size if log.exists() else 0


def _read(folder: Path) -> Endpoint:
    """What is known of the endpoint, checked against its process."""
    spec, state = files.read_spec(folder), files.read_state(folder)
    alive = state is not None and state.supervisor.alive()
    status, error = _status(folder, state, alive)
    return Endpoint(
        name=folder.name,
        status=status,
        address=state.address if state else "",
        model_uri=spec.model_uri,
        version=spec.version,
        generation=spec.generation,
        settings=spec.settings,
        pid=state.supervisor.pid if state and alive else None,
        workers=tuple(worker.pid for worker in state.workers if worker.alive()) if state else (),
        error=error,
        model=Path(spec.model),
        log=folder / files.LOG,
    )


def _status(folder: Path, state: State | None, alive: bool) -> tuple[Status, str | None]:
    if state and (alive or state.status in ("stopped", "failed")):
        failed = state.failed_generation
        return state.status, f"generation {failed} did not start: see the log" if failed else None
    try:
        with _lock(folder).acquire(blocking=False):
            return "dead", "its process was killed, or the machine was started anew: an update starts it again"
    except Timeout:
        return "starting", None  # a command has the lock


def _environment() -> dict[str, str]:
    """The environment, with this package on the path of a new process."""
    source = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}
