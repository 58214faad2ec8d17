"""The page in a real browser."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving_process import PATIENCE, ServerProcess, serving
from stocktake.serving.explanation import GRID, occlusion, page
from stocktake.serving.predictor import Predictor
from tiny_bins import draw_bin

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHOTO = draw_bin(3, 700, size=160)


@pytest.fixture(scope="module")
def server(exported_model: Path) -> Iterator[ServerProcess]:
    with serving(exported_model, page=True, max_request_bytes=500_000) as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def shown(browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The page, which must leave the browser nothing to complain about: no error, no other host asked."""
    opened = browser.new_page(viewport={"width": 1100, "height": 800})
    opened.set_default_timeout(PATIENCE * 1000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None
    )
    address = f"http://127.0.0.1:{server.port}/"
    opened.on(
        "request",
        lambda request: request.url.startswith((address, "blob:", "data:")) or complaints.append(request.url),
    )
    opened.goto(address)
    yield opened
    opened.close()
    assert complaints == []


def choose(opened: Any, name: str, mime: str, content: bytes) -> None:
    opened.get_by_label("Choose a photo of a bin").set_input_files({"name": name, "mimeType": mime, "buffer": content})


@pytest.mark.browser
def test_a_photo_is_counted_and_explained(shown: Any, exported_model: Path, tmp_path: Path) -> None:
    (prediction,) = Predictor(exported_model).predict([PHOTO])
    choose(shown, "bin.jpg", "image/jpeg", PHOTO)
    shown.locator("#answer").wait_for()
    assert shown.locator("#quantity").inner_text() == str(prediction.quantity)
    assert shown.locator("#confidence").inner_text() == f"{100 * prediction.confidence:.1f} % sure"
    rows = shown.locator("#bars li").all()
    for row, (quantity, share) in zip(rows, prediction.probabilities.items(), strict=True):
        assert row.inner_text().split("\n")[0] == str(quantity)
        assert f"{100 * share:.1f} %" in row.inner_text()
        assert ("best" in (row.get_attribute("class") or "")) == (quantity == prediction.quantity)
        width = row.locator("i").evaluate("bar => bar.style.width")
        assert float(width.rstrip("%")) == pytest.approx(100 * share, abs=0.01)
    assert all(str(quantity) in shown.locator("#set").inner_text() for quantity in prediction.likely_quantities)
    overlay = shown.get_by_label("Show where the network looked")
    overlay.wait_for()
    heat = shown.locator("#heat")
    assert heat.is_hidden()
    overlay.check()
    assert heat.is_visible()
    assert shown.locator("#legend").is_visible()
    painted = heat.evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(value => value)")
    assert painted
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    overlay.uncheck()
    assert heat.is_hidden()
    assert prediction.model_version in shown.locator("#model").inner_text()


@pytest.mark.browser
def test_a_photo_is_dropped(shown: Any) -> None:
    shown.evaluate(
        """text => {
            const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "bin.jpg", {type: "image/jpeg"}));
            document.getElementById("drop").dispatchEvent(
                new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        base64.b64encode(PHOTO).decode(),
    )
    shown.locator("#answer").wait_for()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "mime", "content", "reason"),
    [
        ("notes.txt", "text/plain", b"no photo", "This is no JPEG, PNG or WebP photo."),
        ("bin.jpg", "image/jpeg", PHOTO[: len(PHOTO) // 2], "Photo cannot be decoded"),
        ("bin.png", "image/png", b"\x89PNG" + bytes(600_000), "The body has more than 500000 bytes."),
    ],
    ids=["text", "truncated", "large"],
)
def test_what_is_wrong_is_said_and_the_next_photo_counted(
    shown: Any, name: str, mime: str, content: bytes, reason: str
) -> None:
    choose(shown, name, mime, content)
    shown.locator("#error").wait_for()
    assert reason in shown.locator("#reason").inner_text()
    assert shown.locator("#answer").is_hidden()
    choose(shown, "bin.jpg", "image/jpeg", PHOTO)
    shown.locator("#answer").wait_for()
    assert shown.locator("#error").is_hidden()


@pytest.mark.browser
def test_the_keyboard_reaches_all_and_everything_has_a_name(shown: Any) -> None:
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.id") == "file"
    assert shown.evaluate("document.documentElement.lang") == "en"
    unnamed = "[...document.querySelectorAll('input, button, img, section')].filter(one => !one.ariaLabel && !one.alt"
    assert shown.evaluate(f"{unnamed} && !one.labels?.length && !['error', 'waiting'].includes(one.id)).length") == 0
    shown.set_viewport_size({"width": 360, "height": 700})
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_allows_only_itself() -> None:
    content, headers = page()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    for outside in (b"http://", b"https://", b"//cdn", b" onclick=", b" style="):
        assert outside not in content


def test_a_photo_is_explained_over_http(server: ServerProcess, exported_model: Path) -> None:
    answer = server.ask("/explain", PHOTO, {"content-type": "image/jpeg"})
    predictor = Predictor(exported_model)
    quantity, drops = occlusion(predictor, PHOTO)
    assert answer.status == 200
    assert answer.json()["quantity"] == quantity
    np.testing.assert_allclose(answer.json()["drops"], drops, atol=1e-4)
    assert server.ask("/explain", b"{}", {"content-type": "application/json"}).status == 415
    assert server.ask("/explain", b"no photo", {"content-type": "image/jpeg"}).status == 422
    assert server.ask("/explain", b"", {"content-type": "image/jpeg"}).status == 400


class _CornerPredictor(Predictor):
    """Sure of quantity 1 by what it sees of one corner."""

    def probabilities(self, prepared: np.ndarray, **_: Any) -> np.ndarray:
        sure = 0.5 + prepared[:, -4:, :4].std(axis=(1, 2, 3)) / 300
        return np.stack([sure, 1 - sure], axis=1)


def test_the_part_that_counts_is_marked(exported_model: Path) -> None:
    quantity, drops = occlusion(_CornerPredictor(exported_model), PHOTO)
    assert quantity == 1
    assert drops.shape == (GRID, GRID)
    assert np.unravel_index(drops.argmax(), drops.shape) == (GRID - 1, 0)
    assert np.count_nonzero(np.abs(drops) > 1e-9) == 4  # the cell and the neighbours whose parts reach into it
