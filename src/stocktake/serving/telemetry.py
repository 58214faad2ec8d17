"""One JSON line a request on stderr, in CloudWatch's embedded metric format: a log line and its metrics in one.

https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import queue
import re
import secrets
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stocktake.serving.payloads import JSON, RequestError

REQUEST_ID_HEADERS = (b"x-request-id", b"x-amzn-sagemaker-inference-id", b"x-amzn-requestid")
CUSTOM_ATTRIBUTES = b"x-amzn-sagemaker-custom-attributes"
"""SageMaker passes this header on, and expects it back in the answer: up to 1024 visible ASCII characters."""
CLIENT_LEFT = 499
"""Status in the log of a request whose client did not wait for the answer, as in nginx's."""
_REQUEST_ID = re.compile(rb"[\w.:=@/+-]{1,128}", re.ASCII)
_ATTRIBUTES = re.compile(rb"[\x20-\x7e]{1,1024}")
_MAX_LINES = 10_000
"""That wait to be written; should nobody read stderr, later ones are lost."""
_METRICS = [
    {"Name": "Requests", "Unit": "Count"},
    {"Name": "Errors", "Unit": "Count"},
    {"Name": "Photos", "Unit": "Count"},
    {"Name": "PhotoErrors", "Unit": "Count"},
    {"Name": "Latency", "Unit": "Milliseconds"},
]
log = logging.getLogger("stocktake.serving")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, message and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging() -> logging.handlers.QueueListener:
    """Write this process's log to stderr, by a thread of its own: a full pipe delays no answer.

    Returns:
        The thread's listener; `stop` writes what is left.
    """
    logging.raiseExceptions = False  # a full queue drops lines
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(JsonFormatter())
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_LINES)
    listener = logging.handlers.QueueListener(lines, writer)
    root = logging.getLogger()
    root.handlers = [_Enqueue(lines)]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each malformed request
    listener.start()
    return listener


class _Enqueue(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Leave the record to be formatted by the writing thread."""
        return record


class RequestLoggingMiddleware:
    """The outermost layer: gives each request an id, logs it with its metrics, and answers 500 for an exception."""

    def __init__(self, app: ASGIApp, paths: frozenset[str], model_version: str) -> None:
        self._app, self._paths, self._model_version = app, paths, model_version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        attributes = headers.get(CUSTOM_ATTRIBUTES, b"")
        echoed = [(b"x-request-id", request_id)]
        if _ATTRIBUTES.fullmatch(attributes):
            echoed.append((CUSTOM_ATTRIBUTES, attributes))
        else:
            attributes = b""
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *echoed]
            await send(message)

        fields: dict[str, Any] = {}
        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server ends, and drain_seconds are over
            if not status:
                ending = RequestError(503, "the server is ending: try again", {"retry-after": "1"})
                await send_error(ending, send_with_headers)
        except Exception as error:
            fields["traceback"] = "".join(traceback.format_exception(error))
            if not status:
                reason = f"the server failed; its log says why, at request {request_id.decode()}"
                await send_error(RequestError(500, reason), send_with_headers)
        client = scope.get("client")
        fields |= {
            "request": request_id.decode(),
            "method": scope["method"],
            "path": scope["path"] if scope["path"] in self._paths else "other",
            "status": status,
            "model_version": self._model_version,
            "received": scope.get("stocktake.received", 0),
            "client": client[0] if client else None,
            "Requests": 1,
            "Errors": int(status >= 400),
            "Photos": scope.get("stocktake.photos", 0),
            "PhotoErrors": scope.get("stocktake.photo_errors", 0),
            "Latency": round(1000 * (time.perf_counter() - start), 2),
        }
        if attributes:
            fields["custom_attributes"] = attributes.decode()
        if fields["path"] != "/ping":  # the health checks' latency would hide that of the predictions
            fields["_aws"] = {
                "Timestamp": int(1000 * time.time()),
                "CloudWatchMetrics": [
                    {"Namespace": "stocktake", "Dimensions": [["model_version"]], "Metrics": _METRICS}
                ],
            }
        log.info("%s %s %d", fields["method"], fields["path"], status, extra={"fields": fields})


async def send_error(error: RequestError, send: Send) -> None:
    """Answer with an error, outside the application that turns errors into answers."""
    body = error.body()
    headers = {"content-type": JSON, "content-length": str(len(body)), **error.headers}
    encoded_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded_headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    for name in REQUEST_ID_HEADERS:
        if (value := headers.get(name)) is not None and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8).encode()
