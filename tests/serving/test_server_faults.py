"""What a fuzzer finds to send, over real sockets to a server in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hostile_requests import MALFORMATIONS, SETTINGS, Client, attack
from serving_process import ServerProcess, serving
from stocktake.serving.openapi import document
from stocktake.serving.predictor import Predictor
from stocktake.serving.protocol import MOST_HEAD_BYTES
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 650 + number) for number in range(12)]
REQUESTS = 540
UNHURRIED = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
INTERFACE = schemathesis.openapi.from_dict(document("test"))


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, **SETTINGS) as process:
        yield process
        assert process.process.poll() is None, "the server crashed"
        assert not [line for line in process.lines() if "fault" in line]
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(autouse=True)
def still_answers(server: ServerProcess) -> Iterator[None]:
    yield
    assert server.ask("/invocations", PHOTOS[0], {"content-type": "image/jpeg"}).status == 200


@pytest.mark.parametrize("malformation", MALFORMATIONS, ids=lambda one: one.__name__)
def test_each_malformation_has_its_status(malformation: Any, server: ServerProcess) -> None:
    client = Client(server, PHOTOS, seed=1)
    for _ in range(1 if malformation.__name__.startswith("slow") else 3):
        statuses, expected = malformation(client)
        assert statuses[0] in expected


def test_among_malformed_requests_the_good_ones_are_answered_right(server: ServerProcess, exported_model: Path) -> None:
    counts = Predictor(exported_model).predict(PHOTOS)

    def right(told: dict[str, Any], number: int) -> bool:
        shares = counts[number].probabilities
        return all(abs(told["probabilities"][str(label)] - share) < 1e-4 for label, share in shares.items())

    worker = psutil.Process(server.process.pid)
    report = attack(server, PHOTOS, right, REQUESTS, lambda: worker.memory_info().rss)
    assert report.requests == REQUESTS
    assert sum(report.malformed.values()) == REQUESTS // 5
    assert set(report.malformed) == {malformation.__name__ for malformation in MALFORMATIONS}
    assert (report.wrong_statuses, report.wrong_answers) == ([], [])
    assert report.growth() < 30  # the benchmark asks for less, of more requests


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
    assert answer.status in ((200, 400) if value in ([], {"photo": []}) else (400, 413, 422))
    assert ("error" in answer.json()) == (answer.status != 200)


@pytest.mark.filterwarnings("ignore:Skipped test cases")  # it cannot write lines
@INTERFACE.parametrize()
@UNHURRIED
def test_what_is_described_is_what_is_done(server: ServerProcess, case: Any) -> None:
    # text that the schema allows need not be a photo
    case.call_and_validate(base_url=f"http://127.0.0.1:{server.port}", excluded_checks=[positive_data_acceptance])


def test_a_pipeline_of_very_many_requests_is_answered_in_order(server: ServerProcess) -> None:
    statuses = Client(server, PHOTOS, seed=0).raw(
        b"GET /ping HTTP/1.1\r\n\r\nGET /no HTTP/1.1\r\n\r\n" * 500, b"GET /ping HTTP/1.1\r\nconnection: close\r\n\r\n"
    )
    assert statuses == [200, 404] * 500 + [200, None]


def test_headers_are_bounded_across_packets_and_requests(server: ServerProcess) -> None:
    client = Client(server, PHOTOS, seed=0)
    some = b"x-some: " + b"a" * (MOST_HEAD_BYTES // 4) + b"\r\n"
    assert client.raw(b"GET /ping HTTP/1.1\r\n" + some, some, some, some, some, pause=0.02)[0] in (431, None)
    good = b"GET /ping HTTP/1.1\r\n" + some + b"\r\n"
    last = b"GET /ping HTTP/1.1\r\nconnection: close\r\n\r\n"
    assert client.raw(*[good] * 6, last, pause=0.02) == [200] * 7 + [None]
