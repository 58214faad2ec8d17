"""Attacks on the fetching of a photo from a URL that somebody else chose."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "lambda"))

from photo_url import FetchLimits, PhotoUrlError, fetch_photo, is_public

PHOTO = b"\xff\xd8\xff" + bytes(range(256)) * 100
LOCAL = FetchLimits(allow_http=True, allow_private=True, seconds=2, max_bytes=100_000)
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A web server on loopback; yields its address and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            paths.append(self.path)
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, body: bytes = PHOTO, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def refused(url: str, limits: FetchLimits) -> int:
    """The status with which a URL is refused."""
    with pytest.raises(PhotoUrlError) as error:
        fetch_photo(url, limits)
    return error.value.status


def test_a_photo_is_fetched() -> None:
    with serving(send) as (address, paths):
        assert fetch_photo(f"{address}/bins/1.jpg?size=2", LOCAL) == PHOTO
    assert paths == ["/bins/1.jpg?size=2"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/1.jpg",
        "ftp://example.com/1.jpg",
        "file:///etc/passwd",
        "gopher://example.com/",
        "//example.com/1.jpg",
        "example.com/1.jpg",
        "https://",
        "https:///1.jpg",
        "https://user:secret@example.com/1.jpg",
        "https://example.com:22/",
        "https://example.com:99999/",
        "https://[::1",
        "https://exam ple.com/",
        "https://example.com/\r\nHost: inside",
        "https://example.com/" + "a" * 3000,
    ],
)
def test_a_url_of_another_form_is_refused_before_anything_is_asked(url: str) -> None:
    assert refused(url, FetchLimits()) == 400


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",  # 127.0.0.1 in decimal
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",  # instance metadata
        "169.254.170.2",  # container credentials
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",  # NAT64 of 127.0.0.1
        "[2002:7f00:1::]",  # 6to4 of 127.0.0.1
        "[fe80::1]",
        "[fd00:ec2::254]",  # instance metadata over IPv6
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "127.0.0.1.",
    ],
)
def test_an_address_that_is_not_public_is_refused(host: str) -> None:
    limits = FetchLimits(seconds=2)
    assert refused(f"https://{host}/latest/meta-data", limits) == 400


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert not is_public("not an address")


def test_a_name_with_one_private_address_among_its_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("93.184.215.14", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert refused("https://bins.example/1.jpg", FetchLimits()) == 400


def test_a_name_that_resolves_otherwise_the_second_time_is_reached_at_the_first_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(send) as (address, paths):
        port = int(address.rpartition(":")[2])
        answers = iter(["127.0.0.1", "192.0.2.1"])

        def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host if host[0].isdigit() else next(answers), port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        assert fetch_photo(f"http://bins.example:{port}/1.jpg", LOCAL) == PHOTO
        assert paths == ["/1.jpg"]
        assert next(answers) == "192.0.2.1"  # the name was asked for once


def test_a_redirect_to_what_is_not_allowed_is_refused() -> None:
    limits = FetchLimits(allow_http=True, allow_private=True, seconds=2)
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/", "//user:secret@127.0.0.1/"):
        with serving(lambda handler, to=target: send(handler, b"", 302, Location=to)) as (address, _):
            assert refused(address, limits) == 400


def test_a_redirect_to_a_private_address_is_checked_like_the_first_url(monkeypatch: pytest.MonkeyPatch) -> None:
    import photo_url

    with serving(lambda handler: send(handler, b"", 301, Location="https://169.254.169.254/")) as (address, paths):
        port = address.rpartition(":")[2]
        public = photo_url.is_public
        monkeypatch.setattr(photo_url, "is_public", lambda ip: ip == "127.0.0.1" or public(ip))
        monkeypatch.setattr(photo_url, "_checked_url", lambda url, limits: photo_url.urlsplit(url))
        assert refused(f"http://127.0.0.1:{port}/", FetchLimits(allow_http=True, seconds=2)) == 400
        assert paths == ["/"]


def test_redirects_are_followed_and_counted() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        left = int(handler.path.strip("/"))
        if left:
            send(handler, b"", 307, Location=f"/{left - 1}")
        else:
            send(handler)

    with serving(answer) as (address, paths):
        assert fetch_photo(f"{address}/3", LOCAL) == PHOTO
        assert refused(f"{address}/4", LOCAL) == 502
    assert paths == ["/3", "/2", "/1", "/0", "/4", "/3", "/2", "/1"]


def test_a_body_that_is_too_large_by_its_own_word_is_not_read() -> None:
    with serving(lambda handler: send(handler, b"", Content_Length=str(10**12))) as (address, _):
        assert refused(address, LOCAL) == 413


def test_a_body_that_never_ends_is_cut_at_the_limit() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            handler.close_connection = True

    with serving(answer) as (address, _):
        assert refused(address, LOCAL) == 413


def test_a_compressed_body_is_refused() -> None:
    with serving(lambda handler: send(handler, Content_Encoding="gzip")) as (address, _):
        assert refused(address, LOCAL) == 502


@pytest.mark.parametrize("part", ["status line", "headers", "body"])
def test_a_server_that_sends_ever_so_slowly_is_cut_off(part: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        beginning = {"status line": b"HTTP/1.1 ", "headers": b"HTTP/1.1 200 OK\r\nX: "}
        handler.wfile.write(beginning.get(part, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"))
        try:
            for _ in range(100):
                handler.wfile.write(b"1")
                handler.wfile.flush()
                time.sleep(0.1)
        except OSError:
            handler.close_connection = True

    limits = FetchLimits(allow_http=True, allow_private=True, seconds=0.8)
    with serving(answer) as (address, _):
        began = time.monotonic()
        assert refused(address, limits) == 504
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: send(handler, status=404),
        lambda handler: send(handler, b"", status=302),
        lambda handler: send(handler, b"short", Content_Length="1000"),
        lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
    ],
    ids=["404", "redirect to nowhere", "ends early", "no web server"],
)
def test_an_answer_that_is_no_photo_is_the_other_servers_fault(answer: Answer) -> None:
    def once(handler: BaseHTTPRequestHandler) -> None:
        answer(handler)
        handler.close_connection = True

    with serving(once) as (address, _):
        assert refused(address, LOCAL) == 502


def test_a_certificate_of_another_host_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        limits = FetchLimits(allow_private=True, seconds=1)
        assert refused(f"https://127.0.0.1:{plain.getsockname()[1]}/", limits) in (502, 504)
