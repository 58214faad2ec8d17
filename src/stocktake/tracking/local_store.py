"""The run folder: everything a run says, on disk before anywhere else.

    run.json       name, experiment, status, times, parent, and how far the upload has come
    params.json  tags.json  inputs.json
    metrics.csv    timestamp_ms,step,metric,value; only ever appended to
    artifacts/     the MLflow artifact tree
    models/        MLflow model folders, one a name
    result.json    at the end: status, reason, duration, final metrics

Needs no MLflow. A folder may be copied to another machine and uploaded from there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tracking.addresses import redact

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
class ModelUpload:
    """How far one model folder has come. `files` says which version of the files `id` holds."""

    id: str | None = None
    attempted: bool = False
    files: dict[str, list[int]] = field(default_factory=dict)
    done: bool = False
    measured: bool = False


@dataclass
class Upload:
    """How far the mirror in one store has come."""

    uri: str | None = None
    run_id: str | None = None
    experiment_id: str | None = None
    attempted: bool = False
    params: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: int = 0
    metrics: int = 0
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    models: dict[str, ModelUpload] = field(default_factory=dict)
    status: str | None = None


@dataclass
class Registration:
    """A version of a registered model that is wanted, and its number once it exists."""

    model: str
    registered_name: str
    tags: dict[str, str]
    description: str
    asked_ms: int
    version: str | None = None


@dataclass
class RunState:
    """What run.json holds."""

    name: str
    experiment: str
    tracking_uri: str | None
    registry_uri: str | None
    parent: str | None
    attach_run_id: str | None
    status: str
    start_ms: int
    host: str
    pid: int
    end_ms: int | None = None
    reason: str | None = None
    registrations: list[Registration] = field(default_factory=list)
    upload: Upload = field(default_factory=Upload)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def write_json(path: Path, value: object) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


class LocalRun:
    """One run on disk. Use `create` or `open`."""

    def __init__(self, path: Path, state: RunState) -> None:
        self.path = path
        self.state = state
        self.params: dict[str, str] = _read_json(path / "params.json", {})
        self.tags: dict[str, str] = _read_json(path / "tags.json", {})
        self.inputs: list[dict[str, Any]] = _read_json(path / "inputs.json", [])
        self.lock = FileLock(path / ".lock")
        self._writing = threading.Lock()

    @classmethod
    def create(
        cls,
        runs: Path,
        *,
        name: str,
        experiment: str,
        tracking_uri: str | None,
        registry_uri: str | None,
        parent: str | None = None,
        attach_run_id: str | None = None,
    ) -> LocalRun:
        """A new folder in `runs`, locked by this process until `finish`. URIs come without credentials."""
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
            registry_uri=registry_uri,
            parent=parent,
            attach_run_id=attach_run_id,
            status=RUNNING,
            start_ms=now_ms(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        folder = cls(path, state)
        folder.lock.try_acquire()
        (path / "metrics.csv").write_text(_HEADER, encoding="utf-8")
        folder.save()
        return folder

    @classmethod
    def open(cls, path: Path) -> LocalRun:
        """An existing folder; StocktakeError where run.json is missing or not of this form."""
        try:
            raw = json.loads((path / "run.json").read_text(encoding="utf-8"))
            upload = dict(raw.pop("upload"))
            models = {name: ModelUpload(**one) for name, one in upload.pop("models").items()}
            registrations = [Registration(**one) for one in raw.pop("registrations")]
            state = RunState(**raw, registrations=registrations, upload=Upload(**upload, models=models))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StocktakeError(
                f"{path} is not a run folder: {type(error).__name__} in its run.json ({error})"
            ) from error
        return cls(path, state)

    @classmethod
    def reopen(cls, path: Path) -> LocalRun:
        """A folder to write on in, RUNNING and locked by this process.

        Raises StocktakeError if it is no run folder, or its process is alive.
        """
        folder = cls.open(path)
        if not folder.lock.try_acquire():
            raise StocktakeError(f"{path} is still written by process {folder.state.pid} on {folder.state.host}")
        state = folder.state
        state.status, state.reason, state.end_ms = RUNNING, None, None
        state.host, state.pid = socket.gethostname(), os.getpid()
        folder.tags.pop("failure", None)
        folder.set_tags({})
        folder.save()
        _cut_torn_line(path / "metrics.csv")
        return folder

    def save(self) -> None:
        """Write run.json."""
        write_json(self.path / "run.json", asdict(self.state))

    def add_params(self, params: Mapping[str, object]) -> None:
        """Keep what is new: a param never changes, so the first value stays."""
        fresh = {check_key(key): redact(str(value))[:_PARAM_LENGTH] for key, value in params.items()}
        if fresh.keys() - self.params.keys():
            self.params = {**fresh, **self.params}
            write_json(self.path / "params.json", self.params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Add or replace tags."""
        self.tags.update({check_key(key): redact(str(value))[:_TAG_LENGTH] for key, value in tags.items()})
        write_json(self.path / "tags.json", self.tags)

    def add_input(self, record: DatasetRecord, context: str) -> None:
        """Add a dataset."""
        source = redact(record.source)
        self.inputs.append({**asdict(record), "digest": record.digest[:36], "source": source, "context": context})
        write_json(self.path / "inputs.json", self.inputs)

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
        with (self.path / "metrics.csv").open("rb") as file:
            file.seek(offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]  # a line torn by a crash is not a point
        return list(_points(whole.decode("utf-8").splitlines())), offset + len(whole)

    def last_points(self) -> list[MetricPoint]:
        """The last point of each metric by MLflow's rule: largest step, then time, then value."""
        last: dict[str, MetricPoint] = {}
        for point in self.read_metrics()[0]:
            held = last.get(point.name)
            if held is None or _age(point) >= _age(held):
                last[point.name] = point
        return list(last.values())

    def final_metrics(self) -> dict[str, float]:
        """The value of each metric that MLflow shows as the run's."""
        return {point.name: point.value for point in self.last_points()}

    def finish(self, status: str, reason: str | None) -> None:
        """Write the end into run.json and result.json. The lock stays until `release`."""
        self.state.status, self.state.reason, self.state.end_ms = status, reason, now_ms()
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
            "run_id": state.upload.run_id,
            "duration_s": None if state.end_ms is None else round((state.end_ms - state.start_ms) / 1000, 3),
            "metrics": metrics,
        }
        write_json(self.path / "result.json", result)

    def release(self) -> None:
        """No longer alive: others may upload the folder."""
        self.lock.release()
        self.lock.path.unlink(missing_ok=True)

    def changed_artifacts(self) -> list[str]:
        """Paths below artifacts/ that are new or changed since they were uploaded."""
        stamps = file_stamps(self.path / "artifacts")
        return [name for name, stamp in stamps.items() if self.state.upload.artifacts.get(name) != stamp]

    def model_names(self) -> list[str]:
        """Names of the model folders."""
        return sorted(path.parent.name for path in (self.path / "models").glob("*/MLmodel"))

    def changed_models(self) -> list[str]:
        """Names of models that are new or changed since they were uploaded."""
        held = self.state.upload.models
        return [
            name
            for name in self.model_names()
            if name not in held or not held[name].done or held[name].files != file_stamps(self.path / "models" / name)
        ]

    def pending(self) -> list[str]:
        """What the store does not have yet, in words; empty when the mirror is complete."""
        upload, state = self.state.upload, self.state
        parts = {
            "run": upload.run_id is None or not upload.uri,
            "params": bool(self.params.keys() - set(upload.params)),
            "tags": self.tags != upload.tags,
            "datasets": len(self.inputs) > upload.inputs,
            "metrics": bool(self.read_metrics(upload.metrics)[0]),
            "artifacts": bool(self.changed_artifacts()),
            "models": bool(self.changed_models()),
            "model metrics": state.status != RUNNING and any(not one.measured for one in upload.models.values()),
            "registration": any(one.version is None for one in state.registrations),
            "status": upload.status != state.status,
        }
        return [part for part, is_pending in parts.items() if is_pending]


def check_key(key: str) -> str:
    """The key, if every MLflow store takes it as the name of a metric, param or tag; else ValueError."""
    if not _KEY.fullmatch(key) or key.startswith(("/", "..")) or os.path.normpath(key) != key:
        raise ValueError(f"{key!r} is no name for a metric, param or tag: letters, digits and _ - . : / only")
    return key


def file_stamps(root: Path) -> dict[str, list[int]]:
    """[bytes, modification time in ns] of every file below root, by its path; hidden files are left out."""
    stamps: dict[str, list[int]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not any(part.startswith(".") for part in name.parts) and path.is_file():
            status = path.stat()
            stamps[name.as_posix()] = [status.st_size, status.st_mtime_ns]
    return stamps


def _cut_torn_line(path: Path) -> None:
    """A process killed in mid-write leaves half a line, which the next one must not continue."""
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _age(point: MetricPoint) -> tuple[int, int, float]:
    return point.step, point.timestamp_ms, point.value


def _points(lines: Iterable[str]) -> Iterable[MetricPoint]:
    for row in csv.reader(lines):
        if len(row) == 4 and row[0].isdigit():
            yield MetricPoint(int(row[0]), int(row[1]), row[2], float(row[3]))


def _read_json(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing
