from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stocktake.data.images import PhotoError
from stocktake.serving.payloads import JSON, LINES, SUPPORTED, RequestError, answer_type, media_type, read, write
from stocktake.serving.predictor import Prediction, record

ONE, TWO = b"first photo", b"\x00second"
A, B = base64.b64encode(ONE).decode(), base64.b64encode(TWO).decode()
PREDICTION = Prediction(2, 0.75, {1: 0.25, 2: 0.75}, (2,), "v7")


def refusal(media: str, body: bytes, limit: int = 8) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(media, body, limit)
    return caught.value


@pytest.mark.parametrize(
    "content",
    [
        {"dataframe_split": {"columns": ["photo"], "data": [[A], [B]]}},
        {"dataframe_split": {"index": [0, 1], "columns": ["bin", "photo"], "data": [["x", A], [1, B]]}},
        {"dataframe_records": [{"photo": A}, {"photo": B, "bin": 7}]},
        {"inputs": [A, B]},
        {"inputs": {"photo": [A, B]}, "params": {}},
        {"instances": [A, B]},
        {"instances": [{"photo": A}, {"b64": B}]},
        {"instances": [A[:4] + "\n" + A[4:] + "\n", B]},
    ],
)
def test_every_form_of_json_holds_the_photos(content: dict[str, Any]) -> None:
    payload = read(JSON, json.dumps(content).encode(), 2)
    assert (payload.photos, payload.format) == ([ONE, TWO], "list")


def test_one_photo_may_stand_alone_in_inputs() -> None:
    assert read(JSON, json.dumps({"inputs": {"photo": A}}).encode(), 1).photos == [ONE]
    assert read(JSON, b'{"inputs": []}', 1).photos == []


@pytest.mark.parametrize("media", ["image/jpeg", "application/octet-stream"])
def test_a_photo_is_the_body_itself(media: str) -> None:
    assert read(media, ONE, 1).photos == [ONE]


def test_a_bad_line_is_answered_in_its_place() -> None:
    body = "\n".join([json.dumps({"photo": A}), "{", "", json.dumps(B), A, "[1]", '{"photo": 1}']) + "\r\n"
    payload = read("application/x-ndjson", body.encode() + b"\xff\n", 8)
    assert [photo for photo in payload.photos if isinstance(photo, bytes)] == [ONE, TWO, ONE]
    is_error = [isinstance(photo, PhotoError) for photo in payload.photos]
    assert is_error == [False, True, True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"{", "cannot be read"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"null", "must be an object with one of"),
        (b"[]", "must be an object with one of"),
        (b"{}", "must be an object with one of"),
        (b'{"inputs": [], "instances": []}', "must be an object with one of"),
        (b'{"inputs": [], "inputs": []}', "twice"),
        (b'{"inputs": [NaN]}', "NaN is no JSON"),
        (b'{"inputs": [-Infinity]}', "-Infinity is no JSON"),
        (b'{"inputs": [' + b"1" * 5000 + b"]}", "cannot be read"),
        (b'{"inputs": 7}', "inputs must be a list"),
        (b'{"inputs": {"image": []}}', "inputs must be a list"),
        (b'{"inputs": {"photo": true}}', "inputs must be a list"),
        (b'{"instances": {"photo": []}}', "instances must be a list"),
        (b'{"dataframe_split": []}', "lists columns and data"),
        (b'{"dataframe_split": {"columns": ["photo"], "data": [["AAAA"], ["AAAA", 1]]}}', "row 2 must be a list of 1"),
        (b'{"dataframe_split": {"columns": ["image"], "data": []}}', "must have the column photo"),
        (b'{"dataframe_split": {"columns": ["photo", "photo"], "data": []}}', "once"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 3_000_000, "nested too deeply"),
    ],
)
def test_malformed_json_is_refused_with_a_reason(body: bytes, reason: str) -> None:
    error = refusal(JSON, body)
    assert error.status == 400
    assert reason in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("record", [None, {"image": "AAAA"}, "A", "AA=A", "AA AA", "\ud800", [["AAAA"]], 7])
def test_a_bad_record_is_an_error_in_its_place(record: Any) -> None:
    first, second, third = read(JSON, json.dumps({"instances": [A, record, B]}).encode(), 3).photos
    assert (first, third) == (ONE, TWO)
    assert isinstance(second, PhotoError)


def test_too_many_photos_are_refused() -> None:
    for media, body in [(JSON, json.dumps({"inputs": [A] * 3}).encode()), (LINES, b"\n" * 4_000_000)]:
        error = refusal(media, body, limit=2)
        assert error.status == 413
        assert "2 photos" in str(error)
    assert len(read(LINES, f"{A}\n{B}\n".encode(), 2).photos) == 2


@pytest.mark.parametrize(
    ("given_type", "encoding", "media"),
    [
        ("image/jpeg", None, "image/jpeg"),
        ("IMAGE/PNG; name=x", "identity", "image/png"),
        ("application/json; charset=UTF-8", None, JSON),
        (None, None, "application/octet-stream"),
        ("text/csv", None, None),
        ("", None, None),
        ("application/json; charset=utf-16", None, None),
        ("multipart/form-data; boundary=x", None, None),
        ("image/jpeg", "gzip", None),
    ],
)
def test_the_media_type_is_a_known_one(given_type: str | None, encoding: str | None, media: str | None) -> None:
    if media:
        assert media_type(given_type, encoding) == media
        return
    with pytest.raises(RequestError) as caught:
        media_type(given_type, encoding)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("accept", "format", "media"),
    [
        (None, "photo", JSON),
        (None, "lines", LINES),
        ("*/*", "list", JSON),
        ("application/jsonlines", "photo", LINES),
        ("application/json", "lines", JSON),
        ("text/html, application/x-ndjson;q=0.5", "list", LINES),
        ("text/html, application/*;q=0.5", "lines", LINES),
        ("text/csv", "photo", JSON),
        (",,;;q", "photo", JSON),
    ],
)
def test_the_answer_is_as_the_client_asks(accept: str | None, format: Any, media: str) -> None:
    assert answer_type(accept, format) == media


def test_answers_are_an_object_a_list_or_lines() -> None:
    answer = {
        "quantity": 2,
        "confidence": 0.75,
        "probabilities": {"1": 0.25, "2": 0.75},
        "likely_quantities": [2],
        "model_version": "v7",
        "error": "",
    }
    error = {
        "quantity": None,
        "confidence": None,
        "probabilities": {},
        "likely_quantities": [],
        "model_version": "v7",
        "error": "photo is \ud800 empty",
    }
    good, bad = record(PREDICTION, "v7"), record(PhotoError("photo is \ud800 empty"), "v7")
    assert json.loads(write([good], "photo", JSON)) == answer
    assert json.loads(write([good, good], "list", JSON)) == {"predictions": [answer, answer]}
    lines = write([bad, good], "lines", LINES)
    assert lines.endswith(b"\n")
    assert [json.loads(line) for line in lines.splitlines()] == [error, answer]


UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
_texts = st.one_of(st.text(), st.binary().map(lambda data: base64.b64encode(data).decode()))
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["photo", "b64", "columns", "data", "inputs", "instances", "dataframe_split", "x"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
_documents = _values.map(lambda value: json.dumps(value).encode())


@UNHURRIED
@given(
    st.sampled_from(SUPPORTED),
    st.one_of(st.binary(max_size=200), _values.map(lambda value: json.dumps(value).encode())),
)
def test_any_body_is_read_or_refused(media: str, body: bytes) -> None:
    try:
        payload = read(media, body, 5)
    except RequestError as error:
        assert error.status in (400, 413)
        json.loads(error.body())
    else:
        assert len(payload.photos) <= 5


@UNHURRIED
@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(["photo", "list", "lines"]))
def test_any_header_is_understood_or_refused(first: str, second: str, format: Any) -> None:
    assert answer_type(second, format) in (JSON, LINES)
    try:
        assert media_type(first, second) in SUPPORTED
    except RequestError as error:
        assert error.status == 415


@UNHURRIED
@given(st.lists(st.binary(min_size=1), max_size=5))
def test_what_is_encoded_is_read_again(photos: list[bytes]) -> None:
    texts = [base64.b64encode(photo).decode() for photo in photos]
    assert read(JSON, json.dumps({"instances": texts}).encode(), 5).photos == photos
