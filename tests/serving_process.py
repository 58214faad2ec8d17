"""A worker of the server in a process of its own, for tests and benchmarks; and raw connections to it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stocktake.serving.predictor import Prediction


PATIENCE = 60.0
"""Seconds that a test waits for what should come at once on a machine that has nothing else to do."""
JPEG = {"content-type": "image/jpeg"}
JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/jsonlines"}


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def records(self) -> list[Any]:
        """The records of any format."""
        if self.headers["content-type"] == "application/jsonlines":
            return [json.loads(line) for line in self.body.splitlines()]
        return self.json().get("predictions", [self.json()])


class ServerProcess:
    """The application under uvicorn in another process. While the file `gate` exists, its forward passes wait.

    While the file `fault` beside it exists, they fail.
    """

    def __init__(self, folder: Path, scratch: Path, batch_mode: bool = False, **settings: Any) -> None:
        self.gate, self.fault, self.log = scratch / "gate", scratch / "fault", scratch / "server.log"
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener, self.log.open("wb") as log:
            self.port: int = listener.getsockname()[1]
            options = [str(folder), str(scratch), str(listener.fileno()), str(batch_mode), json.dumps(settings)]
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, *options],
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the server did not start: {self.log.read_text()}")

    def ask(
        self,
        path: str = "/invocations",
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        connection = self.connection()
        try:
            return ask(connection, path, body, headers, method)
        finally:
            connection.close()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def lines(self) -> list[dict[str, Any]]:
        """The requests in the log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def request_line(self, request_id: str) -> dict[str, Any]:
        """The log's line of a request, once it is written."""
        line: dict[str, Any] = eventually(
            lambda: next((line for line in self.lines() if line.get("request") == request_id), None)
        )
        return line

    def waiting(self) -> int:
        """Photos that wait or are being predicted."""
        return int(self.ask("/waiting").body)

    def close(self) -> None:
        """End it, however it is."""
        self.gate.unlink(missing_ok=True)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[ServerProcess]:
    """A server of the model in the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        server = ServerProcess(folder, Path(scratch), **settings)
        try:
            yield server
        finally:
            server.close()


def ask(
    connection: http.client.HTTPConnection,
    path: str = "/invocations",
    body: bytes | Iterator[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> Answer:
    """One request."""
    connection.request(method or ("GET" if body is None else "POST"), path, body, dict(headers or {}))
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def head(length: int | str, more: str = "") -> bytes:
    """The head of a request with a body of this length."""
    return f"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n{more}\r\n".encode()


def same(answer: dict[str, Any], prediction: Prediction) -> bool:
    """Whether the answer is this photo's. No two of them agree in their probabilities."""
    probabilities = {str(quantity): share for quantity, share in prediction.probabilities.items()}
    return (
        answer["quantity"] == prediction.quantity
        and answer["model_version"] == prediction.model_version
        and answer["likely_quantities"] == list(prediction.likely_quantities)
        and answer["error"] == ""
        and answer["probabilities"].keys() == probabilities.keys()
        and all(abs(answer["probabilities"][quantity] - share) < 1e-5 for quantity, share in probabilities.items())
        and abs(answer["confidence"] - prediction.confidence) < 1e-5
    )


def all_same(answers: Sequence[dict[str, Any]], predictions: Sequence[Prediction]) -> bool:
    """Whether the answers are those of these photos, in order."""
    return all(same(answer, prediction) for answer, prediction in zip(answers, predictions, strict=True))


def refused(answer: Answer, status: int, reason: str = "") -> None:
    """Check that a request was refused, with a reason that has this part."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert reason in answer.json()["error"]
    assert "Traceback" not in answer.json()["error"]


def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE:g} s for {what}"
        time.sleep(0.01)
    return value


def main() -> None:
    """The process."""
    import uvicorn
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from stocktake.serving.app import MAX_PIXELS, create_app
    from stocktake.serving.predictor import Predictor
    from stocktake.serving.settings import ServerSettings
    from stocktake.serving.supervisor import configure_logging, server_config

    folder, scratch, listener, batch_mode, settings_json = sys.argv[1:]
    gate, fault = Path(scratch, "gate"), Path(scratch, "fault")

    class GatedPredictor(Predictor):
        def probabilities(self, prepared: Any, **options: Any) -> Any:
            while gate.exists():
                time.sleep(0.005)
            if fault.exists():
                raise RuntimeError("the engine failed")
            return super().probabilities(prepared, **options)

    class ReadyServer(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            os.write(1, b"ready\n")

    configure_logging()
    settings = ServerSettings(**({"threads": 1} | json.loads(settings_json)))
    predictor = GatedPredictor(Path(folder), threads=settings.threads, max_pixels=MAX_PIXELS)
    app = create_app(predictor, settings, batch_mode=batch_mode == "True")

    async def waiting(_: Any) -> PlainTextResponse:
        return PlainTextResponse(str(app.state.service.pool.waiting))

    app.routes.append(Route("/waiting", waiting))
    ReadyServer(server_config(lambda: app, settings)).run([socket.socket(fileno=int(listener))])


if __name__ == "__main__":
    main()
