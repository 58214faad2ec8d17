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
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    models: dict[str, str] = field(default_factory=dict)
    """Ids of logged models, by the names of their folders."""
    digest: str | None = None
    """`LocalRun.digest` of the folder when all of it was uploaded; None before."""


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
    status: str
    start_ms: int
    host: str
    pid: int
    end_ms: int | None = None
    reason: str | None = None
    models: list[str] = field(default_factory=list)
    uploads: dict[str, Upload] = field(default_factory=dict)
    """By tracking URI without credentials; the store used last comes last."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class LocalRun:
    """One run on disk. Use `create` or `open`."""

    def __init__(self, path: Path, state: RunState) -> None:
        self.path = path
        self.state = state
        self.params: dict[str, str] = _read_json(path / "params.json", {})
        self.tags: dict[str, str] = _read_json(path / "tags.json", {})
        self.inputs: list[dict[str, Any]] = _read_json(path / "inputs.json", [])
        self._lock = FileLock(path / ".lock", thread_local=False)
        self._writing = threading.RLock()

    @classmethod
    def create(
        cls,
        runs: Path,
        *,
        name: str,
        experiment: str,
        tracking_uri: str | None,
        parent: str | None = None,
        attach_run_id: str | None = None,
    ) -> LocalRun:
        """A new folder in `runs`, locked by this process until `release`. The URI comes without credentials."""
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "run"
        path = runs / f"{stem}-{uuid.uuid4().hex[:10]}"
        try:
            (path / "artifacts").mkdir(parents=True)
            (path / "models").mkdir()
        except OSError as error:
            raise StocktakeError(
                f"cannot write a run into {runs}: {error.strerror}; choose another --workspace"
            ) from error
        state = RunState(
            name=name,
            experiment=experiment,
            tracking_uri=tracking_uri,
            parent=parent,
            attach_run_id=attach_run_id,
            status=RUNNING,
            start_ms=now_ms(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        run = cls(path, state)
        run.try_lock()
        (path / "metrics.csv").write_text(_HEADER, encoding="utf-8")
        run.save()
        return run

    @classmethod
    def open(cls, path: Path) -> LocalRun:
        """An existing folder; StocktakeError where run.json is missing, a link, or not of this form."""
        try:
            raw = _read_json(path / "run.json", None)
            uploads = {uri: Upload(**upload) for uri, upload in raw.pop("uploads").items()}
            state = RunState(**raw, uploads=uploads)
            _check_folder_names([*([state.parent] if state.parent else []), *state.models])
            return cls(path, state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StocktakeError(
                f"{path} is not a run folder: {type(error).__name__} in its files ({error})"
            ) from error

    @classmethod
    def reopen(cls, path: Path) -> LocalRun:
        """A folder to continue, RUNNING and locked by this process.

        Raises StocktakeError if it is no run folder, or its process is alive.
        """
        run = cls.open(path)
        state = run.state
        if not run.try_lock():
            raise StocktakeError(f"{path} is still written by process {state.pid} on {state.host}")
        state.status, state.reason, state.end_ms = RUNNING, None, None
        state.host, state.pid = socket.gethostname(), os.getpid()
        run.tags.pop("failure", None)
        run.set_tags({})
        run.save()
        _cut_torn_line(path / "metrics.csv")
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
    def run_id(self) -> str | None:
        """MLflow's id of the run in the store used last; None while it has none."""
        return next((upload.run_id for upload in reversed(self.state.uploads.values())), None)

    def save(self) -> None:
        """Write run.json."""
        with self._writing:
            _write_json(self.path / "run.json", asdict(self.state))

    def add_params(self, params: Mapping[str, object]) -> None:
        """Keep what is new: a param never changes, so the first value stays."""
        checked = {check_key(key): redact(str(value))[:_PARAM_LENGTH] for key, value in params.items()}
        if checked.keys() - self.params.keys():
            self.params = {**checked, **self.params}
            _write_json(self.path / "params.json", self.params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags."""
        self.tags = self.tags | {check_key(key): redact(str(value))[:_TAG_LENGTH] for key, value in tags.items()}
        _write_json(self.path / "tags.json", self.tags)

    def add_input(self, record: DatasetRecord, context: str) -> None:
        """Add a dataset."""
        source = redact(record.source)
        self.inputs.append({**asdict(record), "digest": record.digest[:36], "source": source, "context": context})
        _write_json(self.path / "inputs.json", self.inputs)

    def add_model(self, name: str) -> None:
        """Announce that the model folder of this name is complete."""
        with self._writing:
            if name not in self.state.models:
                self.state.models.append(name)
                self.save()

    def append_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line a metric, all at this moment. Safe from any thread."""
        moment = now_ms()
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerows((moment, int(step), check_key(name), repr(float(value))) for name, value in metrics.items())
        with self._writing, (self.path / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(text.getvalue())

    def read_metrics(self, offset: int = 0) -> tuple[list[MetricPoint], int]:
        """The points from a byte offset on (0: all), and the offset after the last whole line."""
        path = self.path / "metrics.csv"
        if not _is_own_file(path):
            return [], offset
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]  # a line torn by a crash is not a point
        return list(_points(whole.decode("utf-8").splitlines())), offset + len(whole)

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
        metrics = {name: value if abs(value) < float("inf") else None for name, value in self.final_metrics().items()}
        result = {
            "name": state.name,
            "status": state.status,
            "reason": state.reason,
            "run_id": self.run_id,
            "duration_s": None if state.end_ms is None else round((state.end_ms - state.start_ms) / 1000, 3),
            "metrics": metrics,
        }
        _write_json(self.path / "result.json", result)

    def digest(self) -> str:
        """Of all that a store gets. It is the same on another machine."""
        state = self.state
        content = hashlib.sha256(f"{state.status} {state.end_ms}".encode())
        for name in ("params.json", "tags.json", "inputs.json", "metrics.csv"):
            if _is_own_file(self.path / name):
                content.update(_file_digest(self.path / name))
        for folder in (self.path / "artifacts", *(self.path / "models" / name for name in sorted(state.models))):
            content.update(folder_digest(folder).encode())
        return content.hexdigest()

    def is_uploaded(self, uri: str | None = None) -> bool:
        """Whether a store, or that of this URI without credentials, has all of an ended run."""
        digests = {upload.digest for store, upload in self.state.uploads.items() if uri in (None, store)}
        return self.state.status != RUNNING and bool(digests) and self.digest() in digests

    def remember_upload(self, uri: str, run_id: str) -> Upload:
        """Keep the run's id in a store, which becomes the one used last."""
        with self._writing:
            upload = self.state.uploads.pop(uri, None)
            if upload is None or upload.run_id != run_id:
                upload = Upload(run_id)
            self.state.uploads[uri] = upload
            self.save()
        return upload


def check_key(key: str) -> str:
    """The key, if every MLflow store takes it as the name of a metric, param or tag; else ValueError."""
    if not _KEY.fullmatch(key) or key.startswith(("/", "..")) or os.path.normpath(key) != key:
        raise ValueError(f"{key!r} is no name for a metric, param or tag: letters, digits and _ - . : / only")
    return key


def files_below(root: Path) -> Iterator[Path]:
    """The regular files below a folder, sorted; without hidden ones and without links to files or folders."""
    if root.is_symlink():
        return
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and _is_own_file(path):
                yield path


def folder_digest(root: Path) -> str:
    """SHA-256 over the names and contents of the files below a folder."""
    content = hashlib.sha256()
    for path in files_below(root):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + _file_digest(path))
    return content.hexdigest()


def _check_folder_names(names: Iterable[str]) -> None:
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} is no name of a folder")


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _cut_torn_line(path: Path) -> None:
    """A process killed in mid-write leaves half a line, which the next one must not continue."""
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _points(lines: Iterable[str]) -> Iterable[MetricPoint]:
    for row in csv.reader(lines):
        if len(row) == 4 and row[0].isdigit():
            yield MetricPoint(int(row[0]), int(row[1]), row[2], float(row[3]))


def _read_json(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if _is_own_file(path) else missing


def _write_json(path: Path, value: object) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
