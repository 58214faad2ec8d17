"""A proxy in front of the emulator that throttles, drops or loses requests, as networks and AWS do."""

from __future__ import annotations

import collections
import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_THROTTLED = b'{"__type": "ThrottlingException", "message": "Rate exceeded"}'


class FaultyAws:
    """`faults[OPERATION]` is what happens to its next requests, one after the other.

    throttle: refused before the emulator sees it. drop: the connection is closed instead. lose: the emulator gets it,
    the connection is closed before the answer. A function is called when the emulator has answered, before the client
    gets the answer. S3's requests are the operation "s3".
    """

    def __init__(self, endpoint: str) -> None:
        self.faults: dict[str, list[str | Callable[[], None]]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Operation, path and headers of each request."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2] or "s3"
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                proxy.requests.append((operation, self.path, headers))
                remaining = proxy.faults.get(operation)
                fault = remaining.pop(0) if remaining else ""
                if fault == "throttle":
                    return self.reply(400, {}, _THROTTLED)
                if fault == "drop":
                    return self.hang_up()
                request = urllib.request.Request(endpoint + self.path, body or None, method=self.command)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "transfer-encoding", "content-length", "connection"):
                        request.add_header(name, value)
                try:
                    with _direct.open(request) as answer:
                        status, answer_headers, content = answer.status, dict(answer.headers), answer.read()
                except urllib.error.HTTPError as error:
                    status, answer_headers, content = error.code, dict(error.headers), error.read()
                if callable(fault):
                    fault()
                if fault == "lose":
                    return self.hang_up()
                return self.reply(status, answer_headers, content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - http.server's names

            def hang_up(self) -> None:
                self.close_connection = True
                self.connection.close()

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                left_out = ("connection", "content-length", "date", "server", "transfer-encoding")
                for name, value in headers.items():
                    if name.lower() not in left_out:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # a connection that was closed on purpose
                    super().handle()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def counts(self) -> collections.Counter[str]:
        """Requests by operation."""
        return collections.Counter(operation for operation, _, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
