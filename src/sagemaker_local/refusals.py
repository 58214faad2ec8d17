"""Errors in the words of AWS's protocols, for requests that no operation answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from xml.sax.saxutils import escape


def error_response(request_headers: Mapping[str, str], code: str, message: str) -> tuple[dict[str, str], str]:
    """Return headers and body of an error, so that the client of the called service shows code and message.

    Services with the JSON protocol (SageMaker, CloudWatch Logs) are known by the request's X-Amz-Target.
    """
    if "X-Amz-Target" in request_headers:
        kind, body = "application/x-amz-json-1.1", json.dumps({"__type": code, "message": message})
    else:
        kind = "text/xml"
        body = f"<ErrorResponse><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error></ErrorResponse>"
    return {"Content-Type": kind, "x-amzn-ErrorType": code}, body
