"""The server over real HTTP, in a process of its own."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving_process import JPEG, JSON, LINES, ServerProcess, all_same, ask, head, refused, same, serving
from stocktake.serving.predictor import Prediction, Predictor
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 600 + number) for number in range(9)]
TEXTS = [base64.b64encode(photo).decode() for photo in PHOTOS]
BAD = base64.b64encode(b"no photo").decode()


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, max_request_bytes=300_000, max_request_photos=40, max_queue=20) as process:
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
    shares = {tuple(round(share, 4) for share in prediction.probabilities.values()) for prediction in predictions}
    assert len(shares) == len(predictions)


@pytest.mark.parametrize("media", ["image/jpeg", "application/x-image", None])
def test_a_photo_as_the_body(media: str | None, server: ServerProcess, predictions: list[Prediction]) -> None:
    answer = server.ask(body=PHOTOS[4], headers={"content-type": media} if media else {})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert same(answer.json(), predictions[4])


def test_photos_in_json(server: ServerProcess, predictions: list[Prediction]) -> None:
    content = {"dataframe_split": {"columns": ["photo"], "data": [[text] for text in TEXTS]}}
    answer = server.ask(body=json.dumps(content).encode(), headers=JSON)
    assert answer.status == 200
    assert all_same(answer.records(), predictions)


def test_a_line_a_photo_loses_none(server: ServerProcess, predictions: list[Prediction]) -> None:
    lines = [json.dumps({"photo": TEXTS[0]}), "{", json.dumps({"photo": BAD}), json.dumps(TEXTS[1])]
    answer = server.ask(body="\n".join(lines).encode(), headers=LINES)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/jsonlines")
    records = answer.records()
    assert all(record["error"] and record["quantity"] is None for record in records[1:3])
    assert all_same([records[0], records[3]], predictions[:2])


def test_a_body_in_chunks(server: ServerProcess, predictions: list[Prediction]) -> None:
    pieces = (PHOTOS[2][start : start + 500] for start in range(0, len(PHOTOS[2]), 500))
    answer = server.ask(body=pieces, headers=JPEG, method="POST")
    assert same(answer.json(), predictions[2])


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"", JPEG, 400, "the body is empty"),
        (b"{", JSON, 400, "the JSON cannot be read"),
        (b"[" * 100_000, JSON, 400, "the JSON cannot be read"),
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
    for path in ("/nowhere", "/", "/explain"):  # the last two only with the setting `page`
        refused(server.ask(path), 404)
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
        for turn in range(8):
            which = (number + turn) % len(PHOTOS)
            answer = ask(connection, body=PHOTOS[which], headers=JPEG)
            right += answer.status == 200 and same(answer.json(), predictions[which])
        connection.close()
        return right

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(client, range(12))) == [8] * 12


def test_pipelined_requests_are_answered_in_order(server: ServerProcess, predictions: list[Prediction]) -> None:
    with server.socket() as raw:
        for number in (0, 1, 2):
            raw.sendall(head(len(PHOTOS[number]), "connection: close\r\n" * (number == 2)) + PHOTOS[number])
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


def test_a_6_mb_payload_of_small_photos_is_answered(batch_server: ServerProcess) -> None:
    """As batch transform packs them: more photos than wait in a queue."""
    line = json.dumps({"photo": TEXTS[0]})
    number = 6 * 2**20 // (len(line) + 1)
    assert number > 575
    answer = batch_server.ask(body="\n".join([line] * number).encode(), headers=LINES)
    assert answer.status == 200
    assert answer.body.count(b'"error":""') == number


@pytest.mark.parametrize("headers", [JPEG, JSON, LINES], ids=["photo", "list", "lines"])
def test_in_batch_mode_a_bad_photo_is_an_error_record(
    headers: dict[str, str], batch_server: ServerProcess, predictions: list[Prediction]
) -> None:
    """A batch transform job ends at any status but 200."""
    texts = [TEXTS[0], BAD, "?", TEXTS[1]]
    bodies = {
        "image/jpeg": b"no photo",
        "application/json": json.dumps({"instances": texts}).encode(),
        "application/jsonlines": "\n".join(map(json.dumps, texts)).encode(),
    }
    answer = batch_server.ask(body=bodies[headers["content-type"]], headers=headers)
    assert answer.status == 200
    records = answer.records()
    errors = records if headers == JPEG else records[1:3]
    for record in errors:
        assert record["error"]
        assert (record["quantity"], record["confidence"], record["probabilities"]) == (None, None, {})
    if headers != JPEG:
        assert all_same([records[0], records[3]], predictions[:2])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 400),
        ("127.0.0.1.evil.example:80", 400),
        ("localhost.evil.example", 400),
        ("[::ffff:8.8.8.8]", 400),
        ("", 400),
        ("0x7f.1", 400),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
    ],
)
def test_a_foreign_host_name_is_refused_on_loopback(host: str, status: int, server: ServerProcess) -> None:
    """A web page whose name is pointed at 127.0.0.1 must not read the answers."""
    assert server.ask("/ping", headers={"host": host}).status == status
    assert server.ask(body=PHOTOS[0], headers=JPEG | {"host": host}).status == status
