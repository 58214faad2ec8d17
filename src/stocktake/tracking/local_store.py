"""A run as a folder on disk: everything it says is here before it is anywhere else.

    run.json       name, experiment, status, times, parent, and the ids of the run and its models in each store
    params.json  tags.json  inputs.json
    metrics.csv    timestamp_ms,step,metric,value; only ever appended to
    artifacts/     the MLflow artifact tree
    models/        MLflow model folders, one a name
    result.json    at the end: status, reason, duration, final metrics

Needs no MLflow. A folder may be copied to another machine and uploaded from there. Links in it are not followed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from stocktake.errors import StocktakeError
from stocktake.files import atomic_write
from stocktake.redaction import redact

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"

_HEADER = "timestamp_ms,step,metric,value\n"
_KEY = re.compile(r"[\w./ :-]{1,250}")  # what every MLflow store takes as a name
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000  # MLflow's limits


@dataclass(frozen=True)
class DatasetRecord:
    """Data that a run read. `digest` is at most 36 characters, `profile` is any JSON object."""

    name: str
    digest: str
    source: str
    rows: int
    profile: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """One line of metrics.csv."""

    timestamp_ms: int
    step: int
    name: str
    value: float


@dataclass
class Upload:
    """A run in one store."""

    run_id: str
    digest: str | None = None
    """`LocalRun.digest` of the folder when all of it was uploaded; None before."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass
class RunState:
    """What run.json holds."""

    name: str
    experiment: str
    tracking_uri: str | None
    parent: str | None
    """Name of the folder, beside this one, of the run above."""
    attach_run_id: str | None
    """The MLflow run that `mlflow run` opened for this one."""
    status: str = RUNNING
    start_ms: int = field(default_factory=now_ms)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    end_ms: int | None = None
    reason: str | None = None
    models: list[str] = field(default_factory=list)
    """Names of complete folders in models/."""
    uploads: dict[str, Upload] = field(default_factory=dict)
    """By tracking URI without credentials; the store used last comes last."""


class LocalRun:
    """One run on disk. Use `create` or `open`.

    `folder` is the run's folder, `artifacts` the part of it that becomes the MLflow artifact tree.
    """

    def __init__(self, folder: Path, state: RunState) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.state = state
        self.params: dict[str, str] = _read_json(folder / "params.json", {})
        self.tags: dict[str, str] = _read_json(folder / "tags.json", {})
        self.inputs: list[dict[str, Any]] = _read_json(folder / "inputs.json", [])
        self._lock = FileLock(folder / ".lock", thread_local=False)
        self._writing = threading.RLock()

    @classmethod
    def create(
        cls,
        runs: Path,
        *,
        name: str,
        experiment: str = "",
        tracking_uri: str | None = None,
        parent: str | None = None,
        attach_run_id: str | None = None,
    ) -> Self:
        """A new folder in `runs`, locked by this process until `release`. The URI comes without credentials."""
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "run"
        folder = runs / f"{stem}-{uuid.uuid4().hex[:10]}"
        try:
            (folder / "artifacts").mkdir(parents=True)
            (folder / "models").mkdir()
        except OSError as error:
            raise StocktakeError(
                f"cannot write a run into {runs}: {error.strerror}; choose another --workspace"
            ) from error
        run = cls(folder, RunState(name, experiment, tracking_uri, parent, attach_run_id))
        run.try_lock()
        (folder / "metrics.csv").write_text(_HEADER, encoding="utf-8")
        run.save()
        return run

    @classmethod
    def create_child(cls, parent: LocalRun, name: str) -> Self:
        """A new folder beside the parent's, in the same experiment and store."""
        state = parent.state
        return cls.create(
            parent.folder.parent,
            name=name,
            experiment=state.experiment,
            tracking_uri=state.tracking_uri,
            parent=parent.folder.name,
        )

    @classmethod
    def open(cls, folder: Path) -> Self:
        """An existing folder; StocktakeError where run.json is missing, a link, or not of this form."""
        try:
            raw = _read_json(folder / "run.json", None)
            uploads = {uri: Upload(**upload) for uri, upload in raw.pop("uploads").items()}
            state = RunState(**raw, uploads=uploads)
            _check_folder_names([*([state.parent] if state.parent else []), *state.models])
            return cls(folder, state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StocktakeError(
                f"{folder} is not a run folder: {type(error).__name__} in its files ({error})"
            ) from error

    @classmethod
    def reopen(cls, folder: Path) -> Self:
        """A folder to continue, RUNNING and locked by this process.

        Raises StocktakeError if it is no run folder, or its process is alive.
        """
        run = cls.open(folder)
        state = run.state
        if not run.try_lock():
            raise StocktakeError(f"{folder} is still written by process {state.pid} on {state.host}")
        state.status, state.reason, state.end_ms = RUNNING, None, None
        state.host, state.pid = socket.gethostname(), os.getpid()
        run.tags.pop("failure", None)
        run.set_tags({})
        run.save()
        with (folder / "metrics.csv").open("r+b") as file:  # a killed process may leave half a line
            file.truncate(file.read().rfind(b"\n") + 1)
        return run

    def try_lock(self) -> bool:
        """Lock the folder, as a live run does; False if another process or object has it locked."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Unlock the folder: others may continue or upload it."""
        self._lock.release(force=True)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.state.name

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run in the store used last; None while it has none."""
        return next((upload.run_id for upload in reversed(self.state.uploads.values())), None)

    def save(self) -> None:
        """Write run.json."""
        with self._writing:
            _write_json(self.folder / "run.json", asdict(self.state))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Add params, flat, with values as text. The first value of a param stays, as in MLflow."""
        checked = {check_key(key): redact(str(value))[:_PARAM_LENGTH] for key, value in params.items()}
        if checked.keys() - self.params.keys():
            self.params = {**checked, **self.params}
            _write_json(self.folder / "params.json", self.params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags. `mlflow.note.content` is the run's description, Markdown."""
        self.tags = self.tags | {check_key(key): redact(str(value))[:_TAG_LENGTH] for key, value in tags.items()}
        _write_json(self.folder / "tags.json", self.tags)

    def log_dataset(self, record: DatasetRecord, context: str = "training") -> None:
        """Add a dataset that was read, and what for."""
        source = redact(record.source)
        self.inputs.append({**asdict(record), "digest": record.digest[:36], "source": source, "context": context})
        _write_json(self.folder / "inputs.json", self.inputs)

    def log_model(self, model: Path, name: str = "model") -> None:
        """Copy a saved MLflow model folder into models/NAME, unless it was saved there.

        Raises StocktakeError if there is no MLmodel in it.
        """
        if not (model / "MLmodel").is_file():
            raise StocktakeError(f"{model} is no MLflow model folder: it holds no MLmodel")
        target = self.folder / "models" / name
        if model.resolve() != target.resolve():
            temporary = target.with_name(f".{name}")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(model, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        with self._writing:
            if name not in self.state.models:
                self.state.models.append(name)
                self.save()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Append a line a metric, all at this moment. A run's result is the value at the largest step.

        Safe from any thread.
        """
        moment = now_ms()
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerows((moment, int(step), check_key(name), repr(float(value))) for name, value in metrics.items())
        with self._writing, (self.folder / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(text.getvalue())

    def read_metrics(self, offset: int = 0) -> tuple[list[MetricPoint], int]:
        """The points from a byte offset on (0: all), and the offset after the last whole line."""
        path = self.folder / "metrics.csv"
        if not _is_own_file(path):
            return [], offset
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]  # a line torn by a crash is not a point
        rows = (row for row in csv.reader(whole.decode("utf-8").splitlines()) if len(row) == 4 and row[0].isdigit())
        return [MetricPoint(int(ms), int(step), name, float(value)) for ms, step, name, value in rows], offset + len(
            whole
        )

    def last_points(self) -> list[MetricPoint]:
        """The last point of each metric by MLflow's rule: largest step, then time, then value."""
        points = sorted(self.read_metrics()[0], key=lambda point: (point.step, point.timestamp_ms, point.value))
        return list({point.name: point for point in points}.values())

    def final_metrics(self) -> dict[str, float]:
        """The value of each metric that MLflow shows as the run's."""
        return {point.name: point.value for point in self.last_points()}

    def finish(self, status: str, reason: str | None, end_ms: int | None = None) -> None:
        """Write the end into run.json and result.json. The lock stays until `release`."""
        self.state.status, self.state.reason, self.state.end_ms = status, reason, end_ms or now_ms()
        self.save()
        self.write_result()

    def write_result(self) -> None:
        """Write result.json from what is known now. Metrics that are no finite number become null there."""
        state = self.state
        result = {
            "name": state.name,
            "status": state.status,
            "reason": state.reason,
            "run_id": self.run_id,
            "duration_s": None if state.end_ms is None else round((state.end_ms - state.start_ms) / 1000, 3),
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.final_metrics().items()},
        }
        _write_json(self.folder / "result.json", result)

    def digest(self) -> str:
        """Of all that a store gets. It is the same on another machine."""
        content = hashlib.sha256(f"{self.state.status} {self.state.end_ms}".encode())
        models = [f"models/{name}" for name in sorted(self.state.models)]
        for part in ("params.json", "tags.json", "inputs.json", "metrics.csv", "artifacts", *models):
            content.update(folder_digest(self.folder / part).encode())
        return content.hexdigest()

    def is_uploaded(self, uri: str | None = None) -> bool:
        """Whether a store, or that of this URI without credentials, has all of an ended run."""
        digests = {upload.digest for store, upload in self.state.uploads.items() if uri in (None, store)} - {None}
        return self.state.status != RUNNING and bool(digests) and self.digest() in digests

    def remember_upload(self, uri: str, run_id: str, digest: str | None = None) -> None:
        """Keep the run's id in a store, which becomes the one used last; and the digest, if it has all."""
        with self._writing:
            self.state.uploads.pop(uri, None)
            self.state.uploads[uri] = Upload(run_id, digest)
            self.save()


def check_key(key: str) -> str:
    """The key, if every MLflow store takes it as the name of a metric, param or tag; else ValueError."""
    if not _KEY.fullmatch(key) or key.startswith(("/", "..")) or os.path.normpath(key) != key:
        raise ValueError(f"{key!r} is no name for a metric, param or tag: letters, digits and _ - . : / only")
    return key


def _check_folder_names(names: Iterable[str]) -> None:
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} is no name of a folder")


def files_below(root: Path) -> Iterator[Path]:
    """The regular files below a folder, sorted, or the file itself; no hidden ones, no links to files or folders."""
    if _is_own_file(root):
        yield root
    if root.is_symlink():
        return
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from filter(_is_own_file, paths)


def folder_digest(root: Path) -> str:
    """SHA-256 over the names and contents of the files below a folder, or of a file."""
    content = hashlib.sha256()
    for path in files_below(root):
        with path.open("rb") as file:
            file_digest = hashlib.file_digest(file, "sha256").digest()
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + file_digest)
    return content.hexdigest()


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read_json(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if _is_own_file(path) else missing


def _write_json(path: Path, value: object) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
