"""What a fuzzer finds to send, over real sockets to a server in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile_requests import MALFORMATIONS, SETTINGS, Client, attack
from serving_process import ServerProcess, serving
from stocktake.serving.predictor import Predictor
from stocktake.serving.supervisor import MAX_HEAD_BYTES
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 650 + number) for number in range(12)]
REQUESTS = 5 * 2 * len(MALFORMATIONS)
UNHURRIED = settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, **SETTINGS) as process:
        yield process
        assert process.process.poll() is None, "the server crashed"
        assert not [line for line in process.lines() if "traceback" in line]
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(autouse=True)
def still_answers(server: ServerProcess) -> Iterator[None]:
    yield
    assert server.ask("/invocations", PHOTOS[0], {"content-type": "image/jpeg"}).status == 200


def test_among_malformed_requests_the_good_ones_are_answered_right(server: ServerProcess, exported_model: Path) -> None:
    predictions = Predictor(exported_model).predict(PHOTOS)

    def right(record: dict[str, Any], number: int) -> bool:
        shares = predictions[number].probabilities
        return all(abs(record["probabilities"][str(label)] - share) < 1e-4 for label, share in shares.items())

    worker = psutil.Process(server.process.pid)
    before = worker.memory_info().rss
    report = attack(server, PHOTOS, right, REQUESTS, lambda: worker.memory_info().rss)
    assert report.kinds.total() == REQUESTS
    assert set(report.kinds) == {"good", *(malformation.__name__ for malformation in MALFORMATIONS)}
    assert report.wrong == []
    # each of 5 threads keeps what its largest photo took; the benchmark bounds the growth after that
    assert max(report.memory) - before < 5 * 80 * 2**20


@UNHURRIED
@given(
    st.one_of(st.binary(min_size=1, max_size=400), st.text(max_size=200).map(lambda text: text.encode() + b"\r\n\r\n"))
)
def test_any_bytes_on_a_connection_are_refused_or_dropped(server: ServerProcess, sent: bytes) -> None:
    statuses = Client(server, PHOTOS, seed=0).raw(sent, half_close=True)
    assert all(status is None or 400 <= status < 500 for status in statuses)


_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


@UNHURRIED
@given(st.sampled_from(["inputs", "instances", "dataframe_split", "dataframe_records"]), _values)
def test_any_value_in_json_is_refused_or_answered(server: ServerProcess, name: str, value: Any) -> None:
    body = json.dumps({name: value}).encode()
    answer = server.ask(body=body, headers={"content-type": "application/json"})
    assert answer.status in (200, 400, 413, 422)
    assert ("error" in answer.json()) == (answer.status != 200)


def test_a_pipeline_of_very_many_requests_is_answered_in_order(server: ServerProcess) -> None:
    ping, unknown = _get("/ping"), _get("/no")
    statuses = Client(server, PHOTOS, seed=0).raw((ping + unknown) * 500, _get("/ping", b"connection: close\r\n"))
    assert statuses == [200, 404] * 500 + [200, None]


def test_headers_are_bounded_across_packets(server: ServerProcess) -> None:
    client = Client(server, PHOTOS, seed=0)
    some = b"x-some: " + b"a" * (MAX_HEAD_BYTES // 4) + b"\r\n"
    head = _get("/ping", some).removesuffix(b"\r\n")
    assert client.raw(head, some, some, some, some, pause=0.02)[0] in (400, None)
    last = _get("/ping", b"connection: close\r\n")
    assert client.raw(*[_get("/ping", some)] * 6, last, pause=0.02) == [200] * 7 + [None]


def _get(path: str, headers: bytes = b"") -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n".encode() + headers + b"\r\n"
