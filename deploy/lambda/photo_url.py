"""Fetch a photo from a URL that somebody else chose, without reaching what only this function can reach.

The host is resolved once, every address is checked, and the connection goes to the checked address: a name that
resolves otherwise a moment later (DNS rebinding) changes nothing. Each redirect is checked like the first URL.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)


class PhotoUrlError(Exception):
    """A photo that cannot or must not be fetched."""

    def __init__(self, message: str, status: int = 400) -> None:
        """status: HTTP status for the caller: 400 their URL, 413 too large, 502 and 504 the other server."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class FetchLimits:
    """What a fetch may reach and use."""

    max_bytes: int = 5 * 2**20
    """Of a photo. SageMaker takes 6 MB a request."""
    seconds: float = 5.0
    """For everything: names, connections, redirects, body."""
    redirects: int = 3
    allow_http: bool = False
    """Also plain http."""
    allow_private: bool = False
    """Also addresses that are not public, and any port: for tests and for a VPC of one's own."""


def fetch_photo(url: str, limits: FetchLimits) -> bytes:
    """Fetch the bytes behind a URL.

    Returns:
        The body, at most `max_bytes` long; nothing is said about its content.

    Raises:
        PhotoUrlError: the URL is not allowed, or its server does not answer with a body within the limits.
    """
    deadline = time.monotonic() + limits.seconds
    for _ in range(limits.redirects + 1):
        parts = _checked_url(url, limits)
        with _request(parts, limits, deadline) as response:
            if response.status not in _REDIRECTS:
                body = _body(response, parts.hostname or "", limits)
                _left(deadline, parts.hostname or "")  # a connection that was cut looks like the end of an answer
                return body
            location = response.getheader("Location")
        if not location:
            raise PhotoUrlError(f"{parts.hostname} redirects without saying where", 502)
        url = urljoin(url, location)
    raise PhotoUrlError(f"more than {limits.redirects} redirects", 502)


def _checked_url(url: str, limits: FetchLimits) -> SplitResult:
    if len(url) > 2048 or any(ord(character) <= 32 or ord(character) == 127 for character in url):
        raise PhotoUrlError("url must have at most 2048 characters and no spaces or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PhotoUrlError(f"url cannot be read: {error}") from None
    schemes = ("https", "http") if limits.allow_http else ("https",)
    if parts.scheme not in schemes:
        raise PhotoUrlError(f"url must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if not parts.hostname:
        raise PhotoUrlError("url has no host")
    if parts.username is not None or parts.password is not None:
        raise PhotoUrlError("url must not hold a user name or password")
    if port not in (None, 443 if parts.scheme == "https" else 80) and not limits.allow_private:
        raise PhotoUrlError(f"port {port} is not allowed: {parts.scheme}'s own port only")
    return parts


def _resolve(host: str, port: int, limits: FetchLimits) -> str:
    """An address of the host. Decimal, octal and hexadecimal forms of an address are resolved like names, then checked.

    Raises:
        PhotoUrlError: there is none, or one of them is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise PhotoUrlError(f"{host} has no address") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not limits.allow_private and not is_public(address):
            raise PhotoUrlError(f"{host} is not a public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, also when it carries another one inside.

    Refused: private, loopback, link-local (instance metadata), shared, multicast, reserved and unspecified ranges, and
    IPv6 addresses that embed any of those (mapped, 6to4, Teredo, NAT64).
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if int(ip) >> 32 == 0:  # ::a.b.c.d, long deprecated, still understood by some
            return False
        if any(embedded is not None and not is_public(str(embedded)) for embedded in inner):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


@contextmanager
def _request(parts: SplitResult, limits: FetchLimits, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """The answer to GET. At the deadline the connection is cut, however slowly the server keeps it busy."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolve(host, port, limits)
    try:
        plain = socket.create_connection((address, port), timeout=_left(deadline, host))
        cut = threading.Timer(_left(deadline, host), _shut_down, [plain])
        cut.start()
        try:
            yield _get(parts, host, port, plain)
        finally:
            cut.cancel()
            plain.close()
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise PhotoUrlError(f"{host} takes too long", 504) from None
        raise PhotoUrlError(f"{host} cannot be reached or is no web server ({type(error).__name__})", 502) from None


def _get(parts: SplitResult, host: str, port: int, plain: socket.socket) -> http.client.HTTPResponse:
    """Ask over a connection to the checked address, in the name of the host: its Host header, its certificate."""
    connection = http.client.HTTPConnection(host, port)
    is_tls = parts.scheme == "https"
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if is_tls else plain
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", path, headers={"User-Agent": "stocktake", "Accept-Encoding": "identity"})
    return connection.getresponse()


def _shut_down(plain: socket.socket) -> None:
    with suppress(OSError):
        plain.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, host: str, limits: FetchLimits) -> bytes:
    if response.status != 200:
        raise PhotoUrlError(f"{host} answers {response.status}", 502)
    if (response.getheader("Content-Encoding") or "identity") != "identity":
        raise PhotoUrlError(f"{host} sends a compressed body that was not asked for", 502)
    body = b"" if (response.length or 0) > limits.max_bytes else response.read(limits.max_bytes + 1)
    if (response.length or 0) > limits.max_bytes or len(body) > limits.max_bytes:
        raise PhotoUrlError(f"the photo has more than {limits.max_bytes} bytes", 413)
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    return body


def _left(deadline: float, host: str) -> float:
    """Seconds until the deadline."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise PhotoUrlError(f"{host} takes too long", 504)
    return seconds
