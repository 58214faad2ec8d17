"""A few threads that decode photos, and one forward pass at a time.

No requests are batched together: on a CPU, forward passes of 8 photos answer at most a tenth more photos a second.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from stocktake.data.images import PhotoError
from stocktake.machine import cores
from stocktake.serving.predictor import CHUNK, Prediction, Predictor, check_header

MAX_PIXELS = 16_000_000
"""Of a photo, fewer than a training set may have: a decoder needs up to 15 bytes a pixel while it works."""
MANY_PIXELS = 2_000_000
"""Photos with more are decoded one at a time, so that a worker's memory stays bounded."""
MAX_FAILURES = 3
"""Forward passes that fail one after the other before the engine counts as dead."""


class EnginePool:
    """Predicts for one event loop."""

    def __init__(self, predictor: Predictor, stuck_seconds: float) -> None:
        """Start no thread yet.

        Args:
            predictor: the model.
            stuck_seconds: after which a chunk of photos that is being worked on counts as stuck.
        """
        self._predictor, self._stuck_seconds = predictor, stuck_seconds
        self.labels = predictor.labels
        self._threads = ThreadPoolExecutor(min(4, cores()) + 1, thread_name_prefix="predict")
        self._engine = threading.Lock()
        self._large_photo = threading.Lock()
        self._begun: dict[object, float] = {}  # when each chunk was begun, by time.monotonic
        self._failures = 0
        self.waiting = 0
        """Photos that were submitted and are not answered yet. For the event loop's thread."""

    async def predict(self, photos: Sequence[bytes]) -> list[Prediction | PhotoError]:
        """An outcome a photo, in order. Cancelled, it drops the chunks that are not begun."""
        loop = asyncio.get_running_loop()
        chunks = [photos[start : start + CHUNK] for start in range(0, len(photos), CHUNK)]
        self.waiting += len(photos)
        try:
            answered = [loop.run_in_executor(self._threads, self._predict, chunk) for chunk in chunks]
            return [outcome for outcomes in await asyncio.gather(*answered) for outcome in outcomes]
        finally:
            self.waiting -= len(photos)

    def fault(self) -> str | None:
        """What keeps photos from being answered: stuck or failing forward passes; None while all is well."""
        begun = min(list(self._begun.values()), default=None)
        if begun is not None and time.monotonic() - begun > self._stuck_seconds:
            return "prediction is stuck"
        return "prediction fails" if self._failures >= MAX_FAILURES else None

    def prepare(self, photo: bytes) -> npt.NDArray[np.uint8]:
        """(size, size, 3): the photo as the graph takes it, within this server's bounds. In the caller's thread.

        Raises:
            PhotoError: it cannot be used.
        """
        pixels = check_header(photo)
        if pixels > MAX_PIXELS:
            raise PhotoError(f"photo has {pixels} pixels, more than {MAX_PIXELS}")
        if pixels < MANY_PIXELS:
            return self._predictor.prepare(photo)
        with self._large_photo:
            return self._predictor.prepare(photo)

    def probabilities(self, prepared: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """As the predictor's, one call at a time. In the caller's thread."""
        with self._engine:
            try:
                shares = self._predictor.probabilities(prepared)
            except Exception:
                self._failures += 1
                raise
            self._failures = 0
            return shares

    def close(self) -> None:
        """End the threads once they have done what is begun; drop the rest. Does not wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _predict(self, chunk: Sequence[bytes]) -> list[Prediction | PhotoError]:
        key = object()
        self._begun[key] = time.monotonic()
        try:
            prepared = [self._prepare_or_error(photo) for photo in chunk]
            usable = [photo for photo in prepared if not isinstance(photo, PhotoError)]
            shares = self.probabilities(np.stack(usable)) if usable else np.empty((0, len(self.labels)))
            predictions = iter(self._predictor.predictions(shares))
            return [photo if isinstance(photo, PhotoError) else next(predictions) for photo in prepared]
        finally:
            del self._begun[key]

    def _prepare_or_error(self, photo: bytes) -> npt.NDArray[np.uint8] | PhotoError:
        try:
            return self.prepare(photo)
        except PhotoError as error:
            return error
