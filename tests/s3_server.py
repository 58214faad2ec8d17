"""A static S3 in one process: GET, HEAD, ListObjectsV2, anonymous, over a folder; with faults by schedule.

    python tests/s3_server.py FOLDER [--bucket bins] [--faults '[{"key": "^bin-images/", "do": "503", "times": 2}]']

Prints its port. A fault's `do` is one of 403, 503, reset, truncate, corrupt, stale_etag, slow or hang; it applies to
the first `times` requests of each key that its `key` (a regular expression) is found in. GET /_seen
answers with the requests so far.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import httptools
import uvloop

_PAGE = 1000
_SLOW = 0.3
_EPOCH = 1_400_000_000


class StaticS3:
    """The objects, the faults, and what was asked."""

    def __init__(self, folder: Path, bucket: str, faults: list[dict[str, Any]], page: int, delay: float = 0) -> None:
        self.bucket = bucket
        self.faults = faults
        self.page = page
        self.delay = delay
        self.requests: Counter[str] = Counter()
        self.authorized = 0
        self.authorization = ""
        self.paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.keys = sorted(self.paths)
        self.content = cache(self._content)
        """Bytes and ETag by key; kept, so that the disk is no part of a measurement."""

    def _content(self, key: str) -> tuple[bytes, str]:
        data = self.paths[key].read_bytes()
        return data, hashlib.md5(data).hexdigest()

    def fault(self, key: str) -> str | None:
        for rule in self.faults:
            if re.search(rule["key"], key) and self.requests[key] <= rule.get("times", 1):
                return str(rule["do"])
        return None

    def listing(self, query: dict[str, list[str]]) -> bytes:
        prefix, token = (query.get(name, [""])[0] for name in ("prefix", "continuation-token"))
        begin = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, token))
        page = [key for key in self.keys[begin : begin + self.page + 1] if key.startswith(prefix)]
        keys, is_truncated = page[: self.page], len(page) > self.page
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2014-05-13T16:53:20.000Z</LastModified>"
            f"<ETag>&quot;{self.content(key)[1]}&quot;</ETag><Size>{len(self.content(key)[0])}</Size></Contents>"
            for key in keys
        )
        more = f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>" if is_truncated else ""
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{more}{entries}</ListBucketResult>"
        ).encode()


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, store: StaticS3) -> None:
        self.store = store
        self.headers: dict[str, str] = {}
        self.url = b""
        self.method = ""
        self.answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers, self.url = {}, b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_message_complete(self) -> None:
        parts = urlsplit(self.url.decode())
        self.method = self.parser.get_method().decode()
        store = self.store
        if parts.path == "/_seen":
            seen = {"requests": store.requests, "authorized": store.authorized, "authorization": store.authorization}
            self.answer(200, json.dumps(seen).encode())
            return
        store.authorized += "authorization" in self.headers
        store.authorization = self.headers.get("authorization", store.authorization)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != store.bucket:
            self.error(404, "NoSuchBucket")
            return
        if not key:
            store.requests["LIST"] += 1
            self.answer(200, store.listing(parse_qs(parts.query)))
            return
        store.requests[key] += 1
        fault = store.fault(key)
        if store.delay or fault in ("slow", "hang"):
            wait = 3600 if fault == "hang" else _SLOW if fault == "slow" else store.delay
            self.answering = asyncio.get_running_loop().create_task(self.later(wait, key, fault))
        else:
            self.give(key, fault)

    async def later(self, seconds: float, key: str, fault: str | None) -> None:
        await asyncio.sleep(seconds)
        self.give(key, fault)

    def give(self, key: str, fault: str | None) -> None:
        if fault == "reset":
            self.transport.abort()
        elif fault in ("403", "503"):
            self.error(int(fault), "AccessDenied" if fault == "403" else "SlowDown")
        elif key not in self.store.paths:
            self.error(404, "NoSuchKey")
        else:
            data, etag = self.store.content(key)
            if fault == "corrupt":
                data = bytes(byte ^ 1 for byte in data)
            if fault == "stale_etag":
                etag = "0" * 32
            headers = f'ETag: "{etag}"\r\nLast-Modified: {formatdate(_EPOCH, usegmt=True)}\r\nAccept-Ranges: bytes\r\n'
            if "if-modified-since" in self.headers and fault is None:
                self.answer(304, b"", headers)
            elif "range" in self.headers and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["range"])):
                low, high = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers += f"Content-Range: bytes {low}-{high}/{len(data)}\r\n"
                self.answer(206, data[low : high + 1], headers)
            elif fault == "truncate":
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode()
                self.transport.write(head + data[: len(data) // 2])
                self.transport.close()
            else:
                self.answer(200, data, headers)

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def answer(self, status: int, body: bytes, headers: str = "") -> None:
        start = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
        self.transport.write(start if self.method == "HEAD" else start + body)


@dataclass(frozen=True)
class Server:
    """A running StaticS3."""

    url: str
    pid: int

    def seen(self) -> dict[str, int]:
        """How often each key was asked for; LIST counts pages."""
        return dict(self._ask()["requests"])

    def authorized(self) -> int:
        """How many requests carried an Authorization header."""
        return int(self._ask()["authorized"])

    def authorization(self) -> str:
        """The last one of these headers."""
        return str(self._ask()["authorization"])

    def _ask(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/_seen", timeout=60) as answer:
            return dict(json.load(answer))


@contextmanager
def serve(
    folder: Path,
    bucket: str = "bins",
    faults: list[dict[str, Any]] | None = None,
    page: int = _PAGE,
    delay: float = 0,
    port: int = 0,
) -> Iterator[Server]:
    """A StaticS3 over the folder in a process of its own, until the block ends."""
    words = [str(folder), "--bucket", bucket, "--faults", json.dumps(faults or []), "--page", str(page)]
    process = subprocess.Popen(
        [sys.executable, __file__, *words, "--delay", str(delay), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid)
    finally:
        process.kill()
        process.wait()


async def _serve(arguments: argparse.Namespace) -> None:
    faults = json.loads(arguments.faults)
    store = StaticS3(arguments.folder, arguments.bucket, faults, arguments.page, arguments.delay)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(store), "127.0.0.1", arguments.port, backlog=512)
    loop.add_signal_handler(signal.SIGTERM, server.close)
    print(server.sockets[0].getsockname()[1], flush=True)
    parent = os.getppid()
    while server.is_serving() and os.getppid() == parent:  # nothing is left behind by a killed test
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bucket", default="bins")
    parser.add_argument("--faults", default="[]")
    parser.add_argument("--page", type=int, default=_PAGE)
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("--port", type=int, default=0)
    uvloop.run(_serve(parser.parse_args()))
