"""The server over real HTTP, in a process of its own."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving_process import ServerProcess, ask, eventually, refused, same, serving
from stocktake.serving.payloads import PHOTO_TYPES
from stocktake.serving.predictor import Prediction, Predictor
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 600 + number) for number in range(9)]
TEXTS = [base64.b64encode(photo).decode() for photo in PHOTOS]
JPEG = {"content-type": "image/jpeg"}
JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/jsonlines"}


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, max_request_bytes=300_000, max_queue=40) as process:
        yield process


@pytest.fixture(scope="module")
def counts(exported_model: Path) -> list[Prediction]:
    return Predictor(exported_model).predict(PHOTOS)


def test_ping_says_which_model_answers(server: ServerProcess, counts: list[Prediction]) -> None:
    answer = server.ask("/ping")
    assert answer.status == 200
    told = answer.json()
    assert (told["status"], told["model_version"], told["quantities"]) == ("ok", counts[0].model_version, [1, 2, 3])
    assert told["engine"].startswith(("openvino", "onnxruntime"))


def test_photos_differ_so_that_answers_can_be_told_apart(counts: list[Prediction]) -> None:
    assert len({tuple(round(share, 4) for share in count.probabilities.values()) for count in counts}) == len(counts)


@pytest.mark.parametrize("media", [*PHOTO_TYPES, None])
def test_a_photo_as_the_body(media: str | None, server: ServerProcess, counts: list[Prediction]) -> None:
    answer = server.ask(body=PHOTOS[4], headers={"content-type": media} if media else {})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert same(answer.json(), counts[4])


@pytest.mark.parametrize(
    "content",
    [
        {"dataframe_split": {"columns": ["photo"], "data": [[text] for text in TEXTS]}},
        {"dataframe_records": [{"photo": text} for text in TEXTS]},
        {"inputs": TEXTS},
        {"inputs": {"photo": TEXTS}},
        {"instances": [{"b64": text} for text in TEXTS]},
    ],
    ids=["split", "records", "list", "columns", "instances"],
)
def test_photos_in_json(content: dict[str, Any], server: ServerProcess, counts: list[Prediction]) -> None:
    answer = server.ask(body=json.dumps(content).encode(), headers=JSON)
    assert answer.status == 200
    predictions = answer.json()["predictions"]
    assert all(same(told, count) for told, count in zip(predictions, counts, strict=True))


@pytest.mark.parametrize("media", ["application/jsonlines", "application/x-jsonlines", "application/x-ndjson"])
def test_a_line_a_photo_loses_none(media: str, server: ServerProcess, counts: list[Prediction]) -> None:
    not_a_photo = base64.b64encode(b"not a photo").decode()
    lines = [json.dumps({"photo": TEXTS[0]}), "{", json.dumps({"photo": not_a_photo}), TEXTS[1], json.dumps(TEXTS[2])]
    answer = server.ask(body="\n".join(lines).encode(), headers={"content-type": media})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/jsonlines"
    told = [json.loads(line) for line in answer.body.splitlines()]
    assert [one["error"]["status"] for one in told[1:3]] == [400, 422]
    assert all(same(one, count) for one, count in zip([told[0], *told[3:]], counts[:3], strict=True))


def test_a_body_in_chunks(server: ServerProcess, counts: list[Prediction]) -> None:
    pieces = (PHOTOS[2][start : start + 500] for start in range(0, len(PHOTOS[2]), 500))
    answer = server.ask(body=pieces, headers=JPEG, method="POST")
    assert same(answer.json(), counts[2])


def test_the_client_chooses_the_form_of_the_answer(server: ServerProcess, counts: list[Prediction]) -> None:
    answer = server.ask(body=PHOTOS[0], headers=JPEG | {"accept": "application/jsonlines"})
    assert answer.headers["content-type"] == "application/jsonlines"
    assert answer.body.endswith(b"}\n")
    answer = server.ask(body=f"{TEXTS[0]}\n{TEXTS[1]}".encode(), headers=LINES | {"accept": "application/json"})
    assert all(same(told, count) for told, count in zip(answer.json()["predictions"], counts[:2], strict=True))
    refused(server.ask(body=PHOTOS[0], headers=JPEG | {"accept": "text/csv"}), 406, "application/json")


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"", JPEG, 400, "the body is empty"),
        (b"{", JSON, 400, "the JSON cannot be read"),
        (b"[" * 100_000, JSON, 400, "nested too deeply"),
        (json.dumps({"inputs": ["?"]}).encode(), JSON, 400, "not base64"),
        (bytes(300_001), JPEG, 413, "more than 300000 bytes"),
        (json.dumps({"inputs": [""] * 41}).encode(), JSON, 413, "40 photos"),
        (b"\n" * 42, LINES, 413, "40 photos"),
        (PHOTOS[0], {"content-type": "text/plain"}, 415, "'text/plain' is not supported"),
        (PHOTOS[0], JPEG | {"content-encoding": "gzip"}, 415, "content-encoding"),
        (b"no photo", JPEG, 422, "not a JPEG, PNG or WebP image"),
        (PHOTOS[0][: len(PHOTOS[0]) // 2], JPEG, 422, "cannot be decoded"),
        (json.dumps({"inputs": [TEXTS[0], "AAAA"]}).encode(), JSON, 422, "photo 2: "),
    ],
)
def test_what_cannot_be_answered_is_told(
    body: bytes, headers: dict[str, str], status: int, reason: str, server: ServerProcess
) -> None:
    connection = server.connection()
    refused(ask(connection, body=body, headers=headers), status, reason)
    assert ask(connection, body=PHOTOS[0], headers=JPEG).status == 200  # on the same connection
    connection.close()


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    refused(server.ask("/nowhere"), 404)
    refused(server.ask("/ping/"), 404)
    answer = server.ask("/invocations")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    refused(server.ask("/ping", b"x"), 405)


def test_too_many_bytes_are_refused_as_they_stream_in(server: ServerProcess) -> None:
    answer = server.ask(body=(bytes(50_000) for _ in range(10)), headers=JPEG, method="POST")
    refused(answer, 413, "300000 bytes")


def test_clients_at_once_get_their_own_answers(server: ServerProcess, counts: list[Prediction]) -> None:
    def client(number: int) -> int:
        connection = server.connection()
        right = 0
        for turn in range(15):
            which = (number + turn) % len(PHOTOS)
            answer = ask(connection, body=PHOTOS[which], headers=JPEG)
            right += answer.status == 200 and same(answer.json(), counts[which])
        connection.close()
        return right

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(client, range(12))) == [15] * 12


def test_pipelined_requests_are_answered_in_order(server: ServerProcess, counts: list[Prediction]) -> None:
    head = "POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: {}\r\n{}\r\n"
    with server.socket() as raw:
        for number in (0, 1, 2):
            last = "connection: close\r\n" if number == 2 else ""
            raw.sendall(head.format(len(PHOTOS[number]), last).encode() + PHOTOS[number])
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    told = [json.loads(body) for body in re.findall(rb"\r\n\r\n(\{.*?\}\S*)(?=HTTP/1|$)", received, re.DOTALL)]
    assert [same(one, count) for one, count in zip(told, counts[:3], strict=True)] == [True] * 3


def test_requests_are_logged_and_measured(server: ServerProcess) -> None:
    before = server.figures()
    server.ask(body=PHOTOS[0], headers=JPEG | {"x-request-id": "mine-1", "authorization": "secret"})
    answer = server.ask(body=b"no photo", headers=JPEG | {"X-Amzn-SageMaker-Inference-Id": "mine-2"})
    assert answer.headers["x-request-id"] == "mine-2"
    made = server.ask("/nowhere?token=secret", headers={"x-request-id": 'forged"\t{}'}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    good, bad, other = (
        eventually(lambda wanted=wanted: [line for line in server.lines() if line["request"] == wanted])[0]
        for wanted in ("mine-1", "mine-2", made)
    )
    assert (good["status"], good["photos"], good["received"]) == (200, 1, len(PHOTOS[0]))
    assert (good["path"], good["method"], good["client"]) == ("/invocations", "POST", "127.0.0.1")
    assert good["ms"] > 0
    assert (bad["status"], other["status"], other["path"]) == (422, 404, "other")
    assert "secret" not in server.log.read_text()
    after = server.figures()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown['stocktake_requests_total{path="/invocations",status="200"}'] == 1
    assert grown['stocktake_requests_total{path="/invocations",status="422"}'] == 1
    assert grown['stocktake_requests_total{path="other",status="404"}'] == 1
    assert grown['stocktake_request_seconds_count{path="/invocations"}'] == 2
    assert grown["stocktake_batch_photos_count"] == 1
    assert sum(value for name, value in grown.items() if name.startswith("stocktake_counted_total")) == 1
    assert after["stocktake_photos_pending"] == 0


def test_the_interface_is_described(server: ServerProcess) -> None:
    described = server.ask("/openapi.json").json()
    assert set(described["paths"]) == {"/ping", "/invocations", "/metrics"}
    assert "image/jpeg" in described["paths"]["/invocations"]["post"]["requestBody"]["content"]
