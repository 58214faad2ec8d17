"""Who may call: nobody without a key of this emulator, and no web page. A call can start programs on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from moto.iam.models import iam_backends
from moto.sts.models import sts_backends
from werkzeug.datastructures import EnvironHeaders

from sagemaker_local.refusals import error_response

_SIGNER = re.compile(r"(?:AWS4-HMAC-SHA256 Credential=|AWS )([^/:,\s]+)[/:]")


class AuthenticatedApplication:
    """WSGI middleware that refuses requests with an `Origin` header, unsigned ones, and those of unknown keys.

    The access key is what has to be known: it is random and new at each start. Signatures are not recomputed.
    """

    def __init__(self, application: Any, access_key: str) -> None:
        self._application = application
        self._access_key = access_key

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Pass the request on to the application, or answer it with 403."""
        key = access_key_of(environ.get("HTTP_AUTHORIZATION", ""), environ.get("QUERY_STRING", ""))
        if "HTTP_ORIGIN" in environ:
            refusal = ("AccessDenied", "requests of web pages (with an Origin header) are refused")
        elif key is None:
            refusal = ("MissingAuthenticationToken", "Missing Authentication Token")
        elif key != self._access_key and not _is_issued(key):
            refusal = ("UnrecognizedClientException", "The security token included in the request is invalid.")
        else:
            answer: Iterable[bytes] = self._application(environ, start_response)
            return answer
        headers, body = error_response(dict(EnvironHeaders(environ)), *refusal)
        start_response("403 Forbidden", [*headers.items(), ("Content-Length", str(len(body.encode())))])
        return [body.encode()]


def access_key_of(authorization: str, query: str = "") -> str | None:
    """Return the access key of a signed request, from its `Authorization` header or its presigned URL's query."""
    signer = _SIGNER.match(authorization)
    if signer is not None:
        return signer[1]
    parameters = parse_qs(query)
    for name in ("X-Amz-Credential", "AWSAccessKeyId"):
        if name in parameters:
            return parameters[name][0].partition("/")[0]
    return None


def _is_issued(key: str) -> bool:
    """Return True for keys of users, and of sessions of roles, that were made in this emulator."""
    users = (user for account in iam_backends.values() for iam in account.values() for user in iam.users.values())
    sessions = (role for account in sts_backends.values() for sts in account.values() for role in sts.assumed_roles)
    keys = {credentials.access_key_id for user in users for credentials in user.access_keys}
    return key in keys | {session.access_key_id for session in sessions}
