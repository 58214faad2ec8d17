"""A worker of the server in a process of its own, for tests and benchmarks; and raw connections to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
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


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """The application under uvicorn in another process. While the file `gate` exists, its forward passes wait.

    While the file `fault` beside it exists, they fail.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        listener: socket.socket | None = None,
        batch_mode: bool = False,
        **settings: Any,
    ) -> None:
        self.gate = scratch / "gate"
        self.fault = scratch / "fault"
        self.log = scratch / "server.log"
        listener = listener.dup() if listener else socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = listener.getsockname()[1]
        order = {"folder": str(folder), "gate": str(self.gate), "listener": listener.fileno(), "settings": settings}
        order["batch_mode"] = batch_mode
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, json.dumps(order)],
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        listener.close()
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
        """The log so far."""
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

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

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


def same(answer: dict[str, Any], prediction: Prediction) -> bool:
    """Whether the answer is this photo's. No two of them agree in their probabilities."""
    shares = {str(quantity): share for quantity, share in prediction.probabilities.items()}
    return (
        answer["quantity"] == prediction.quantity
        and answer["model_version"] == prediction.model_version
        and answer["likely_quantities"] == list(prediction.likely_quantities)
        and answer["error"] == ""
        and answer["probabilities"].keys() == shares.keys()
        and all(abs(answer["probabilities"][quantity] - share) < 1e-5 for quantity, share in shares.items())
        and abs(answer["confidence"] - prediction.confidence) < 1e-5
    )


def all_same(answers: Sequence[dict[str, Any]], predictions: Sequence[Prediction]) -> bool:
    """Whether the answers are those of these photos, in order."""
    return all(same(answer, prediction) for answer, prediction in zip(answers, predictions, strict=True))


def refused(answer: Answer, status: int, reason: str = "") -> None:
    """Check that a request was refused, with a reason that has this part."""
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert reason in error
    assert "Traceback" not in error


def eventually(condition: Callable[[], Any]) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
    return value


def main() -> None:
    """The process."""
    import uvicorn
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from stocktake.serving.app import create_app
    from stocktake.serving.predictor import Predictor
    from stocktake.serving.settings import ServerSettings
    from stocktake.serving.supervisor import server_config
    from stocktake.serving.telemetry import start_logging

    order = json.loads(sys.argv[1])

    class GatedPredictor(Predictor):
        def probabilities(self, prepared: Any) -> Any:
            while Path(order["gate"]).exists():
                time.sleep(0.005)
            if Path(order["gate"]).with_name("fault").exists():
                raise RuntimeError("the engine failed")
            return super().probabilities(prepared)

    class TellReady(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            os.write(1, b"ready\n")

    settings = ServerSettings(**({"threads": 1} | order["settings"]))
    predictor = GatedPredictor(Path(order["folder"]), threads=settings.threads)
    log = start_logging()
    app = create_app(predictor, settings, batch_mode=order["batch_mode"], on_end=log.stop)

    async def waiting(_: Any) -> PlainTextResponse:
        return PlainTextResponse(str(app.state.service.pool.waiting))

    app.routes.append(Route("/waiting", waiting))
    TellReady(server_config(lambda: app, settings)).run([socket.socket(fileno=order["listener"])])


if __name__ == "__main__":
    main()
