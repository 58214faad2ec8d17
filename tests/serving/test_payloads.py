from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from stocktake.data.images import PhotoError
from stocktake.serving.payloads import JSON, LINES, SUPPORTED, media_type, read, write
from stocktake.serving.predictor import Prediction, record

ONE, TWO = b"first photo", b"\x00second"
A, B = base64.b64encode(ONE).decode(), base64.b64encode(TWO).decode()


def encoded(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "content",
    [
        {"dataframe_split": {"index": [0, 1], "columns": ["bin", "photo"], "data": [["x", A], [1, B]]}},
        {"dataframe_records": [{"photo": A}, {"photo": B, "bin": 7}]},
        {"inputs": [A, B]},
        {"inputs": {"photo": [A, B]}, "params": {}},
        {"instances": [{"photo": A}, {"b64": B}]},
        {"instances": [A[:4] + "\n" + A[4:] + "\n", B]},
    ],
    ids=["split", "records", "list", "columns", "instances", "mime"],
)
def test_every_form_of_json_has_the_photos(content: dict[str, Any]) -> None:
    payload = read(JSON, encoded(content), 2)
    assert (payload.photos, payload.format) == ([ONE, TWO], "list")


def test_a_bad_line_is_an_error_in_its_place() -> None:
    body = "\n".join([json.dumps({"photo": A}), "{", "", json.dumps(B), A, "[1]", '{"photo": 1}']) + "\r\n"
    photos = read("application/x-ndjson", body.encode() + b"\xff\n" + b"[" * 100_000, 9).photos
    assert [photo for photo in photos if isinstance(photo, bytes)] == [ONE, TWO]
    assert [isinstance(photo, bytes) for photo in photos] == [True, False, False, True, *[False] * 5]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"null",
        b"{}",
        b'{"inputs": [' + b"1" * 5000 + b"]}",
        b'{"inputs": 7}',
        b'{"inputs": {"image": []}}',
        b'{"instances": {"photo": []}}',
        b'{"dataframe_split": []}',
        b'{"dataframe_split": {"columns": ["image"], "data": []}}',
        b"[" * 3_000_000,
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_malformed_json_is_refused_with_a_short_reason(body: bytes) -> None:
    with pytest.raises(HTTPException) as caught:
        read(JSON, body, 8)
    assert caught.value.status_code == 400
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize("bad", [None, {"image": "AAAA"}, "A", "AA=A", "AA*AA", "\ud800", [["AAAA"]], float("nan")])
def test_a_bad_record_is_an_error_in_its_place(bad: Any) -> None:
    for content in ({"instances": [A, bad, B]}, {"dataframe_split": {"columns": ["photo"], "data": [[A], bad, [B]]}}):
        first, second, third = read(JSON, encoded(content), 3).photos
        assert (first, third) == (ONE, TWO)
        assert isinstance(second, PhotoError)


@pytest.mark.parametrize(("media", "body"), [(JSON, encoded({"inputs": [A] * 3})), (LINES, b"\n" * 4_000_000)])
def test_too_many_photos_are_refused(media: str, body: bytes) -> None:
    with pytest.raises(HTTPException, match="2 photos") as caught:
        read(media, body, 2)
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("headers", "media"),
    [
        ({"content-type": "IMAGE/PNG; name=x", "content-encoding": "identity"}, "image/png"),
        ({"content-type": "application/json; charset=UTF-8"}, JSON),
        ({}, "application/octet-stream"),
        ({"content-type": "text/csv"}, None),
        ({"content-type": ""}, None),
        ({"content-type": "multipart/form-data; boundary=x"}, None),
        ({"content-type": "image/jpeg", "content-encoding": "gzip"}, None),
    ],
)
def test_the_media_type_is_a_known_one(headers: dict[str, str], media: str | None) -> None:
    if media:
        assert media_type(headers) == media
        return
    with pytest.raises(HTTPException) as caught:
        media_type(headers)
    assert caught.value.status_code == 415


def test_answers_are_an_object_a_list_or_lines() -> None:
    answer = {
        "quantity": 2,
        "confidence": 0.75,
        "probabilities": {"1": 0.25, "2": 0.75},
        "likely_quantities": [2],
        "model_version": "v7",
        "error": "",
    }
    error = {"quantity": None, "confidence": None, "probabilities": {}, "likely_quantities": []}
    error |= {"model_version": "v7", "error": "photo is \ud800 empty"}
    good = record(Prediction(2, 0.75, {1: 0.25, 2: 0.75}, (2,), "v7"), "v7")
    bad = record(PhotoError("photo is \ud800 empty"), "v7")
    assert json.loads(bytes(write([good], "photo").body)) == answer
    assert json.loads(bytes(write([good, good], "list").body)) == {"predictions": [answer, answer]}
    lines = bytes(write([bad, good], "lines").body)
    assert lines.endswith(b"\n")
    assert [json.loads(line) for line in lines.splitlines()] == [error, answer]


_texts = st.one_of(st.text(), st.binary().map(lambda data: base64.b64encode(data).decode()))
_names = st.sampled_from(["photo", "b64", "columns", "data", "inputs", "instances", "dataframe_split", "x"])
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_names, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SUPPORTED), st.one_of(st.binary(max_size=200), _values.map(encoded)))
def test_any_body_is_read_or_refused(media: str, body: bytes) -> None:
    try:
        payload = read(media, body, 5)
    except HTTPException as error:
        assert error.status_code in (400, 413)
        json.dumps(error.detail)
    else:
        assert len(payload.photos) <= 5
