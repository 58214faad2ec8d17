"""Photos of many clients, decoded in a few threads, counted together.

    submit -> waiting -> decoders (threads) -> prepared -> one forward pass at a time (thread) -> the client's future

A photo passes from thread to thread without the event loop in between; the loop hears of a whole batch at once. A photo
alone is never kept waiting for others: only while others are being decoded does the pass wait for them, a little.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
from PIL import Image

from stocktake.data.images import FORMATS, PhotoError
from stocktake.machine import cores
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.serving.settings import ServerSettings

MOST_PIXELS = 16_000_000
"""Of a photo, less than a training set may hold: a decoder needs up to 15 bytes a pixel while it works."""
MANY_PIXELS = 2_000_000
"""Photos above are decoded one at a time, so that a worker's memory stays bounded."""
MOST_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each costs the decoder a pass over all pixels."""

Outcome = Prediction | PhotoError


class QueueFullError(Exception):
    """More photos wait than may."""


class _Work:
    """The photos of one request."""

    def __init__(self, future: asyncio.Future[list[Outcome]], count: int) -> None:
        self.future = future
        self.outcomes: list[Outcome | None] = [None] * count
        self.left = count

    def settle(self, place: int, outcome: Outcome) -> None:
        self.outcomes[place] = outcome
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result([outcome for outcome in self.outcomes if outcome is not None])


_Waiting = tuple[_Work, int, bytes]
_Prepared = tuple[_Work, int, npt.NDArray[np.uint8]]
_Settled = tuple[_Work, int, "Outcome | Exception | None"]


class Batcher:
    """Counts photos for one event loop. Its threads end with the process, or with `close`."""

    def __init__(self, counter: Predictor, settings: ServerSettings, observe: Callable[[int], None]) -> None:
        """Start the threads.

        Args:
            counter: the model.
            settings: max_batch, max_wait_ms, max_queue.
            observe: told the size of each forward pass, in its thread.
        """
        self._counter, self._settings, self._observe = counter, settings, observe
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._prepared: deque[_Prepared] = deque()
        self._change = threading.Condition()
        self._undecoded = 0  # guarded by _change: photos on their way to _prepared
        self._closed = False
        self._large = threading.Lock()
        self.pending = 0
        """Photos submitted and not answered yet. For the event loop's thread."""
        decoders = min(4, cores())
        targets = [self._decode_all] * decoders + [self._count_all]
        # not an executor's threads: those are waited for when the process ends, however long a decoder takes
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def submit(self, photos: Sequence[bytes]) -> asyncio.Future[list[Outcome]]:
        """An outcome for each photo, in order. Cancel the future, and those not begun are dropped.

        Raises:
            QueueFullError: more photos would wait than may, or the batcher is closed.
        """
        if self._closed or self.pending + len(photos) > self._settings.max_queue:
            raise QueueFullError
        future: asyncio.Future[list[Outcome]] = self._loop.create_future()
        if not photos:
            future.set_result([])
            return future
        work = _Work(future, len(photos))
        self.pending += len(photos)
        with self._change:
            self._undecoded += len(photos)
        for place, photo in enumerate(photos):
            self._waiting.put((work, place, photo))
        return future

    def close(self) -> None:
        """Take no more photos and end the threads once those submitted are counted. Does not wait."""
        if self._closed:
            return
        with self._change:
            self._closed = True
            self._change.notify_all()
        for _ in self._threads[1:]:
            self._waiting.put(None)

    def _decode_all(self) -> None:
        while (taken := self._waiting.get()) is not None:
            work, place, photo = taken
            prepared, failure = None, None
            try:
                if not work.future.cancelled():
                    prepared = self.prepare(photo)
            except Exception as error:
                failure = error
            del taken, photo
            with self._change:
                self._undecoded -= 1
                if prepared is not None:
                    self._prepared.append((work, place, prepared))
                self._change.notify_all()
            if prepared is None:
                self._tell([(work, place, failure)])
            del work, prepared

    def prepare(self, photo: bytes) -> npt.NDArray[np.uint8]:
        """(size, size, 3): the photo as the graph takes it, within this server's bounds. In the caller's thread.

        Raises:
            PhotoError: it cannot be used.
        """
        if photo.startswith(b"\xff\xd8") and photo.count(b"\xff\xda") > MOST_SCANS:
            raise PhotoError(f"photo has more than {MOST_SCANS} scans")
        if _pixels(photo) < MANY_PIXELS:
            return self._counter.prepare(photo)
        with self._large:
            return self._counter.prepare(photo)

    def _count_all(self) -> None:
        while batch := self._next_batch():
            wanted: list[_Prepared] = []
            for one in batch:
                if one[0].future.cancelled():
                    self._tell([(one[0], one[1], None)])
                else:
                    wanted.append(one)
            self._count(wanted)

    def _next_batch(self) -> list[_Prepared]:
        """The photos of the next pass; none when closed and all is done."""
        with self._change:
            while not self._prepared:
                if self._closed and not self._undecoded:
                    return []
                self._change.wait()
            end = time.monotonic() + self._settings.max_wait_ms / 1000
            while len(self._prepared) < self._settings.max_batch and self._undecoded:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._change.wait(left)
            return [self._prepared.popleft() for _ in range(min(len(self._prepared), self._settings.max_batch))]

    def _count(self, batch: list[_Prepared]) -> None:
        if not batch:
            return
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = self._counter.answers(self._counter.probabilities(np.stack([one[2] for one in batch])))
        except Exception as error:
            if len(batch) > 1:  # each by itself, so that none suffers for another
                for one in batch:
                    self._count([one])
                return
            outcomes = [error]
        self._observe(len(batch))
        self._tell([(work, place, outcome) for (work, place, _), outcome in zip(batch, outcomes, strict=True)])

    def _tell(self, settled: Sequence[_Settled]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle, settled)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            return

    def _settle(self, settled: Sequence[_Settled]) -> None:
        for work, place, outcome in settled:
            self.pending -= 1
            if isinstance(outcome, Prediction | PhotoError):
                work.settle(place, outcome)
            elif not work.future.done():
                work.future.set_exception(outcome or RuntimeError("a photo was dropped"))


def _pixels(photo: bytes) -> int:
    """Of a photo, by its header.

    Raises:
        PhotoError: too many. What cannot be read counts as none: decoding says why.
    """
    try:
        with Image.open(io.BytesIO(photo), formats=FORMATS) as opened:
            width, height = opened.size
    except Exception:  # Pillow's readers raise many kinds of errors on hostile bytes
        return 0
    if width * height > MOST_PIXELS:
        raise PhotoError(f"photo has {width}x{height} pixels, more than {MOST_PIXELS}")
    return width * height
