"""Records: the quantity is needed, everything else may be missing, and no content ends the program."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stocktake.data.record import LARGEST_RECORD, RecordError, parse_record

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
ANY_JSON = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4)
)


def as_bytes(content: object) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"EXPECTED_QUANTITY": 5, "BIN_FCSKU_DATA": {"B": {"quantity": 3}, "A": {"quantity": 2}}}, (5, ("A", "B"), ())),
        ({"EXPECTED_QUANTITY": 3.0, "BIN_FCSKU_DATA": {"A": {"quantity": 3.0}}}, (3, ("A",), ())),
        ({"EXPECTED_QUANTITY": 0, "BIN_FCSKU_DATA": {}}, (0, (), ())),
        *(
            ({"EXPECTED_QUANTITY": 2, "BIN_FCSKU_DATA": items}, (2, tuple(items), ("record_disagrees",)))
            for items in (
                {"A": {"quantity": 1}},
                {"A": {"quantity": 3}},
                {"A": {"quantity": 2}, "B": {}},
                {"A": {"quantity": "2"}},
                {"A": 2},
            )
        ),
        *(
            ({"EXPECTED_QUANTITY": 2} | items, (2, (), ("record_disagrees", "no_items")))
            for items in ({}, *({"BIN_FCSKU_DATA": items} for items in ({}, None, [], "none", 7)))
        ),
    ],
    ids=str,
)
def test_a_record_is_its_quantity_items_and_flags(content: dict[str, Any], expected: tuple[Any, ...]) -> None:
    read = parse_record(as_bytes(content))
    assert (read.quantity, read.items, read.flags) == expected


@pytest.mark.parametrize(
    "quantity", [None, -1, 2.5, "3", "", True, False, [], {}, 1e300, float("nan"), float("inf"), 10**400]
)
def test_a_quantity_that_is_no_whole_number_is_refused(quantity: object) -> None:
    with pytest.raises(RecordError, match=r"EXPECTED_QUANTITY is .*not a whole number from 0 up"):
        parse_record(as_bytes({"EXPECTED_QUANTITY": quantity}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        (b"[1]", "is a JSON list"),
        (b"null", "is a JSON NoneType"),
        (b"{}", "EXPECTED_QUANTITY is missing"),
        (b" " * (LARGEST_RECORD + 1), "more than"),
    ],
    ids=["empty", "cut", "binary", "deep", "long number", "list", "null", "no quantity", "huge"],
)
def test_what_is_no_record_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse_record(data)


@given(
    ANY_JSON
    | st.builds(
        lambda quantity, items: {"EXPECTED_QUANTITY": quantity, "BIN_FCSKU_DATA": items},
        st.integers(0, 9) | ANY_JSON,
        st.dictionaries(st.text(max_size=8), st.fixed_dictionaries({"quantity": ANY_JSON}) | ANY_JSON) | ANY_JSON,
    )
)
@settings(max_examples=40)
def test_any_json_is_a_record_or_refused(content: Any) -> None:
    try:
        read = parse_record(as_bytes(content))
    except RecordError:
        return
    assert read.quantity == content["EXPECTED_QUANTITY"] >= 0
    assert list(read.items) == sorted(read.items)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    try:
        parse_record(data)
    except RecordError:
        return


def test_half_a_character_in_an_items_key_is_stored_as_text() -> None:
    (key,) = parse_record(rb'{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"B\ud800": {"quantity": 1}}}').items
    assert key.encode().startswith(b"B")  # a lone surrogate could not be written to the manifest
