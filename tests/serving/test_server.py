"""The server over real HTTP, in a process of its own."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving_process import ServerProcess, all_same, ask, refused, same, serving
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
    with serving(exported_model, max_request_bytes=300_000, max_request_photos=40) as process:
        yield process


@pytest.fixture(scope="module")
def batch_server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, batch_mode=True) as process:
        yield process


@pytest.fixture(scope="module")
def predictions(exported_model: Path) -> list[Prediction]:
    return Predictor(exported_model).predict(PHOTOS)


def test_ping_says_which_model_answers(server: ServerProcess, predictions: list[Prediction]) -> None:
    answer = server.ask("/ping")
    assert answer.status == 200
    content = answer.json()
    assert (content["status"], content["quantities"]) == ("ok", [1, 2, 3])
    assert content["model_version"] == predictions[0].model_version
    assert content["engine"].startswith(("openvino", "onnxruntime"))


def test_photos_differ_so_that_answers_can_be_matched(predictions: list[Prediction]) -> None:
    assert len(
        {tuple(round(share, 4) for share in prediction.probabilities.values()) for prediction in predictions}
    ) == len(predictions)


@pytest.mark.parametrize("media", [*PHOTO_TYPES, None])
def test_a_photo_as_the_body(media: str | None, server: ServerProcess, predictions: list[Prediction]) -> None:
    answer = server.ask(body=PHOTOS[4], headers={"content-type": media} if media else {})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert same(answer.json(), predictions[4])


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
def test_photos_in_json(content: dict[str, Any], server: ServerProcess, predictions: list[Prediction]) -> None:
    answer = server.ask(body=json.dumps(content).encode(), headers=JSON)
    assert answer.status == 200
    assert all_same(answer.json()["predictions"], predictions)


@pytest.mark.parametrize("media", ["application/jsonlines", "application/x-jsonlines", "application/x-ndjson"])
def test_a_line_a_photo_loses_none(media: str, server: ServerProcess, predictions: list[Prediction]) -> None:
    not_a_photo = base64.b64encode(b"not a photo").decode()
    lines = [json.dumps({"photo": TEXTS[0]}), "{", json.dumps({"photo": not_a_photo}), TEXTS[1], json.dumps(TEXTS[2])]
    answer = server.ask(body="\n".join(lines).encode(), headers={"content-type": media})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/jsonlines"
    records = [json.loads(line) for line in answer.body.splitlines()]
    assert all(record["error"] and record["quantity"] is None for record in records[1:3])
    assert all_same([records[0], *records[3:]], predictions[:3])


def test_a_body_in_chunks(server: ServerProcess, predictions: list[Prediction]) -> None:
    pieces = (PHOTOS[2][start : start + 500] for start in range(0, len(PHOTOS[2]), 500))
    answer = server.ask(body=pieces, headers=JPEG, method="POST")
    assert same(answer.json(), predictions[2])


def test_the_client_chooses_the_form_of_the_answer(server: ServerProcess, predictions: list[Prediction]) -> None:
    answer = server.ask(body=PHOTOS[0], headers=JPEG | {"accept": "application/jsonlines"})
    assert answer.headers["content-type"] == "application/jsonlines"
    assert answer.body.endswith(b"}\n")
    answer = server.ask(body=f"{TEXTS[0]}\n{TEXTS[1]}".encode(), headers=LINES | {"accept": "application/json"})
    assert all_same(answer.json()["predictions"], predictions[:2])


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"", JPEG, 400, "the body is empty"),
        (b"{", JSON, 400, "the JSON cannot be read"),
        (b"[" * 100_000, JSON, 400, "nested too deeply"),
        (json.dumps({"inputs": ["?"]}).encode(), JSON, 422, "not base64"),
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
def test_a_bad_request_is_refused_and_the_connection_kept(
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


def test_clients_at_once_get_their_own_answers(server: ServerProcess, predictions: list[Prediction]) -> None:
    def client(number: int) -> int:
        connection = server.connection()
        right = 0
        for turn in range(15):
            which = (number + turn) % len(PHOTOS)
            answer = ask(connection, body=PHOTOS[which], headers=JPEG)
            right += answer.status == 200 and same(answer.json(), predictions[which])
        connection.close()
        return right

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(client, range(12))) == [15] * 12


def test_pipelined_requests_are_answered_in_order(server: ServerProcess, predictions: list[Prediction]) -> None:
    head = "POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/jpeg\r\ncontent-length: {}\r\n{}\r\n"
    with server.socket() as raw:
        for number in (0, 1, 2):
            last = "connection: close\r\n" if number == 2 else ""
            raw.sendall(head.format(len(PHOTOS[number]), last).encode() + PHOTOS[number])
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    records = [json.loads(body) for body in re.findall(rb"\r\n\r\n(\{.*?\}\S*)(?=HTTP/1|$)", received, re.DOTALL)]
    assert all_same(records, predictions[:3])


def test_requests_are_logged_with_their_metrics(server: ServerProcess, predictions: list[Prediction]) -> None:
    """In CloudWatch's embedded metric format: each metric of the directive is a number of the same line."""
    server.ask(body=PHOTOS[0], headers=JPEG | {"x-request-id": "mine-1", "authorization": "secret"})
    answer = server.ask(body=b"no photo", headers=JPEG | {"X-Amzn-SageMaker-Inference-Id": "mine-2"})
    assert answer.headers["x-request-id"] == "mine-2"
    made = server.ask("/nowhere?token=secret", headers={"x-request-id": 'forged"\t{}'}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    good, bad, other = (server.request_line(request_id) for request_id in ("mine-1", "mine-2", made))
    assert (good["status"], good["Photos"], good["received"]) == (200, 1, len(PHOTOS[0]))
    assert (good["path"], good["method"], good["client"]) == ("/invocations", "POST", "127.0.0.1")
    assert (bad["status"], bad["Errors"], bad["PhotoErrors"], other["status"]) == (422, 1, 1, 404)
    assert other["path"] == "other"
    assert "secret" not in server.log.read_text()
    (directive,) = good["_aws"]["CloudWatchMetrics"]
    assert abs(good["_aws"]["Timestamp"] / 1000 - time.time()) < 3600
    assert all(isinstance(good[metric["Name"]], int | float) for metric in directive["Metrics"])
    assert good["Latency"] > 0
    for dimensions in directive["Dimensions"]:
        assert [good[name] for name in dimensions] == [predictions[0].model_version]


def test_sagemakers_custom_attributes_are_logged_and_returned(server: ServerProcess) -> None:
    name = "x-amzn-sagemaker-custom-attributes"
    answer = server.ask(body=PHOTOS[0], headers=JPEG | {name: "trace=7, bin B1", "x-request-id": "attributes-1"})
    assert answer.headers[name] == "trace=7, bin B1"
    assert server.request_line("attributes-1")["custom_attributes"] == "trace=7, bin B1"
    for refused_value in ("x" * 1025, "caf\u00e9"):
        assert name not in server.ask("/ping", headers={name: refused_value}).headers


def test_a_6_mb_payload_of_small_photos_is_answered(exported_model: Path) -> None:
    """As batch transform packs them: more photos than wait in a queue."""
    lines = [json.dumps({"photo": TEXTS[number % len(TEXTS)]}) for number in range(2300)]
    photo_lines = 6 * 2**20 // (len(lines[0]) + 1)
    body = "\n".join(lines[:photo_lines]).encode()
    assert photo_lines > 575
    with serving(exported_model, max_queue=100) as process:
        answer = process.ask(body=body, headers=LINES)
    assert answer.status == 200
    assert answer.body.count(b'"error":""') == len(lines[:photo_lines])


@pytest.mark.parametrize("content_type", ["image/jpeg", "application/json", "application/jsonlines"])
def test_in_batch_mode_a_bad_photo_is_an_error_record(
    content_type: str, batch_server: ServerProcess, predictions: list[Prediction]
) -> None:
    """A batch transform job ends at any status but 200."""
    bad = base64.b64encode(b"no photo").decode()
    texts = [TEXTS[0], bad, "?", TEXTS[1]]
    bodies = {
        "image/jpeg": b"no photo",
        "application/json": json.dumps({"instances": texts}).encode(),
        "application/jsonlines": "\n".join(texts).encode(),
    }
    answer = batch_server.ask(body=bodies[content_type], headers={"content-type": content_type})
    assert answer.status == 200
    if content_type == "image/jpeg":
        records = [answer.json()]
    elif content_type == "application/json":
        records = answer.json()["predictions"]
    else:
        records = [json.loads(line) for line in answer.body.splitlines()]
    errors = [record for record in records if record["error"]]
    assert len(errors) == (1 if content_type == "image/jpeg" else 2)
    for record in errors:
        assert (record["quantity"], record["confidence"], record["probabilities"]) == (None, None, {})
        assert record.keys() == {*records[0]}
    if len(records) > 1:
        assert same(records[0], predictions[0])
        assert same(records[3], predictions[1])


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "[::ffff:8.8.8.8]", "", "0x7f.1"])
def test_a_foreign_host_name_is_refused_on_loopback(host: str, server: ServerProcess) -> None:
    """A web page whose name is pointed at 127.0.0.1 must not read the answers."""
    refused(server.ask("/ping", headers={"host": host}), 421)
    refused(server.ask(body=PHOTOS[0], headers=JPEG | {"host": host}), 421)


def test_this_machines_own_names_are_answered(server: ServerProcess) -> None:
    for host in ("localhost", "LOCALHOST:8080", "127.0.0.1", "127.8.8.8:1", "[::1]:8080"):
        assert server.ask("/ping", headers={"host": host}).status == 200
