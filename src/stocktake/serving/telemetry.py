"""What a server tells of itself: a line of JSON a request on stderr, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stocktake.serving.payloads import JSON, RequestError, encoded
from stocktake.serving.predictor import Prediction

ID_HEADERS = (b"x-request-id", b"x-amzn-sagemaker-inference-id", b"x-amzn-requestid")
_SOUND_ID = re.compile(rb"[\w.:=@/+-]{1,128}", re.ASCII)
_FLUSH_SECONDS = 0.1
_MOST_LINES = 10_000


class RequestLog:
    """Lines on stderr, written by a thread of its own: a full pipe holds up no answer."""

    def __init__(self) -> None:
        self._lines: deque[dict[str, Any]] = deque(maxlen=_MOST_LINES)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def write(self, **values: Any) -> None:
        """Add a line, with the time. Should nobody read stderr, the oldest lines are lost."""
        self._lines.append({"time": time.time(), **values})

    def close(self) -> None:
        """Write what is left; waits a second at most."""
        self._ended.set()
        self._thread.join(1)

    def _write_all(self) -> None:
        while True:
            ended = self._ended.wait(_FLUSH_SECONDS)
            text = ""
            while self._lines:
                line = self._lines.popleft()
                line["time"] = datetime.fromtimestamp(line["time"], UTC).isoformat(timespec="milliseconds")
                text += json.dumps(line) + "\n"
            try:
                if text:
                    sys.stderr.write(text)
                    sys.stderr.flush()
            except (OSError, ValueError):  # stderr was closed: there is nobody to tell
                return
            if ended:
                return


class Metrics:
    """What /metrics shows. Of all workers of a server if PROMETHEUS_MULTIPROC_DIR names a folder of theirs."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("stocktake_requests", "Requests answered", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "stocktake_request_seconds",
            "From a request's headers to its answer",
            ["path"],
            registry=registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
        )
        self._batches = Histogram(
            "stocktake_batch_photos",
            "Photos of a forward pass",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self._pending = Gauge(
            "stocktake_photos_pending",
            "Photos received and not answered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._counted = Counter("stocktake_counted", "Photos by counted quantity", ["quantity"], registry=registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, size: int) -> None:
        """A forward pass was made."""
        self._batches.observe(size)

    def pending(self, photos: int) -> None:
        """So many photos wait."""
        self._pending.set(photos)

    def counted(self, counts: Iterable[Prediction]) -> None:
        """Photos were counted."""
        for count in counts:
            self._counted.labels(str(count.quantity)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class Observed:
    """The outermost layer: gives each request an id, times, counts and logs it, and turns a fault into a 500."""

    def __init__(self, app: ASGIApp, log: RequestLog, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._log, self._metrics, self._paths = app, log, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        identity = _request_id(scope)
        status = sent = 0

        async def observed(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity)]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        fault: dict[str, Any] = {}
        try:
            await self._app(scope, receive, observed)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not status:
                await _send(RequestError(503, "the server is ending: try again", {"retry-after": "1"}), observed)
        except Exception as error:
            import traceback

            fault = {"fault": "".join(traceback.format_exception(error))}
            if not status:
                reason = f"the server failed; its log says why, at request {identity.decode()}"
                await _send(RequestError(500, reason), observed)
        seconds = time.perf_counter() - start
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.answered(path, status, seconds)
        client = scope.get("client")
        self._log.write(
            request=identity.decode(),
            method=scope["method"],
            path=path,
            status=status,
            ms=round(seconds * 1000, 2),
            photos=scope.get("stocktake.photos", 0),
            received=scope.get("stocktake.received", 0),
            sent=sent,
            client=client[0] if client else None,
            **fault,
        )


async def _send(error: RequestError, send: Send) -> None:
    body = encoded(error.document())
    headers = {"content-type": JSON, "content-length": str(len(body)), **error.headers}
    encoded_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded_headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> bytes:
    given = dict(scope["headers"])
    for name in ID_HEADERS:
        if (value := given.get(name)) is not None and _SOUND_ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(8).encode()
