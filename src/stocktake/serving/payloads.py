"""Request formats: bodies to photos, records to bodies."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.exceptions import HTTPException
from starlette.responses import Response

from stocktake.data.images import PhotoError

RequestFormat = Literal["photo", "list", "lines"]
"""One photo as the body itself, a list of photos in a JSON document, or one photo a line."""
PHOTO_TYPES = ("image/jpeg", "image/png", "image/webp", "application/x-image", "application/octet-stream")
JSON = "application/json"
LINES = "application/jsonlines"
LINES_TYPES = (LINES, "application/x-jsonlines", "application/x-ndjson")
SUPPORTED = (*PHOTO_TYPES, JSON, *LINES_TYPES)


@dataclass(frozen=True)
class Payload:
    """The photos of one request."""

    photos: list[bytes | PhotoError]
    """In order; an error in place of a record that has no photo."""
    format: RequestFormat


def media_type(headers: Mapping[str, str]) -> str:
    """The media type of a body, one of SUPPORTED. Without a content type it is a photo: application/octet-stream.

    Raises:
        HTTPException: 415.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise HTTPException(415, f"content-encoding {encoding[:40]!r} is not supported: send the body as it is")
    media = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if media not in SUPPORTED:
        raise HTTPException(415, f"content-type {media[:40]!r} is not supported: send one of {', '.join(SUPPORTED)}")
    return media


def read(media: str, body: bytes, max_photos: int) -> Payload:
    """The photos of a body.

    Args:
        media: from `media_type`.
        body: of the request.
        max_photos: of a request.

    Raises:
        HTTPException: 400 malformed, 413 too many photos.
    """
    if not body:
        raise HTTPException(400, "the body is empty")
    if media in PHOTO_TYPES:
        return Payload([body], "photo")
    if media == JSON:
        try:
            records = _records(json.loads(body.decode()))
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the JSON cannot be read: {str(error)[:120]}") from None
        _check_number(len(records), max_photos)
        return Payload([_photo(record) for record in records], "list")
    lines = body.removesuffix(b"\n").split(b"\n", max_photos)
    _check_number(len(lines), max_photos)
    return Payload([_line(line) for line in lines], "lines")


def write(records: Sequence[dict[str, Any]], format: RequestFormat) -> Response:
    """The answer: an object for one photo, {"predictions": [...]} for a list, a line a line for lines."""
    if format == "lines":
        return Response(b"".join(_encoded(record) + b"\n" for record in records), media_type=LINES)
    return json_response(records[0] if format == "photo" else {"predictions": records})


def error_response(error: HTTPException) -> Response:
    """A refused request's answer: {"error": reason}."""
    return json_response({"error": error.detail}, error.status_code, error.headers)


def json_response(content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Compact JSON, in ASCII."""
    return Response(_encoded(content), status, headers, JSON)


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _records(content: Any) -> list[Any]:
    """The list of a document as MLflow's or TensorFlow's server takes it."""
    match content:
        case (
            {"instances": list(records)}
            | {"dataframe_records": list(records)}
            | {"inputs": list(records) | {"photo": list(records)}}
        ):
            return records
        case {"dataframe_split": {"columns": list(columns), "data": list(rows)}} if "photo" in columns:
            column = columns.index("photo")
            return [row[column] if isinstance(row, list) and len(row) > column else None for row in rows]
    raise HTTPException(
        400,
        'the JSON must have a list of photos: "instances", "inputs", "dataframe_records", or "dataframe_split" with '
        'the column "photo"',
    )


def _line(line: bytes) -> bytes | PhotoError:
    try:
        return _photo(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return PhotoError("the line is not JSON")


def _photo(record: Any) -> bytes | PhotoError:
    if isinstance(record, dict):
        record = record.get("photo", record.get("b64"))
    if not isinstance(record, str):
        return PhotoError('photo must be base64 text or {"photo": base64 text}')
    try:
        return base64.b64decode("".join(record.split()), validate=True)  # MIME breaks the text into lines
    except ValueError as error:
        return PhotoError(f"photo is not base64: {error}")


def _check_number(photos: int, max_photos: int) -> None:
    if photos > max_photos:
        raise HTTPException(413, f"a request may have {max_photos} photos")
