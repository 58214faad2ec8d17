"""One JSON line a request on stderr, in CloudWatch's embedded metric format: a log line and its metrics in one.

https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
import traceback
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stocktake.serving.payloads import error_response

REQUEST_ID_HEADERS = ("x-request-id", "x-amzn-sagemaker-inference-id", "x-amzn-requestid")
CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
"""SageMaker passes this header on, and expects it back in the answer: up to 1024 visible ASCII characters."""
CLIENT_LEFT = 499
"""Status in the log of a request whose client did not wait for the answer, as in nginx's."""
_REQUEST_ID = re.compile(r"[\w.:=@/+-]{1,128}", re.ASCII)
_ATTRIBUTES = re.compile(r"[\x20-\x7e]{1,1024}")
_UNITS = {"Requests": "Count", "Errors": "Count", "Photos": "Count", "PhotoErrors": "Count", "Latency": "Milliseconds"}
_DIRECTIVE = {
    "Namespace": "stocktake",
    "Dimensions": [["model_version"]],
    "Metrics": [{"Name": name, "Unit": unit} for name, unit in _UNITS.items()],
}
log = logging.getLogger("stocktake.serving")


class RequestLoggingMiddleware:
    """The outermost layer: gives each request an id, logs it with its metrics, and answers 500 for an exception."""

    def __init__(self, app: ASGIApp, paths: frozenset[str], model_version: str) -> None:
        self._app, self._paths, self._model_version = app, paths, model_version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        ids = (headers.get(name, "") for name in REQUEST_ID_HEADERS)
        request_id = next(filter(_REQUEST_ID.fullmatch, ids), None) or secrets.token_hex(8)
        returned = {"x-request-id": request_id}
        if _ATTRIBUTES.fullmatch(headers.get(CUSTOM_ATTRIBUTES, "")):
            returned[CUSTOM_ATTRIBUTES] = headers[CUSTOM_ATTRIBUTES]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(returned)
            await send(message)

        fields: dict[str, Any] = {}
        error = None
        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server ends, and drain_seconds are over
            error = HTTPException(503, "the server is ending: try again", {"retry-after": "1"})
        except Exception as fault:
            fields["traceback"] = "".join(traceback.format_exception(fault))
            error = HTTPException(500, f"the server failed; its log says why, at request {request_id}")
        if error and not status:
            await error_response(error)(scope, receive, send_with_headers)
        fields |= {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": request_id,
            "method": scope["method"],
            "path": scope["path"] if scope["path"] in self._paths else "other",
            "status": status,
            "model_version": self._model_version,
            "received": scope.get("stocktake.received", 0),
            "client": scope["client"][0] if scope.get("client") else None,
            "custom_attributes": returned.get(CUSTOM_ATTRIBUTES),
            "Requests": 1,
            "Errors": int(status >= 400),
            "Photos": scope.get("stocktake.photos", 0),
            "PhotoErrors": scope.get("stocktake.photo_errors", 0),
            "Latency": round(1000 * (time.perf_counter() - start), 2),
        }
        if fields["path"] != "/ping":  # the health checks' latency would hide that of the predictions
            fields["_aws"] = {"Timestamp": int(1000 * time.time()), "CloudWatchMetrics": [_DIRECTIVE]}
        log.info(json.dumps(fields))
