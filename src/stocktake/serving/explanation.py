"""What the model looks at: how much the probability of its answer falls without each part of the photo. Any model."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stocktake.serving.predictor import CHUNK, Predictor

GRID = 8
"""Cells along a side."""
_PAGE = Path(__file__).with_name("page.html")


def occlusion(predictor: Predictor, photo: bytes) -> tuple[int, npt.NDArray[np.float64]]:
    """The predicted quantity, and (GRID, GRID): by how much its probability falls without each part of the photo.

    A part is a cell and half of each of its neighbours, painted in the photo's mean colour: parts that overlap show
    items that lie across cells. Below zero where the part spoke for another quantity.

    Raises:
        PhotoError: the photo cannot be used.
    """
    prepared = predictor.prepare(photo)
    whole = predictor.probabilities(prepared[None])[0]
    best = int(whole.argmax())
    edges = np.linspace(0, len(prepared), 2 * GRID + 1).round().astype(int)  # of half cells
    mean = prepared.mean(axis=(0, 1)).round().astype(np.uint8)
    parts = np.repeat(prepared[None], GRID * GRID, axis=0)
    for number, part in enumerate(parts):
        row, column = divmod(number, GRID)
        top, left = edges[max(2 * row - 1, 0)], edges[max(2 * column - 1, 0)]
        bottom, right = edges[min(2 * row + 3, 2 * GRID)], edges[min(2 * column + 3, 2 * GRID)]
        part[top:bottom, left:right] = mean
    chunks = [predictor.probabilities(parts[start : start + CHUNK])[:, best] for start in range(0, len(parts), CHUNK)]
    return predictor.labels[best], (whole[best] - np.concatenate(chunks)).reshape(GRID, GRID)


def page() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers that allow it its own style and script and nothing else."""
    text = _PAGE.read_text(encoding="utf-8")
    style, script = (_hash(text, tag) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hash(text: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
