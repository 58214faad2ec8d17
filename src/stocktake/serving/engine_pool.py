"""A few threads that predict chunks of photos for an event loop: they decode at once, and share the engine.

No requests are batched together: on a CPU, forward passes of 8 photos answer at most a tenth more photos a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from stocktake.data.images import PhotoError
from stocktake.machine import cores
from stocktake.serving.predictor import CHUNK, Prediction, Predictor

MAX_FAILURES = 3
"""Forward passes that fail one after the other before the engine counts as dead."""


class EnginePool:
    """Predicts for one event loop."""

    def __init__(self, predictor: Predictor, stuck_seconds: float) -> None:
        """Start no thread yet.

        Args:
            predictor: the model.
            stuck_seconds: after which a chunk of photos that a thread works on counts as stuck.
        """
        self._predictor, self._stuck_seconds = predictor, stuck_seconds
        self._threads = ThreadPoolExecutor(min(4, cores()) + 1, thread_name_prefix="predict")
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

    def close(self) -> None:
        """End the threads once they have done what is begun; drop the rest. Does not wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _predict(self, chunk: Sequence[bytes]) -> list[Prediction | PhotoError]:
        key = object()
        self._begun[key] = time.monotonic()
        try:
            outcomes = list(self._predictor.predict_each(chunk))
        except Exception:
            self._failures += 1
            raise
        finally:
            del self._begun[key]
        if any(isinstance(outcome, Prediction) for outcome in outcomes):
            self._failures = 0
        return outcomes
