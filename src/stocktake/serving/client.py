"""Client of a server: photo bytes out, predictions back. Connections are kept; a full server is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import urllib3

from stocktake.data.images import PhotoError
from stocktake.errors import StocktakeError
from stocktake.serving.predictor import Prediction

AT_ONCE = 4
"""Requests of `predict_all` at a time."""


class Client:
    """One server. May be used by several threads at once."""

    def __init__(self, address: str, seconds: float = 60.0) -> None:
        """Nothing is sent yet.

        Args:
            address: http://host:port or https://...; a path is put before /invocations.
            seconds: how long an answer may take, and how long a full server is asked again.

        Raises:
            StocktakeError: no such address.
        """
        try:
            parts = urlsplit(address)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise StocktakeError(f"{address} is no address of a server: give one such as http://127.0.0.1:8080")
        self.address = address
        self._url = f"{address.rstrip('/').removesuffix('/invocations')}/invocations"
        retries = urllib3.Retry(
            total=None,
            connect=0,
            read=2,  # a kept connection that was closed
            status=round(seconds),
            status_forcelist=[503],
            allowed_methods=None,
            backoff_factor=1,  # where there is no Retry-After
            backoff_max=1,
            raise_on_status=False,
        )
        self._pool = urllib3.PoolManager(maxsize=2 * AT_ONCE, timeout=seconds, retries=retries)

    def predict(self, photo: bytes) -> Prediction:
        """The server's prediction for one photo.

        Raises:
            PhotoError: the server cannot use it.
            StocktakeError: the server does not answer, or not as a server of stocktake.
        """
        try:
            answer = self._pool.request(
                "POST", self._url, body=photo, headers={"content-type": "application/octet-stream"}, redirect=False
            )
            content: dict[str, Any] = json.loads(answer.data)
            if answer.status in (400, 413, 415, 422) or (answer.status == 200 and content["error"]):
                raise PhotoError(str(content["error"]))
            if answer.status != 200:
                raise StocktakeError(f"{self.address} answers with status {answer.status} ({content['error']})")
            return Prediction(
                quantity=int(content["quantity"]),
                confidence=float(content["confidence"]),
                probabilities={int(quantity): float(share) for quantity, share in content["probabilities"].items()},
                likely_quantities=tuple(int(quantity) for quantity in content["likely_quantities"]),
                model_version=str(content["model_version"]),
            )
        except urllib3.exceptions.HTTPError as error:
            raise StocktakeError(f"{self.address} does not answer ({error}): is it running?") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StocktakeError(
                f"{self.address} answers, but not as a server of stocktake: check the address"
            ) from None

    def predict_all(self, photos: Iterable[bytes], at_once: int = AT_ONCE) -> Iterator[Prediction | PhotoError]:
        """The answers in order; a photo that cannot be used has its reason in its place. Errors as `predict`."""

        def outcome(photo: bytes) -> Prediction | PhotoError:
            try:
                return self.predict(photo)
            except PhotoError as error:
                return error

        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(outcome, photos)
