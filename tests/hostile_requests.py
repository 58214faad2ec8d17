"""Requests good and bad, sent to a server over real sockets, and what became of them.

`attack` sends them from several threads; a malformation is a function that sends one and gives the status of the
answer, or None where the connection was closed without one, beside the statuses that would be right.
"""

from __future__ import annotations

import base64
import collections
import io
import json
import random
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from serving_process import Answer, ServerProcess, ask

MAX_BYTES = 400_000
"""The server's max_request_bytes."""
CLIENT_SECONDS = 2.0
"""The server's client_seconds."""
CLOSED = None
SETTINGS: dict[str, Any] = {"max_request_bytes": MAX_BYTES, "client_seconds": CLIENT_SECONDS, "max_queue": 128}
_JPEG = {"content-type": "image/jpeg"}
_JSON = {"content-type": "application/json"}
_LINES = {"content-type": "application/jsonlines"}


@dataclass
class Report:
    """What became of the requests."""

    requests: int = 0
    malformed: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong_statuses: list[str] = field(default_factory=list)
    wrong_answers: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes of the server, at every twentieth of the requests."""

    def growth(self) -> float:
        """In per cent, from the first half of the samples to the last quarter, by their medians."""
        first, last = self.memory[len(self.memory) // 4 : len(self.memory) // 2], self.memory[-len(self.memory) // 4 :]
        return 100 * (sorted(last)[len(last) // 2] / sorted(first)[len(first) // 2] - 1)


class Client:
    """One thread's: its photos, its luck and its connection."""

    def __init__(self, server: ServerProcess, photos: Sequence[bytes], seed: int) -> None:
        self.server, self.photos, self.chance = server, photos, random.Random(seed)
        self._kept = server.connection()

    def ask(self, body: Any, headers: dict[str, str], path: str = "/invocations", method: str = "POST") -> Answer:
        """On the connection that is kept."""
        try:
            return ask(self._kept, path, body, headers, method)
        except Exception:
            self._kept.close()
            raise

    def raw(self, *sent: bytes, half_close: bool = False, pause: float = 0.0) -> list[int | None]:
        """The statuses of the answers to bytes, sent with pauses between; ends with CLOSED."""
        with self.server.socket() as connection:
            try:
                for number, part in enumerate(sent):
                    if number:
                        time.sleep(pause)
                    connection.sendall(part)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has been refused already
            return [*_statuses(connection), CLOSED]

    def head(self, length: int | str, more: str = "") -> bytes:
        return f"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n{more}\r\n".encode()

    def photo(self) -> bytes:
        return self.chance.choice(self.photos)


def _statuses(connection: socket.socket) -> list[int]:
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionError:
        pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


Malformation = Callable[[Client], "tuple[Sequence[int | None], set[int | None]]"]


def truncated_jpeg(client: Client) -> Any:
    photo = client.photo()
    return [client.ask(photo[: client.chance.randrange(1, len(photo) * 9 // 10)], _JPEG).status], {422}


def flipped_bytes(client: Client) -> Any:
    photo = bytearray(client.photo())
    for _ in range(client.chance.randrange(1, 30)):
        photo[client.chance.randrange(len(photo))] = client.chance.randrange(256)
    return [client.ask(bytes(photo), _JPEG).status], {200, 422}


def random_bytes(client: Client) -> Any:
    return [client.ask(client.chance.randbytes(client.chance.randrange(1, 5000)), _JPEG).status], {422}


def bomb(client: Client) -> Any:
    width, height = client.chance.choice([(4001, 4001), (30_000, 30_000), (2**31 - 1, 1), (1, 900_000)])
    return [client.ask(png_header(width, height), {"content-type": "image/png"}).status], {422}


def largest_photo(client: Client) -> Any:
    """As large as is allowed, so that memory is used, and then cut off."""
    return [client.ask(_large_photo()[:-200], {"content-type": "image/png"}).status], {422}


def wrong_content_type(client: Client) -> Any:
    media = client.chance.choice(
        ["text/plain", "image/gif", "multipart/form-data", "", ";", "application/json; charset=x"]
    )
    return [client.ask(client.photo(), {"content-type": media}).status], {415}


def empty_body(client: Client) -> Any:
    return [client.ask(b"", client.chance.choice([_JPEG, _JSON, _LINES])).status], {400}


def bad_base64(client: Client) -> Any:
    text = base64.b64encode(client.photo()).decode()
    spoilt = client.chance.choice([text[:-1], text[:8] + "*" + text[9:], "=" + text, text + "\ud800", "\u00e9"])
    return [client.ask(json.dumps({"instances": [spoilt]}).encode(), _JSON).status], {422}


def deep_json(client: Client) -> Any:
    opening = client.chance.choice([b"[", b'{"a":', b'{"inputs":['])
    return [client.ask(opening * (MAX_BYTES // 12), _JSON).status], {400}


def wrong_types(client: Client) -> Any:
    value = client.chance.choice([None, True, 1, -1e300, 10**4000, [], {}, [[]], "AAAA", {"photo": 1}])
    content = client.chance.choice(
        [
            value,
            {"inputs": value if value != [] else 1},
            {"instances": [value if value != "AAAA" else 7]},
            {"dataframe_split": value},
        ]
    )
    return [client.ask(json.dumps(content).encode(), _JSON).status], {400, 422}


def broken_json(client: Client) -> Any:
    text = json.dumps({"inputs": [base64.b64encode(client.photo()).decode()]}).encode()
    cut = text[: client.chance.randrange(1, len(text))]
    broken = client.chance.choice(
        [cut, text[:-1] + b"}}", b"\xff" + text, b'{"inputs":[NaN]}', b'{"inputs":[],"inputs":[]}']
    )
    return [client.ask(broken, _JSON).status], {400}


def oversized(client: Client) -> Any:
    return [client.ask(bytes(MAX_BYTES + client.chance.randrange(1, 10**6)), _JPEG).status], {413}


def oversized_in_chunks(client: Client) -> Any:
    return [client.ask((bytes(50_000) for _ in range(12)), _JPEG).status], {413}


def length_too_long(client: Client) -> Any:
    photo = client.photo()
    return client.raw(client.head(len(photo) + client.chance.randrange(1, 9)) + photo, half_close=True), {CLOSED}


def length_too_short(client: Client) -> Any:
    photo = client.photo()
    statuses = client.raw(client.head(len(photo) // 2) + photo)
    return statuses[:1], {422, 400}


def length_nonsense(client: Client) -> Any:
    length = client.chance.choice(["-1", "x", "1e3", "9" * 30, "5, 6"])
    return client.raw(client.head(length) + client.photo())[:1], {400, 413}


def length_twice(client: Client) -> Any:
    more = client.chance.choice(["content-length: 7\r\n", "transfer-encoding: chunked\r\n"])
    return client.raw(client.head(9, more) + b"0\r\n\r\n" + bytes(4))[:1], {400}


def broken_chunks(client: Client) -> Any:
    head = b"POST /invocations HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    return client.raw(head + client.chance.choice([b"zz\r\nab\r\n", b"3\r\nabcdef\r\n", b"-1\r\n"]))[:1], {400}


def half_closed(client: Client) -> Any:
    photo = client.photo()
    return client.raw(client.head(len(photo)) + photo, half_close=True)[:1], {200, CLOSED}


def leaves(client: Client) -> Any:
    photo = client.photo()
    with client.server.socket() as connection:
        connection.sendall((client.head(len(photo)) + photo)[: client.chance.randrange(1, len(photo) + 90)])
    return [CLOSED], {CLOSED}


def slow_body(client: Client) -> Any:
    sent = [client.head(400), *[b"x"] * 6]
    return client.raw(*sent, pause=CLIENT_SECONDS / 5)[:1], {408}


def slow_head(client: Client) -> Any:
    sent = [b"GET /ping HTTP/1.1\r\n", *[b"x-a: b\r\n"] * 6]
    return client.raw(*sent, pause=CLIENT_SECONDS / 5)[:1], {CLOSED}


def large_head(client: Client) -> Any:
    return client.raw(b"GET /ping HTTP/1.1\r\n" + b"x-a: " + b"b" * 400_000)[:1], {400, CLOSED}


def pipelined_garbage(client: Client) -> Any:
    photo = client.photo()
    garbage = client.chance.choice(
        [b"\x00\x01\x02", b"GARBAGE\r\n\r\n", client.chance.randbytes(300), b"GET /ping\r\n\r\n"]
    )
    return client.raw(client.head(len(photo)) + photo + b"\x00" + garbage)[:1], {200}


def garbage(client: Client) -> Any:
    sent = client.chance.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\x00" * 50,
            b"GET\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
    )
    return client.raw(sent, half_close=True)[:1], {400, 404, 405, 421, CLOSED}


def strange_request(client: Client) -> Any:
    method, path, status = client.chance.choice(
        [
            ("GET", "/invocations", 405),
            ("DELETE", "/ping", 405),
            ("OPTIONS", "/invocations", 405),
            ("GET", "/%00", 404),
            ("GET", "/..%2f..%2fetc/passwd", 404),
            ("POST", "/explain", 404),
        ]
    )
    return [client.ask(b"", {}, path, method).status], {status}


def bad_lines(client: Client) -> Any:
    photos = [client.photo() for _ in range(3)]
    lines = [base64.b64encode(photo) for photo in photos]
    lines.insert(
        client.chance.randrange(4), client.chance.choice([b"{", b"", b"[]", b'{"photo": 1}', b"AAAA", b"\xff"])
    )
    answer = client.ask(b"\n".join(lines) + b"\n", _LINES)
    records = [json.loads(line) for line in answer.body.splitlines()]
    right = len(records) == 4 and sum(bool(record["error"]) for record in records) == 1
    return [answer.status if right else -1], {200}


MALFORMATIONS: list[Malformation] = [
    truncated_jpeg, flipped_bytes, random_bytes, bomb, largest_photo, wrong_content_type, empty_body, bad_base64,
    deep_json, wrong_types, broken_json, oversized, oversized_in_chunks, length_too_long, length_too_short,
    length_nonsense, length_twice, broken_chunks, half_closed, leaves, slow_body, slow_head, large_head,
    pipelined_garbage, garbage, strange_request, bad_lines,
]  # fmt: skip


def good_request(client: Client, right: Callable[[dict[str, Any], int], bool]) -> tuple[int, bool]:
    """The status of a good request's answer, and whether it is right."""
    which = [client.chance.randrange(len(client.photos)) for _ in range(client.chance.choice([1, 1, 2, 5]))]
    photos = [client.photos[number] for number in which]
    texts = [base64.b64encode(photo).decode() for photo in photos]
    form = client.chance.randrange(4)
    if form == 0:
        answer = client.ask(json.dumps({"inputs": texts}).encode(), _JSON)
        records = answer.json().get("predictions", [])
    elif form == 1:
        answer = client.ask("\n".join(texts).encode(), _LINES)
        records = [json.loads(line) for line in answer.body.splitlines()]
    else:
        which = which[:1]
        answer = client.ask(photos[0], _JPEG if form == 2 else {})
        records = [answer.json()]
    matched = len(records) == len(which) and all(map(right, records, which))
    return answer.status, answer.status == 200 and matched


def attack(
    server: ServerProcess,
    photos: Sequence[bytes],
    right: Callable[[dict[str, Any], int], bool],
    requests: int,
    memory: Callable[[], int],
    *,
    threads: int = 8,
    seed: int = 0,
) -> Report:
    """Send them, a fifth malformed, each way as often.

    Args:
        server: run with SETTINGS.
        photos: good ones.
        right: whether an answer is that to the photo of this number.
        requests: how many.
        memory: bytes that the server holds.
        threads: that send.
        seed: of what is sent.
    """
    report, lock = Report(), threading.Lock()

    def one(client: Client, number: int) -> None:
        wrong_status = wrong_answer = kind = None
        try:
            if number % 5:
                status, matched = good_request(client, right)
                if status != 200:
                    wrong_status = f"good: {status}"
                elif not matched:
                    wrong_answer = f"good request {number}"
            else:
                malformation = MALFORMATIONS[number // 5 % len(MALFORMATIONS)]
                kind = malformation.__name__
                statuses, expected = malformation(client)
                if statuses[0] not in expected:
                    wrong_status = f"{kind}: {statuses[0]}, not {expected}"
        except Exception as error:
            wrong_status = f"{kind or 'good'}: {error!r}"
        with lock:
            report.requests += 1
            if kind:
                report.malformed[kind] += 1
            if wrong_status:
                report.wrong_statuses.append(wrong_status)
            if wrong_answer:
                report.wrong_answers.append(wrong_answer)
            if report.requests % max(requests // 20, 1) == 0:
                report.memory.append(memory())

    def send(thread: int) -> None:
        client = Client(server, photos, seed * 1000 + thread)
        for number in range(thread, requests, threads):
            one(client, number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(threads)))
    return report


def png_header(width: int, height: int) -> bytes:
    """A PNG that says to be so large, and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    head = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


_LARGE: list[bytes] = []


def _large_photo() -> bytes:
    if not _LARGE:
        file = io.BytesIO()
        Image.new("RGB", (3900, 3900), (90, 120, 40)).save(file, "PNG")
        _LARGE.append(file.getvalue())
    return _LARGE[0]
