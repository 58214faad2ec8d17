from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hostile_requests import png_header
from serving_process import PATIENCE
from stocktake.data.images import PhotoError
from stocktake.serving import batching
from stocktake.serving.batching import Batcher, QueueFullError
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.serving.settings import ServerSettings
from tiny_bins import draw_bin

PHOTOS = [draw_bin(1 + number % 3, 500 + number) for number in range(12)]


class HeldCounter(Predictor):
    """Each pass waits until it may go on, and can be made to fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.passes = 0
        self.fails: Callable[[np.ndarray], bool] = lambda prepared: False

    def probabilities(self, prepared: Any) -> Any:
        self.passes += 1
        assert self.may_go_on.wait(PATIENCE)
        if self.fails(prepared):
            raise RuntimeError("the engine failed")
        return super().probabilities(prepared)


@pytest.fixture
def counter(exported_model: Path) -> HeldCounter:
    return HeldCounter(exported_model)


def batched(
    counter: Predictor, use: Callable[[Batcher], Awaitable[None]], sizes: list[int] | None = None, **settings: Any
) -> None:
    """Run `use` with a batcher, and see that it forgets nothing."""

    async def run() -> None:
        batcher = Batcher(counter, ServerSettings(**settings), (sizes if sizes is not None else []).append)
        try:
            await asyncio.wait_for(use(batcher), PATIENCE)
            while batcher.pending:
                await asyncio.sleep(0.005)
        finally:
            batcher.close()

    asyncio.run(run())


def check(outcome: Any, expected: Prediction) -> None:
    assert isinstance(outcome, Prediction)
    assert outcome.quantity == expected.quantity
    assert outcome.confidence == pytest.approx(expected.confidence, abs=1e-5)


def test_photos_that_wait_share_a_pass_and_each_gets_its_own_answer(counter: HeldCounter) -> None:
    expected = counter.predict(PHOTOS)
    sizes: list[int] = []

    async def use(batcher: Batcher) -> None:
        counter.may_go_on.clear()
        futures = [batcher.submit([photo]) for photo in PHOTOS]
        while batcher._undecoded:
            await asyncio.sleep(0.005)
        counter.may_go_on.set()
        for future, count in zip(futures, expected, strict=True):
            (outcome,) = await future
            check(outcome, count)

    batched(counter, use, sizes, max_batch=5)
    assert sum(sizes) == 12
    assert max(sizes) == 5
    assert len(sizes) <= 4


def test_a_photo_alone_does_not_wait(counter: HeldCounter) -> None:
    sizes: list[int] = []

    async def use(batcher: Batcher) -> None:
        for photo in PHOTOS[:3]:
            await batcher.submit([photo])

    batched(counter, use, sizes, max_wait_ms=1000)
    assert sizes == [1, 1, 1]


def test_photos_of_one_request_stay_in_order_beside_bad_ones(counter: HeldCounter) -> None:
    expected = counter.predict(PHOTOS)

    async def use(batcher: Batcher) -> None:
        outcomes = await batcher.submit([PHOTOS[0], b"no photo", *PHOTOS[1:], PHOTOS[0][:400], b""])
        bad = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, PhotoError)]
        assert bad == [1, 13, 14]
        for outcome, count in zip([one for one in outcomes if isinstance(one, Prediction)], expected, strict=True):
            check(outcome, count)
        assert await batcher.submit([]) == []

    batched(counter, use)


def test_a_photo_that_breaks_the_engine_harms_no_other(counter: HeldCounter) -> None:
    cursed = counter.prepare(PHOTOS[2])
    counter.fails = lambda prepared: any(np.array_equal(one, cursed) for one in prepared)

    async def use(batcher: Batcher) -> None:
        counter.may_go_on.clear()
        futures = [batcher.submit([photo]) for photo in PHOTOS[:5]]
        counter.may_go_on.set()
        for number, future in enumerate(futures):
            if number == 2:
                with pytest.raises(RuntimeError, match="the engine failed"):
                    await future
            else:
                await future

    batched(counter, use)


def test_no_more_photos_wait_than_may(counter: HeldCounter) -> None:
    async def use(batcher: Batcher) -> None:
        counter.may_go_on.clear()
        first = batcher.submit(PHOTOS[:3])
        with pytest.raises(QueueFullError):
            batcher.submit(PHOTOS[:2])
        second = batcher.submit(PHOTOS[:1])
        assert batcher.pending == 4
        counter.may_go_on.set()
        assert len(await first) == 3
        assert len(await second) == 1
        assert len(await batcher.submit(PHOTOS[:4])) == 4

    batched(counter, use, max_queue=4)


def test_photos_that_nobody_waits_for_are_not_counted(counter: HeldCounter) -> None:
    sizes: list[int] = []

    async def use(batcher: Batcher) -> None:
        counter.may_go_on.clear()
        first = batcher.submit([PHOTOS[0]])
        while not counter.passes:
            await asyncio.sleep(0.005)
        left = batcher.submit(PHOTOS[:6])
        stays = batcher.submit([PHOTOS[1]])
        left.cancel()
        counter.may_go_on.set()
        await first
        await stays

    batched(counter, use, sizes, max_batch=8)
    assert sizes == [1, 1]


def test_closed_it_finishes_what_it_has_and_its_threads_end(counter: HeldCounter) -> None:
    async def use(batcher: Batcher) -> None:
        counter.may_go_on.clear()
        future = batcher.submit(PHOTOS[:5])
        batcher.close()
        with pytest.raises(QueueFullError):
            batcher.submit(PHOTOS[:1])
        counter.may_go_on.set()
        assert len(await future) == 5
        while any(thread.is_alive() for thread in batcher._threads):
            await asyncio.sleep(0.005)

    batched(counter, use)


def test_bombs_are_refused_before_they_are_decoded(counter: HeldCounter) -> None:
    scans = io.BytesIO()
    Image.new("RGB", (64, 64)).save(scans, "JPEG")
    many_scans = scans.getvalue()[:-2] + b"\xff\xda\x00\x08" * 500
    bombs = [png_header(5000, 5000), png_header(30_000, 30_000), many_scans]

    async def use(batcher: Batcher) -> None:
        outcomes = await batcher.submit(bombs)
        reasons = [str(outcome) for outcome in outcomes]
        assert "5000x5000 pixels" in reasons[0]
        assert "photo" in reasons[1]
        assert "scans" in reasons[2]

    batched(counter, use)


def test_large_photos_are_decoded_one_at_a_time(counter: HeldCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MANY_PIXELS", 1000)
    together, most, lock = 0, 0, threading.Lock()
    prepare = counter.prepare

    def slowly(photo: bytes) -> Any:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        threading.Event().wait(0.01)
        with lock:
            together -= 1
        return prepare(photo)

    counter.prepare = slowly  # type: ignore[method-assign]

    async def use(batcher: Batcher) -> None:
        await batcher.submit(PHOTOS)

    batched(counter, use)
    assert most == 1
