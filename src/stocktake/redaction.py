"""Secrets inside addresses and messages are not shown."""

import re

_MODEL_PAGE = re.compile(r"https?://[\w.-]+(:\d{1,5})?/([^\s\"'@#]*/)?#/models/[^\s\"'@]+@[\w-]+$", re.IGNORECASE)
"""MLflow's page of a model's alias: `http://HOST:PORT/#/models/NAME@ALIAS`."""
_SECRET = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]{0,250}(?:pass|pwd|token|secret|key|sig|auth|credential)[\w.-]{0,250}=)"
    r"(?:\"[^\"]*\"|'[^']*'|[^&;,\s]+)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\S+")


def redact(text: str) -> str:
    """Replace user names, passwords and tokens in URIs and `name=value` pairs by `***`.

    A password may hold any character but white space. A name is secret if it contains pass, pwd, token, secret, key,
    sig, auth or credential. Where a URI can be read in two ways, the one that hides more is taken, but for the address
    of MLflow's page of a model's alias.
    """
    return _SECRET.sub(r"\g<name>***", _replace_user(text, "***@"))


def without_credentials(uri: str) -> str:
    """The URI as it may be kept on disk: without user name, password and tokens.

    What is left can be used with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """
    return _SECRET.sub("", _replace_user(uri, ""))


def _replace_user(text: str, replacement: str) -> str:
    def replace(word: re.Match[str]) -> str:
        scheme, mark, rest = word[0].partition("://")
        user, _, host = rest.rpartition("@")
        return scheme + mark + replacement + host if user and not _MODEL_PAGE.match(word[0]) else word[0]

    return _WORD.sub(replace, text)
