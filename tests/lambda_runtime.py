"""Lambda's Runtime API on loopback, and the real runtime interface client that asks it for events."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ARN = "arn:aws:lambda:us-east-1:123456789012:function:stocktake"
_SECONDS = 30.0


@dataclass(frozen=True)
class Invocation:
    """How one event was answered."""

    answer: Any
    failed: bool
    """Whether the function raised, or did not start."""
    milliseconds: float


class LambdaRuntime:
    """Events in, answers out, one at a time, as Lambda gives them to one environment."""

    def __init__(self) -> None:
        self._events: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._answers: dict[str, queue.Queue[tuple[bool, bytes]]] = {}
        runtime = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet an answer: else delayed acknowledgements cost 40 ms

            def do_GET(self) -> None:
                request_id, body = runtime._events.get()
                deadline = int((time.time() + _SECONDS) * 1000)
                self._send(
                    200,
                    body,
                    {
                        "Content-Type": "application/json",
                        "Lambda-Runtime-Aws-Request-Id": request_id,
                        "Lambda-Runtime-Deadline-Ms": str(deadline),
                        "Lambda-Runtime-Invoked-Function-Arn": ARN,
                        "Lambda-Runtime-Trace-Id": f"Root=1-{uuid.uuid4().hex[:8]}-{uuid.uuid4().hex[:24]};Sampled=0",
                    },
                )

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                *_, owner, kind = self.path.split("/")
                answers = [runtime._answers[owner]] if owner in runtime._answers else list(runtime._answers.values())
                for answer in answers:  # an error while starting answers every event
                    answer.put((kind == "error", body))
                self._send(202, b"", {})

            def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def invoke(self, event: Any) -> Invocation:
        """Give the function an event and wait for its answer."""
        request_id = str(uuid.uuid4())
        answers = self._answers[request_id] = queue.Queue()
        began = time.perf_counter()
        self._events.put((request_id, json.dumps(event).encode()))
        failed, body = answers.get(timeout=_SECONDS)
        milliseconds = (time.perf_counter() - began) * 1000
        del self._answers[request_id]
        return Invocation(json.loads(body), failed, milliseconds)


@contextmanager
def running_function(folder: Path, environment: Mapping[str, str]) -> Iterator[LambdaRuntime]:
    """`handler.handler` in a folder, run by awslambdaric in a process with this environment and no other variables."""
    runtime = LambdaRuntime()
    threading.Thread(target=runtime.server.serve_forever, daemon=True).start()
    variables = {
        "PATH": os.environ["PATH"],
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{runtime.server.server_port}",
        "AWS_LAMBDA_FUNCTION_NAME": "stocktake",
        "AWS_LAMBDA_FUNCTION_VERSION": "1",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "POWERTOOLS_TRACE_DISABLED": "true",  # no X-Ray daemon here
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "awslambdaric", "handler.handler"], cwd=folder, env=variables, stdout=subprocess.DEVNULL
    )
    try:
        yield runtime
    finally:
        process.kill()
        process.communicate()
        runtime.server.shutdown()
        runtime.server.server_close()
