"""Client of a server: photo bytes out, predictions back. Connections are kept; a full server is asked again."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from stocktake.data.images import PhotoError
from stocktake.errors import StocktakeError
from stocktake.serving.predictor import Prediction

_BROKEN = (http.client.RemoteDisconnected, http.client.BadStatusLine, ConnectionResetError, BrokenPipeError)


class Client:
    """One server. May be used by several threads at once."""

    def __init__(self, address: str, seconds: float = 60.0) -> None:
        """Nothing is sent yet.

        Args:
            address: http://host:port or https://...; a path is put before /invocations.
            seconds: how long a photo's answer may take, waits for a full server included.

        Raises:
            StocktakeError: no such address.
        """
        parts = urlsplit(address)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise StocktakeError(f"{address} is no address of a server: give one such as http://127.0.0.1:8080")
        self.address = address
        self._secure, self._host, self._port = parts.scheme == "https", host, port
        self._path = f"{parts.path.rstrip('/').removesuffix('/invocations')}/invocations"
        self._seconds = seconds
        self._idle: list[http.client.HTTPConnection] = []  # a connection is for one thread at a time

    def predict(self, photo: bytes) -> Prediction:
        """The server's prediction for one photo.

        Raises:
            PhotoError: the server cannot use it.
            StocktakeError: the server does not answer, or not as a server of stocktake.
        """
        deadline = time.monotonic() + self._seconds
        while True:
            status, wait, body = self._post(photo)
            if status == 200:
                return _prediction(body, self.address)
            reason = _reason(body)
            if status in (400, 413, 415, 422):
                raise PhotoError(reason or f"the server refused it with status {status}")
            if status != 503 or time.monotonic() + wait > deadline:
                raise StocktakeError(f"{self.address} answers with status {status} ({reason}): see its log")
            time.sleep(wait)

    def predict_all(self, photos: Iterable[bytes], at_once: int = 4) -> Iterator[Prediction | PhotoError]:
        """The answers in order; a photo that cannot be used has its reason in its place. Errors as `count`."""

        def outcome(photo: bytes) -> Prediction | PhotoError:
            try:
                return self.predict(photo)
            except PhotoError as error:
                return error

        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(outcome, photos)

    def _post(self, photo: bytes) -> tuple[int, float, bytes]:
        """Status, seconds to wait before asking again, body. A kept connection that was closed is opened again."""
        while True:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
                connection, kept = kind(self._host, self._port, timeout=self._seconds), False
            try:
                connection.request("POST", self._path, photo, {"Content-Type": "application/octet-stream"})
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept and isinstance(error, _BROKEN):
                    continue
                why = str(error) or type(error).__name__
                raise StocktakeError(f"{self.address} does not answer ({why}): is it running?") from None
            self._idle.append(connection)
            wait = answer.headers.get("Retry-After", "")
            return answer.status, float(wait) if wait.isdecimal() else 1.0, body


def _prediction(body: bytes, address: str) -> Prediction:
    try:
        answer: dict[str, Any] = json.loads(body)
        if answer["error"]:  # of a batch transform's server
            raise PhotoError(str(answer["error"]))
        return Prediction(
            quantity=int(answer["quantity"]),
            confidence=float(answer["confidence"]),
            probabilities={int(quantity): float(share) for quantity, share in answer["probabilities"].items()},
            likely_quantities=tuple(int(quantity) for quantity in answer["likely_quantities"]),
            model_version=str(answer["model_version"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StocktakeError(f"{address} answers, but not as a server of stocktake: check the address") from None


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return ""
