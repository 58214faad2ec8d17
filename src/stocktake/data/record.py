"""The inventory record of a bin, as the public bucket holds it (`metadata/<id>.json`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LARGEST_RECORD = 10_000_000
"""Bytes. Real records have 0.3 to 20 kB; a larger file is not a record."""


class RecordError(Exception):
    """This record cannot be used; the message is the reason given to the user."""


@dataclass(frozen=True)
class Record:
    """What the inventory says about one bin."""

    quantity: int
    """The label: EXPECTED_QUANTITY."""
    items: tuple[str, ...]
    """Which products are recorded, by their key (ASIN), sorted."""
    flags: tuple[str, ...]
    """record_disagrees: the items' quantities do not sum to EXPECTED_QUANTITY. no_items: a quantity without
    any item."""


def parse_record(data: bytes) -> Record:
    """Read a record. Fields may be missing or null, but not EXPECTED_QUANTITY.

    Raises:
        RecordError: not a JSON object, or EXPECTED_QUANTITY is no whole number from 0 up.
    """
    if len(data) > LARGEST_RECORD:
        raise RecordError(f"record has more than {LARGEST_RECORD} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecordError(f"record is a JSON {type(content).__name__}, not an object")
    quantity = _whole_number(content.get("EXPECTED_QUANTITY"))
    if quantity is None:
        what = f"is {content['EXPECTED_QUANTITY']!r}" if "EXPECTED_QUANTITY" in content else "is missing"
        raise RecordError(f"EXPECTED_QUANTITY {what[:80]}, not a whole number from 0 up")

    recorded = content.get("BIN_FCSKU_DATA")
    items: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    quantities = [_whole_number(item.get("quantity")) if isinstance(item, dict) else None for item in items.values()]
    flags = []
    if sum(part or 0 for part in quantities) != quantity or None in quantities:
        flags.append("record_disagrees")
    if quantity and not items:
        flags.append("no_items")
    return Record(quantity, tuple(sorted(map(_storable, items))), tuple(flags))


def _storable(key: str) -> str:
    """JSON can spell half of a character (a lone surrogate), which no file takes."""
    return key.encode(errors="backslashreplace").decode()


def _whole_number(value: object) -> int | None:
    """3 and 3.0 are; true, "3", 2.5, -1, null and 1e300 are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e6 and value == int(value) else None
