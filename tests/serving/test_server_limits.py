"""The server when it is full, told to end, held up or left; each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

import stocktake.serving.app as app_module
from serving_process import JPEG, PATIENCE, ServerProcess, eventually, head, refused, same, serving
from stocktake.serving.app import create_app
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.serving.settings import ServerSettings
from stocktake.serving.supervisor import MAX_CONNECTIONS
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 600 + number) for number in range(4)]


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    """One to overload and to hold up."""
    with serving(exported_model, max_queue=3, client_seconds=1, stuck_seconds=0.3) as process:
        yield process


@pytest.fixture(scope="module")
def predictions(exported_model: Path) -> list[Prediction]:
    return Predictor(exported_model).predict(PHOTOS)


def test_a_full_queue_refuses_and_ping_fails_while_prediction_is_stuck(
    server: ServerProcess, predictions: list[Prediction]
) -> None:
    server.gate.touch()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.ask, "/invocations", PHOTOS[number], JPEG) for number in range(3)]
        eventually(lambda: server.waiting() == 3)
        answer = server.ask(body=PHOTOS[3], headers=JPEG)
        refused(answer, 503, "too many photos wait")
        assert int(answer.headers["retry-after"]) >= 1
        eventually(lambda: server.ask("/ping").status == 503)
        refused(server.ask("/ping"), 503, "stuck")
        server.gate.unlink()
        for future, prediction in zip(waiting, predictions, strict=False):
            assert same(future.result().json(), prediction)
    assert same(server.ask(body=PHOTOS[3], headers=JPEG).json(), predictions[3])
    assert server.ask("/ping").status == 200


def test_a_failing_engine_is_logged_by_request_and_fails_the_ping(server: ServerProcess) -> None:
    server.fault.touch()
    for number in range(3):
        answer = server.ask(body=PHOTOS[0], headers=JPEG | {"x-request-id": f"faulty-{number}"})
        refused(answer, 500, f"at request faulty-{number}")
        assert "engine" not in answer.json()["error"]
    assert "RuntimeError: the engine failed" in server.request_line("faulty-2")["traceback"]
    refused(server.ask("/ping"), 503, "fails")
    server.fault.unlink()
    assert server.ask(body=PHOTOS[0], headers=JPEG).status == 200
    assert server.ask("/ping").status == 200


def test_a_client_that_leaves_frees_its_place(server: ServerProcess) -> None:
    server.gate.touch()
    clients = [server.socket() for _ in range(3)]
    for client in clients:
        client.sendall(head(len(PHOTOS[0])) + PHOTOS[0])
    eventually(lambda: server.waiting() == 3)
    for client in clients:
        client.close()
    eventually(lambda: len([line for line in server.lines() if line.get("status") == 499]) == 3)
    server.gate.unlink()
    eventually(lambda: server.waiting() == 0)
    assert server.ask(body=PHOTOS[0], headers=JPEG).status == 200


def test_a_slow_body_is_refused_and_a_slow_head_cut_off(server: ServerProcess) -> None:
    """Also one byte at a time, so that something is always on its way."""
    with server.socket() as raw:
        raw.sendall(head(9) + b"ab")
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 408 ")
    for sent in (b"", b"POST /invocations HTTP/1.1\r\nhost:"):
        with server.socket() as raw:
            raw.sendall(sent)
            assert closed(raw, trickle=b"x" if sent else b"")


def closed(raw: socket.socket, trickle: bytes = b"") -> bool:
    """Whether the server closes a connection on which it gets nothing, or bytes one after the other."""
    raw.settimeout(0.1)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if trickle:
                raw.sendall(trickle)
            if not raw.recv(65536):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_connection_that_never_reads_is_closed(server: ServerProcess) -> None:
    """It asks for megabytes of answers, and leaves them in the buffers."""
    before = psutil.Process(server.process.pid).num_fds()
    body = b"?\n" * 4000  # an error record a line: an answer of 600 kB
    request = head(len(body), "content-type: application/jsonlines\r\n") + body
    with server.socket() as raw:
        raw.sendall(request * 30)
        eventually(lambda: psutil.Process(server.process.pid).num_fds() > before)
        eventually(lambda: psutil.Process(server.process.pid).num_fds() <= before)
    assert server.ask("/ping").status == 200


def test_a_worker_that_ends_answers_what_has_begun(exported_model: Path, predictions: list[Prediction]) -> None:
    with serving(exported_model, drain_seconds=PATIENCE, client_seconds=PATIENCE) as process, process.socket() as kept:
        process.gate.touch()
        with ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(process.ask, "/invocations", PHOTOS[which], JPEG) for which in range(2)]
            kept.sendall(head(len(PHOTOS[2])) + PHOTOS[2][:100])
            eventually(lambda: process.waiting() == 2)
            process.process.send_signal(signal.SIGINT)
            eventually(lambda: not _accepts(process))
            kept.sendall(PHOTOS[2][100:])
            process.gate.unlink()
            for future, prediction in zip(begun, predictions, strict=False):
                assert same(future.result().json(), prediction)
        received = b"".join(iter(lambda: kept.recv(65536), b""))
        assert same(json.loads(received.partition(b"\r\n\r\n")[2]), predictions[2])
        process.process.wait(PATIENCE)
        assert len([line for line in process.lines() if line.get("Photos")]) == 3


def _accepts(server: ServerProcess) -> bool:
    try:
        server.socket().close()
    except OSError:
        return False
    return True


def test_what_takes_longer_than_the_end_may_is_refused(exported_model: Path) -> None:
    with serving(exported_model, drain_seconds=1) as process:
        process.gate.touch()
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(process.ask, "/invocations", PHOTOS[0], JPEG)
            eventually(lambda: process.waiting() == 1)
            process.process.terminate()
            answer = begun.result()
        refused(answer, 503, "ending")
        assert answer.headers["retry-after"]


def test_a_client_may_ask_whether_to_send(server: ServerProcess) -> None:
    with server.socket() as raw:
        raw.sendall(head(10**9, "expect: 100-continue\r\n"))
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
    with server.socket() as raw:
        raw.sendall(head(len(PHOTOS[0]), "expect: 100-continue\r\n"))
        assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(PHOTOS[0])
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connections_are_bounded(server: ServerProcess) -> None:
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(server.socket()) for _ in range(MAX_CONNECTIONS)]

        def is_refused() -> bool:
            clients[0].sendall(b"GET /ping HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return clients[0].recv(65536).startswith(b"HTTP/1.1 503 ")

        eventually(is_refused)  # once all of them are accepted
    eventually(lambda: server.ask("/ping").status == 200)


def test_bodies_held_at_once_are_bounded(exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with less memory to fill."""
    monkeypatch.setattr(app_module, "MAX_BODIES_BYTES", 1000)
    app = create_app(Predictor(exported_model), ServerSettings(max_request_bytes=1024))

    async def run() -> list[int]:
        more = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield bytes(1000)
            await more.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            first = [asyncio.create_task(client.post("/invocations", content=slowly())) for _ in range(2)]
            while app.state.service.bodies_bytes < 2000:
                await asyncio.sleep(0.005)
            refused_client = await client.post("/invocations", content=bytes(100))
            more.set()
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            return [refused_client.status_code, app.state.service.bodies_bytes]

    assert asyncio.run(run()) == [503, 0]
