"""The server's interface as an OpenAPI document."""

from __future__ import annotations

from typing import Any

from stocktake.serving.payloads import JSON, LINES, LINES_TYPES, PHOTO_TYPES

_TEXT = {"type": "string", "format": "byte", "minLength": 4, "description": "the photo in base64"}
_RECORD = {
    "oneOf": [
        _TEXT,
        {"type": "object", "properties": {"photo": _TEXT}, "required": ["photo"]},
        {"type": "object", "properties": {"b64": _TEXT}, "required": ["b64"], "not": {"required": ["photo"]}},
    ]
}
_RECORDS = {"type": "array", "items": _RECORD}
_SPLIT = {
    "type": "object",
    "required": ["columns", "data"],
    "properties": {
        "columns": {"type": "array", "items": {"const": "photo"}, "minItems": 1, "maxItems": 1},
        "data": {"type": "array", "items": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 1}},
    },
}
_FORMS = {"dataframe_split": _SPLIT, "dataframe_records": _RECORDS, "inputs": _RECORDS, "instances": _RECORDS}
_COUNT = {
    "type": "object",
    "required": ["quantity", "confidence", "probabilities", "likely_quantities", "model_version"],
    "properties": {
        "quantity": {"type": "integer"},
        "confidence": {"type": "number", "description": "calibrated probability of the quantity"},
        "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
        "likely_quantities": {"type": "array", "items": {"type": "integer"}, "description": "the conformal set"},
        "model_version": {"type": "string"},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["status", "reason"],
            "properties": {"status": {"type": "integer"}, "reason": {"type": "string"}},
        }
    },
}
_PREDICTIONS = {
    "type": "object",
    "required": ["predictions"],
    "properties": {"predictions": {"type": "array", "items": {"anyOf": [_COUNT, _ERROR]}}},
}
_REASONS = {
    400: "malformed",
    406: "no such answer",
    408: "the body came too slowly",
    413: "too large, or too many photos",
    415: "unsupported media type",
    422: "a photo cannot be used",
    500: "the server failed",
    503: "busy or ending: try again later",
}


def document(version: str) -> dict[str, Any]:
    """Of a server whose model has this version."""
    answers = {"oneOf": [_COUNT, _PREDICTIONS]}
    lines = {LINES: {"schema": {"type": "string"}}}
    bodies: dict[str, Any] = {media: {"schema": {"type": "string", "format": "binary"}} for media in PHOTO_TYPES}
    one_form = [{"type": "object", "properties": {name: form}, "required": [name]} for name, form in _FORMS.items()]
    bodies[JSON] = {"schema": {"anyOf": one_form}}
    bodies |= {media: {"schema": {"type": "string"}} for media in LINES_TYPES}
    refusals = {str(status): _answer(reason, _ERROR) for status, reason in _REASONS.items()}
    counting = {
        "summary": "Prediction the items in photos",
        "requestBody": {"required": True, "content": bodies},
        "responses": {"200": {"description": "counts", "content": {JSON: {"schema": answers}, **lines}}, **refusals},
    }
    ping = {
        "summary": "Whether the server answers",
        "responses": {"200": _answer("well", {"type": "object"}), "503": _answer("ending", _ERROR)},
    }
    metrics = {
        "summary": "Figures for Prometheus",
        "responses": {"200": {"description": "figures", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "stocktake", "version": version},
        "paths": {"/ping": {"get": ping}, "/invocations": {"post": counting}, "/metrics": {"get": metrics}},
    }


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}
