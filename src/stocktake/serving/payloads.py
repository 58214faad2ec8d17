"""Request formats: bodies to photos, predictions to bodies. No sockets, no engine."""

from __future__ import annotations

import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from stocktake.data.images import PhotoError

RequestFormat = Literal["photo", "list", "lines"]
"""One photo as the body itself, a list of photos in a JSON document, or one photo a line."""
PHOTO_TYPES = ("image/jpeg", "image/png", "image/webp", "application/x-image", "application/octet-stream")
JSON = "application/json"
LINES = "application/jsonlines"
LINES_TYPES = (LINES, "application/x-jsonlines", "application/x-ndjson")
SUPPORTED = (*PHOTO_TYPES, JSON, *LINES_TYPES)
CONTAINERS = ("dataframe_split", "dataframe_records", "inputs", "instances")
"""Names of a JSON document's list: as MLflow's and TensorFlow's servers take them."""
PHOTO_KEYS = ("photo", "b64")


class RequestError(Exception):
    """A request that is refused; the message is the reason that the client gets."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}

    def body(self) -> bytes:
        """As the client gets it."""
        return encoded({"error": str(self)})


@dataclass(frozen=True)
class Payload:
    """The photos of one request."""

    photos: list[bytes | PhotoError]
    """In order; an error in place of a record that has no photo."""
    format: RequestFormat


def media_type(content_type: str | None, content_encoding: str | None) -> str:
    """The media type of a body, one of SUPPORTED. Without a content type it is a photo: application/octet-stream.

    Raises:
        RequestError: 415.
    """
    if content_encoding and content_encoding.strip().lower() != "identity":
        raise RequestError(415, f"content-encoding {content_encoding[:40]!r} is not supported: send the body as it is")
    if content_type is None:
        return "application/octet-stream"
    media, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media not in SUPPORTED:
        raise RequestError(415, f"content-type {media[:40]!r} is not supported: send one of {', '.join(SUPPORTED)}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' "') not in ("utf-8", "utf8", "us-ascii"):
            raise RequestError(415, f"charset {value[:40]!r} is not supported: send UTF-8")
    return media


def read(media: str, body: bytes, max_photos: int) -> Payload:
    """The photos of a body.

    Args:
        media: from `media_type`.
        body: of the request.
        max_photos: of a request.

    Raises:
        RequestError: 400 malformed, 413 too many photos.
    """
    if not body:
        raise RequestError(400, "the body is empty")
    if media in PHOTO_TYPES:
        return Payload([body], "photo")
    if media == JSON:
        return Payload([_photo(record) for record in _records(_parsed(body), max_photos)], "list")
    lines = body.removesuffix(b"\n").split(b"\n", max_photos)
    _check_number(len(lines), max_photos)
    return Payload([_line(line.strip(b" \t\r")) for line in lines], "lines")


def answer_type(accept: str | None, format: RequestFormat) -> str:
    """The media type of the answer: as the client asks, else lines for lines and JSON for the rest."""
    accepted = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
    if JSON in accepted:
        return JSON
    return LINES if format == "lines" or any(media in LINES_TYPES for media in accepted) else JSON


def write(records: Sequence[dict[str, Any]], format: RequestFormat, media: str) -> bytes:
    """The answer's body: an object for one photo, {"predictions": [...]} for a list, a line a line for lines."""
    if media == LINES:
        return b"".join(encoded(record) + b"\n" for record in records)
    return encoded(records[0] if format == "photo" else {"predictions": list(records)})


def encoded(content: dict[str, Any]) -> bytes:
    """Compact JSON, in ASCII."""
    return json.dumps(content, separators=(",", ":")).encode()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise RequestError(400, "the JSON is not UTF-8") from None
    except RecursionError:
        raise RequestError(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the JSON cannot be read: {str(error)[:120]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a name twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _records(content: Any, max_photos: int) -> list[Any]:
    names = [name for name in CONTAINERS if name in content] if isinstance(content, dict) else []
    if len(names) != 1:
        raise RequestError(400, f"the JSON must be an object with one of {', '.join(CONTAINERS)}")
    (name,) = names
    records = content[name]
    if name == "dataframe_split":
        records = _photo_column(records)
    elif isinstance(records, dict) and name == "inputs" and "photo" in records:
        records = records["photo"]
        records = [records] if isinstance(records, str) else records
    if not isinstance(records, list):
        raise RequestError(400, f"{name} must be a list of photos")
    _check_number(len(records), max_photos)
    return records


def _photo_column(frame: Any) -> list[Any]:
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


def _line(line: bytes) -> bytes | PhotoError:
    try:
        return _photo(_parsed(line) if line[:1] in (b"{", b'"') else line.decode()) if line else PhotoError("no photo")
    except UnicodeDecodeError:
        return PhotoError("the line is not UTF-8")
    except RequestError as error:
        return PhotoError(str(error))


def _photo(record: Any) -> bytes | PhotoError:
    if isinstance(record, dict):
        record = next((record[key] for key in PHOTO_KEYS if key in record), record)
    if not isinstance(record, str):
        return PhotoError('photo must be base64 text or {"photo": base64 text}')
    try:
        # clients that follow MIME break the text into lines
        return binascii.a2b_base64("".join(record.split()) if "\n" in record else record, strict_mode=True)
    except ValueError as error:
        return PhotoError(f"photo is not base64: {error}")


def _check_number(photos: int, max_photos: int) -> None:
    if photos > max_photos:
        raise RequestError(413, f"a request may have {max_photos} photos")
