"""What a request may hold and what an answer looks like: bodies to photos, counts to JSON. No sockets, no engine."""

from __future__ import annotations

import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from stocktake.serving.predictor import Prediction

Form = Literal["one", "list", "lines"]
PHOTO_TYPES = ("image/jpeg", "image/png", "image/webp", "application/x-image", "application/octet-stream")
JSON = "application/json"
LINES = "application/jsonlines"
LINES_TYPES = (LINES, "application/x-jsonlines", "application/x-ndjson")
SUPPORTED = (*PHOTO_TYPES, JSON, *LINES_TYPES)
CONTAINERS = ("dataframe_split", "dataframe_records", "inputs", "instances")
PHOTO_KEYS = ("photo", "b64")
_SHOWN = 40
"""Characters of what a client sent that a reason repeats at most."""


class RequestError(Exception):
    """A request, or a line of one, that is not answered; the message is the reason given to the client."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}

    def document(self) -> dict[str, Any]:
        """As the client gets it."""
        return {"error": {"status": self.status, "reason": str(self)}}


@dataclass(frozen=True)
class Payload:
    """The photos of one request."""

    photos: list[bytes | RequestError]
    """In order. An error stands for a line that holds no photo; other forms have none."""
    form: Form
    """One photo as the body itself, a list of them in a JSON document, or one a line."""


def media_type(content_type: str | None, content_encoding: str | None) -> str:
    """Which of SUPPORTED a body is. None given means a photo: application/octet-stream.

    Raises:
        RequestError: 415.
    """
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise RequestError(415, f"content-encoding {_shown(content_encoding)} is not supported: send the body as it is")
    if content_type is None:
        return "application/octet-stream"
    media, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media not in SUPPORTED:
        raise RequestError(415, f"content-type {_shown(media)} is not supported: send one of {', '.join(SUPPORTED)}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' "') not in ("utf-8", "utf8", "us-ascii"):
            raise RequestError(415, f"charset {_shown(value)} is not supported: send UTF-8")
    return media


def read(media: str, body: bytes, most: int) -> Payload:
    """The photos of a body.

    Args:
        media: as `media_type` says.
        body: of the request.
        most: photos that a request may hold.

    Raises:
        RequestError: 400 malformed, 413 too many photos.
    """
    if not body:
        raise RequestError(400, "the body is empty")
    if media in PHOTO_TYPES:
        return Payload([body], "one")
    if media == JSON:
        return Payload(_listed(_parsed(body), most), "list")
    lines = body.removesuffix(b"\n").split(b"\n", most)
    _bound(len(lines), most)
    return Payload([_line(line.strip(b" \t\r")) for line in lines], "lines")


def accepted(accept: str | None, form: Form) -> str:
    """The media type of the answer to a request of this form: JSON or LINES, as the client prefers.

    Raises:
        RequestError: 406, it takes neither.
    """
    usual, other = (LINES, JSON) if form == "lines" else (JSON, LINES)
    if not accept or not accept.strip():
        return usual
    best, chosen = 0.0, None
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = _weight(parameters)
        if weight <= best:
            continue
        if media in ("*/*", "application/*", usual) or (usual == LINES and media in LINES_TYPES):
            best, chosen = weight, usual
        elif media == other or media in LINES_TYPES:
            best, chosen = weight, other
    if chosen is None:
        raise RequestError(406, f"accept {_shown(accept)} cannot be met: answers are {JSON} or {LINES}")
    return chosen


def write(answers: Sequence[Prediction | RequestError], form: Form, media: str) -> bytes:
    """The answer's body: an object for one photo, {"predictions": [...]} for a list, a line a line for lines."""
    documents = [document(answer) for answer in answers]
    if media == LINES:
        return b"".join(encoded(one) + b"\n" for one in documents)
    return encoded(documents[0] if form == "one" else {"predictions": documents})


def document(answer: Prediction | RequestError) -> dict[str, Any]:
    """One answer, ready for JSON."""
    if isinstance(answer, RequestError):
        return answer.document()
    return {
        "quantity": answer.quantity,
        "confidence": answer.confidence,
        "probabilities": {str(quantity): share for quantity, share in answer.probabilities.items()},
        "likely_quantities": list(answer.likely_quantities),
        "model_version": answer.model_version,
    }


def encoded(content: dict[str, Any]) -> bytes:
    """Compact JSON, in ASCII."""
    return json.dumps(content, separators=(",", ":")).encode()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise RequestError(400, "the JSON is not UTF-8") from None
    except RecursionError:
        raise RequestError(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the JSON cannot be read: {_shown(str(error), 120)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values under one name: which of them is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice in an object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _listed(content: Any, most: int) -> list[bytes | RequestError]:
    given = [name for name in CONTAINERS if name in content] if isinstance(content, dict) else []
    if len(given) != 1:
        raise RequestError(400, f"the JSON must be an object with one of {', '.join(CONTAINERS)}")
    (name,) = given
    records = content[name]
    if name == "dataframe_split":
        records = _column(records)
    elif isinstance(records, dict) and name == "inputs":
        records = _only_photos(records)
    if not isinstance(records, list):
        raise RequestError(400, f"{name} must be a list, not {_kind(records)}")
    _bound(len(records), most)
    return [_photo(record, f"{name}, photo {number}") for number, record in enumerate(records, 1)]


def _column(frame: Any) -> list[Any]:
    columns, rows = (frame.get("columns"), frame.get("data")) if isinstance(frame, dict) else (None, None)
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise RequestError(400, "dataframe_split must be an object with the lists columns and data")
    if columns.count("photo") != 1:
        raise RequestError(400, "dataframe_split must have the column photo, once")
    place = columns.index("photo")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestError(400, f"dataframe_split, row {number} must be a list of {len(columns)} values")
    return [row[place] for row in rows]


def _only_photos(columns: dict[str, Any]) -> Any:
    if "photo" not in columns:
        raise RequestError(400, "inputs must be a list, or an object with photo")
    photos = columns["photo"]
    return [photos] if isinstance(photos, str) else photos


def _line(line: bytes) -> bytes | RequestError:
    try:
        record = _parsed(line) if line[:1] in (b"{", b'"') else line.decode()
        return _photo(record, "the line") if record else RequestError(400, "the line is empty")
    except UnicodeDecodeError:
        return RequestError(400, "the line is not UTF-8")
    except RequestError as error:
        return error


def _photo(record: Any, where: str) -> bytes:
    if isinstance(record, dict):
        record = next((record[key] for key in PHOTO_KEYS if key in record), record)
    if not isinstance(record, str):
        raise RequestError(400, f'{where} must be base64 text or {{"photo": base64 text}}, not {_kind(record)}')
    try:
        # clients that follow MIME break the text into lines
        return binascii.a2b_base64("".join(record.split()) if "\n" in record else record, strict_mode=True)
    except ValueError as error:
        raise RequestError(400, f"{where} is not base64: {error}") from None


def _bound(count: int, most: int) -> None:
    if count > most:
        raise RequestError(413, f"a request may hold {most} photos")


def _weight(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(text: str, most: int = _SHOWN) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")
