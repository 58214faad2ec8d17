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
from functools import cache
from typing import Any

from PIL import Image

from serving_process import JPEG, JSON, LINES, Answer, ServerProcess, ask, head

MAX_BYTES = 400_000
"""The server's max_request_bytes."""
CLIENT_SECONDS = 2.0
"""The server's client_seconds."""
CLOSED = None
SETTINGS: dict[str, Any] = {"max_request_bytes": MAX_BYTES, "client_seconds": CLIENT_SECONDS, "max_queue": 128}
_PNG = {"content-type": "image/png"}
_GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    bytes(50),
    b"GET\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@dataclass
class Report:
    """What became of the requests."""

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    """Requests by malformation; the others are `good`."""
    wrong: list[str] = field(default_factory=list)
    """Answers that were not right, with the kind of their request."""
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
    return [client.ask(photo[: client.chance.randrange(1, len(photo) * 9 // 10)], JPEG).status], {422}


def flipped_bytes(client: Client) -> Any:
    photo = bytearray(client.photo())
    for _ in range(client.chance.randrange(1, 30)):
        photo[client.chance.randrange(len(photo))] = client.chance.randrange(256)
    return [client.ask(bytes(photo), JPEG).status], {200, 422}


def random_bytes(client: Client) -> Any:
    return [client.ask(client.chance.randbytes(client.chance.randrange(1, 5000)), JPEG).status], {422}


def bomb(client: Client) -> Any:
    width, height = client.chance.choice([(4001, 4001), (30_000, 30_000), (2**31 - 1, 1), (1, 900_000)])
    return [client.ask(png_header(width, height), _PNG).status], {422}


def largest_photo(client: Client) -> Any:
    """As large as is allowed, so that memory is used, and then cut off."""
    return [client.ask(_large_photo()[:-200], _PNG).status], {422}


def wrong_content_type(client: Client) -> Any:
    media = client.chance.choice(["text/plain", "image/gif", "multipart/form-data", "", ";"])
    return [client.ask(client.photo(), {"content-type": media}).status], {415}


def empty_body(client: Client) -> Any:
    return [client.ask(b"", client.chance.choice([JPEG, JSON, LINES])).status], {400}


def bad_base64(client: Client) -> Any:
    text = base64.b64encode(client.photo()).decode()
    spoilt = client.chance.choice([text[:-1], text[:8] + "*" + text[9:], "=" + text, text + "\ud800", "\u00e9"])
    return [client.ask(json.dumps({"instances": [spoilt]}).encode(), JSON).status], {422}


def deep_json(client: Client) -> Any:
    opening = client.chance.choice([b"[", b'{"a":', b'{"inputs":['])
    return [client.ask(opening * (MAX_BYTES // 12), JSON).status], {400}


def wrong_types(client: Client) -> Any:
    value = client.chance.choice([None, True, 1, -1e300, 10**4000, {}, [[]], {"photo": 1}])
    content = client.chance.choice([value, {"inputs": value}, {"instances": [value]}, {"dataframe_split": value}])
    return [client.ask(json.dumps(content).encode(), JSON).status], {400, 422}


def broken_json(client: Client) -> Any:
    text = json.dumps({"inputs": [base64.b64encode(client.photo()).decode()]}).encode()
    broken = client.chance.choice([text[: client.chance.randrange(1, len(text))], text[:-1] + b"}}", b"\xff" + text])
    return [client.ask(broken, JSON).status], {400}


def oversized(client: Client) -> Any:
    return [client.ask(bytes(MAX_BYTES + client.chance.randrange(1, 10**6)), JPEG).status], {413}


def oversized_in_chunks(client: Client) -> Any:
    return [client.ask((bytes(50_000) for _ in range(12)), JPEG).status], {413}


def length_too_long(client: Client) -> Any:
    photo = client.photo()
    return client.raw(head(len(photo) + client.chance.randrange(1, 9)) + photo, half_close=True), {CLOSED}


def length_too_short(client: Client) -> Any:
    photo = client.photo()
    statuses = client.raw(head(len(photo) // 2) + photo)
    return statuses[:1], {422, 400}


def length_nonsense(client: Client) -> Any:
    length = client.chance.choice(["-1", "x", "1e3", "9" * 30, "5, 6"])
    return client.raw(head(length) + client.photo())[:1], {400, 413}


def length_twice(client: Client) -> Any:
    more = client.chance.choice(["content-length: 7\r\n", "transfer-encoding: chunked\r\n"])
    return client.raw(head(9, more) + b"0\r\n\r\n" + bytes(4))[:1], {400}


def broken_chunks(client: Client) -> Any:
    start = b"POST /invocations HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    return client.raw(start + client.chance.choice([b"zz\r\nab\r\n", b"3\r\nabcdef\r\n", b"-1\r\n"]))[:1], {400}


def half_closed(client: Client) -> Any:
    photo = client.photo()
    return client.raw(head(len(photo)) + photo, half_close=True)[:1], {200, CLOSED}


def leaves(client: Client) -> Any:
    photo = client.photo()
    with client.server.socket() as connection:
        connection.sendall((head(len(photo)) + photo)[: client.chance.randrange(1, len(photo) + 90)])
    return [CLOSED], {CLOSED}


def slow_body(client: Client) -> Any:
    sent = [head(400), *[b"x"] * 6]
    return client.raw(*sent, pause=CLIENT_SECONDS / 5)[:1], {408}


def slow_head(client: Client) -> Any:
    sent = [b"GET /ping HTTP/1.1\r\n", *[b"x-a: b\r\n"] * 6]
    return client.raw(*sent, pause=CLIENT_SECONDS / 5)[:1], {CLOSED}


def large_head(client: Client) -> Any:
    return client.raw(b"GET /ping HTTP/1.1\r\n" + b"x-a: " + b"b" * 400_000)[:1], {400, CLOSED}


def pipelined_garbage(client: Client) -> Any:
    photo = client.photo()
    return client.raw(head(len(photo)) + photo + b"\x00" + client.chance.choice(_GARBAGE))[:1], {200}


def garbage(client: Client) -> Any:
    return client.raw(client.chance.choice(_GARBAGE), half_close=True)[:1], {400, 404, 405, CLOSED}


def strange_request(client: Client) -> Any:
    method, path, status = client.chance.choice(
        [
            ("DELETE", "/ping", 405),
            ("GET", "/%00", 404),
            ("GET", "/..%2f..%2fetc/passwd", 404),
            ("POST", "/explain", 404),
        ]
    )
    return [client.ask(b"", {}, path, method).status], {status}


def bad_lines(client: Client) -> Any:
    lines = [json.dumps(base64.b64encode(client.photo()).decode()).encode() for _ in range(3)]
    bad = client.chance.choice([b"{", b"", b"[]", b'{"photo": 1}', b'"AAAA"', b"\xff"])
    lines.insert(client.chance.randrange(4), bad)
    records = (answer := client.ask(b"\n".join(lines) + b"\n", LINES)).records()
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
    texts = [base64.b64encode(client.photos[number]).decode() for number in which]
    headers = client.chance.choice([JSON, LINES, JPEG, {}])
    if headers == JSON:
        body = json.dumps({"inputs": texts}).encode()
    elif headers == LINES:
        body = "\n".join(map(json.dumps, texts)).encode()
    else:
        body, which = client.photos[which[0]], which[:1]
    answer = client.ask(body, headers)
    records = answer.records() if answer.status == 200 else []
    return answer.status, len(records) == len(which) and all(map(right, records, which))


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

    def send_one(client: Client, number: int) -> tuple[str, str | None]:
        """The kind of the request, and what was wrong with its answer."""
        if number % 5:
            status, is_right = good_request(client, right)
            return "good", None if is_right else f"status {status}, or another photo's answer"
        malformation = MALFORMATIONS[number // 5 % len(MALFORMATIONS)]
        try:
            statuses, expected = malformation(client)
            wrong = None if statuses[0] in expected else f"{statuses[0]}, not {expected}"
        except Exception as error:
            wrong = repr(error)
        return malformation.__name__, wrong

    def send(thread: int) -> None:
        client = Client(server, photos, seed * 1000 + thread)
        for number in range(thread, requests, threads):
            kind, wrong = send_one(client, number)
            with lock:
                report.kinds[kind] += 1
                if wrong:
                    report.wrong.append(f"{kind}: {wrong}")
                if report.kinds.total() % max(requests // 20, 1) == 0:
                    report.memory.append(memory())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(threads)))
    return report


def png_header(width: int, height: int) -> bytes:
    """A PNG that says to be so large, and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    head = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@cache
def _large_photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3900, 3900), (90, 120, 40)).save(file, "PNG")
    return file.getvalue()
