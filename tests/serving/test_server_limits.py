"""The server when it is full, told to end, held up or left; each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import stocktake.serving.server as server_module
from serving_process import PATIENCE, ServerProcess, eventually, refused, same, serving
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.serving.protocol import MOST_CONNECTIONS
from stocktake.serving.server import create_app
from stocktake.serving.settings import ServerSettings
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 600 + number) for number in range(4)]
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture
def own_server(exported_model: Path) -> Iterator[ServerProcess]:
    """One to overload, hold up and end."""
    with serving(exported_model, max_queue=3, max_batch=1, body_seconds=1, drain_seconds=PATIENCE) as process:
        yield process


@pytest.fixture(scope="module")
def counts(exported_model: Path) -> list[Prediction]:
    return Predictor(exported_model).predict(PHOTOS)


def test_a_full_queue_refuses_and_recovers(own_server: ServerProcess, counts: list[Prediction]) -> None:
    own_server.gate.touch()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(own_server.ask, "/invocations", PHOTOS[number], JPEG) for number in range(3)]
        eventually(lambda: own_server.figures()["stocktake_photos_pending"] == 3)
        answer = own_server.ask(body=PHOTOS[3], headers=JPEG)
        refused(answer, 503, "too many photos wait")
        assert int(answer.headers["retry-after"]) >= 1
        assert own_server.ask("/ping").status == 200
        own_server.gate.unlink()
        for future, count in zip(waiting, counts, strict=False):
            assert same(future.result().json(), count)
    assert same(own_server.ask(body=PHOTOS[3], headers=JPEG).json(), counts[3])


def test_a_fault_is_told_with_the_request_that_the_log_explains(own_server: ServerProcess) -> None:
    own_server.fault.touch()
    answer = own_server.ask(body=PHOTOS[0], headers=JPEG | {"x-request-id": "faulty-1"})
    refused(answer, 500, "at request faulty-1")
    assert "engine" not in answer.json()["error"]["reason"]
    (line,) = eventually(lambda: [line for line in own_server.lines() if line["request"] == "faulty-1"])
    assert "RuntimeError: the engine failed" in line["fault"]
    own_server.fault.unlink()
    assert own_server.ask(body=PHOTOS[0], headers=JPEG).status == 200


def test_a_client_that_leaves_frees_its_place(own_server: ServerProcess) -> None:
    own_server.gate.touch()
    head = f"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: {len(PHOTOS[0])}\r\n\r\n".encode()
    clients = [own_server.socket() for _ in range(3)]
    for client in clients:
        client.sendall(head + PHOTOS[0])
    eventually(lambda: own_server.figures()["stocktake_photos_pending"] == 3)
    for client in clients:
        client.close()
    eventually(lambda: len([line for line in own_server.lines() if line["status"] == 499]) == 3)
    own_server.gate.unlink()
    eventually(lambda: own_server.figures()["stocktake_photos_pending"] == 0)
    assert own_server.figures()["stocktake_batch_photos_count"] <= 1  # of the pass that may have begun
    assert own_server.ask(body=PHOTOS[0], headers=JPEG).status == 200


def test_a_slow_body_and_a_slow_head_are_refused(own_server: ServerProcess) -> None:
    for sent in (b"POST /invocations HTTP/1.1\r\ncontent-length: 9\r\n\r\nab", b"POST /invocations HTTP/1.1\r\nhost:"):
        with own_server.socket() as raw:
            raw.sendall(sent)
            received = b"".join(iter(lambda: raw.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["status"] == 408
    with own_server.socket() as raw:
        assert raw.recv(1) == b""  # nothing was sent at all


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_answers_what_has_begun(
    number: signal.Signals, exported_model: Path, counts: list[Prediction]
) -> None:
    head = f"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: {len(PHOTOS[2])}\r\n\r\n".encode()
    with serving(exported_model, drain_seconds=PATIENCE, body_seconds=PATIENCE) as process, process.socket() as kept:
        _ping(kept)
        process.gate.touch()
        with ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(process.ask, "/invocations", PHOTOS[which], JPEG) for which in range(2)]
            eventually(lambda: process.figures()["stocktake_photos_pending"] == 2)
            kept.sendall(head + PHOTOS[2][:100])
            process.tell(number)
            eventually(lambda: not _accepts(process))
            kept.sendall(PHOTOS[2][100:])
            process.gate.unlink()
            for future, count in zip(begun, counts, strict=False):
                assert same(future.result().json(), count)
        received = b"".join(iter(lambda: kept.recv(65536), b""))
        assert b"connection: close\r\n" in received
        assert same(json.loads(received.partition(b"\r\n\r\n")[2]), counts[2])
        assert process.wait() == 0
        assert len([line for line in process.lines() if line["photos"]]) == 3


def _ping(kept: socket.socket) -> None:
    kept.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
    received = b""
    while not received.endswith(b"}"):  # head and body may come one after the other
        received += kept.recv(65536)
    assert received.startswith(b"HTTP/1.1 200 ")


def _accepts(server: ServerProcess) -> bool:
    try:
        server.socket().close()
    except OSError:
        return False
    return True


def test_while_it_ends_ping_says_so(exported_model: Path) -> None:
    with serving(exported_model, drain_seconds=PATIENCE) as process, process.socket() as kept:
        _ping(kept)
        kept.sendall(b"GET /ping HTTP/1.1\r\n")
        process.tell()
        eventually(lambda: not _accepts(process))
        kept.sendall(b"\r\n")
        received = b"".join(iter(lambda: kept.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"the server is ending" in received
        assert b"retry-after: 1\r\n" in received
        assert process.wait() == 0


def test_what_takes_longer_than_the_end_may_is_refused(exported_model: Path) -> None:
    with serving(exported_model, drain_seconds=0.5) as process:
        process.gate.touch()
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(process.ask, "/invocations", PHOTOS[0], JPEG)
            eventually(lambda: process.figures()["stocktake_photos_pending"] == 1)
            process.tell()
            answer = begun.result()
        refused(answer, 503, "ending")
        assert answer.headers["retry-after"]
        assert process.wait() == 0


def test_a_client_may_ask_whether_to_send(own_server: ServerProcess) -> None:
    head = "POST /invocations HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n"
    with own_server.socket() as raw:
        raw.sendall(head.format(10**9).encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
    with own_server.socket() as raw:
        raw.sendall(head.format(len(PHOTOS[0])).encode())
        assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(PHOTOS[0])
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connections_are_bounded(own_server: ServerProcess) -> None:
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(own_server.socket()) for _ in range(MOST_CONNECTIONS)]
        clients[-1].sendall(b"GET /ping HTTP/1.1\r\n\r\n")
        assert clients[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
        with own_server.socket() as refused_one:
            assert refused_one.recv(65536).startswith(b"HTTP/1.1 503 ")
    eventually(lambda: own_server.ask("/ping").status == 200)


def test_bodies_held_at_once_are_bounded(exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with less memory to fill."""
    monkeypatch.setattr(server_module, "HELD_BYTES", 1000)
    app = create_app(Predictor(exported_model), ServerSettings(max_request_bytes=1024))

    async def run() -> list[int]:
        more = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield bytes(1000)
            await more.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            first = [asyncio.create_task(client.post("/invocations", content=slowly())) for _ in range(2)]
            while app.state.service._held < 2000:
                await asyncio.sleep(0.005)
            refused_one = await client.post("/invocations", content=bytes(100))
            more.set()
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            return [refused_one.status_code, app.state.service._held]

    assert asyncio.run(run()) == [503, 0]


def test_workers_tell_their_figures_together(
    exported_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "figures"))
    first = ServerProcess(exported_model, tmp_path)
    second = ServerProcess(exported_model, tmp_path / "second")
    try:
        assert {one.ask(body=PHOTOS[0], headers=JPEG).status for one in (first, second)} == {200}
        eventually(lambda: first.figures()['stocktake_requests_total{path="/invocations",status="200"}'] == 2)
    finally:
        first.close()
        second.close()


def test_processes_share_a_socket_and_one_ends_without_the_other(exported_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        first = ServerProcess(exported_model, tmp_path, listener=listener)
        (tmp_path / "second").mkdir()
        second = ServerProcess(exported_model, tmp_path / "second", listener=listener)
    stop, statuses = threading.Event(), []

    def client() -> None:
        while not stop.is_set():
            statuses.append(second.ask(body=PHOTOS[0], headers=JPEG).status)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        eventually(lambda: len(statuses) > 20)
        first.tell()
        assert first.wait() == 0
        answered = len(statuses)
        eventually(lambda: len(statuses) > answered + 20)
    finally:
        stop.set()
        thread.join()
        first.close()
        second.close()
    assert set(statuses) == {200}
