"""Secrets inside addresses and messages are not shown."""

import re

_USER = re.compile(r"(?<=://)[^\s\"']+@")
_PAGE = re.compile(r"https?://[\w.-]+(:\d{1,5})?[/?#][^\s\"']*@[^\s.:@\"']*$", re.IGNORECASE)
"""`http://HOST:PORT/...@...`, where what follows the `@` is not like a host with a domain or a port."""
_SECRET = re.compile(
    r"(?P<before>^|[?&;,\s])(?P<name>[\w.-]*(?:pass|pwd|token|secret|key|sig|auth|credential)[\w.-]*=)[^&;,\s]+",
    re.IGNORECASE,
)
_WORD = re.compile(r"\S+")


def redact(text: str) -> str:
    """Replace user names, passwords and tokens in URIs and `name=value` pairs by `***`.

    A password may hold `/` and `@`. A name is secret if it contains pass, pwd, token, secret, key, sig, auth or
    credential. Where a URI can be read in two ways, the one that hides more is taken, but for the address of a web
    page with an `@` in its path.
    """
    return _SECRET.sub(r"\g<before>\g<name>***", _replace_user(text, "***@"))


def without_credentials(uri: str) -> str:
    """The URI as it may be kept on disk: without user name, password and tokens.

    What is left can be used with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """
    return _SECRET.sub(r"\g<before>", _replace_user(uri, ""))


def _replace_user(text: str, replacement: str) -> str:
    def replace(word: re.Match[str]) -> str:
        return word[0] if _PAGE.match(word[0]) else _USER.sub(replacement, word[0])

    return _WORD.sub(replace, text)
