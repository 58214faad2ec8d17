"""Photo bytes to quantity and confidence. Needs onnxruntime, numpy and Pillow; neither torch nor pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from stocktake.bins.images import decode, prepare
from stocktake.errors import StocktakeError

NEWEST_FORMAT = 1
FOLDER = "counter"
"""Name of the exported folder; an MLflow model holds it as artifacts/counter."""


@dataclass(frozen=True)
class Count:
    """The answer for one photo."""

    quantity: int
    confidence: float
    """Probability of that quantity."""
    probabilities: dict[int, float]
    """Of every quantity of the task; they sum to 1."""


class Counter:
    """An exported model, loaded."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        """Load counter.onnx and counter.json from a folder.

        Args:
            folder: as written by the export.
            threads: of one forward pass. One by default: with more, passes stall as soon as the machine is shared.

        Raises:
            StocktakeError: nothing there, damaged, or of a newer format.
        """
        try:
            description = json.loads((folder / "counter.json").read_text())
            if description["format"] > NEWEST_FORMAT:
                raise StocktakeError(
                    f"{folder} has format {description['format']}; this version reads up to {NEWEST_FORMAT}: upgrade"
                )
            self.labels = tuple(int(label) for label in description["labels"])
            self.size = int(description["preprocessing"]["size"])
            self._temperature = float(description["calibration"]["temperature"])
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            graph = (folder / "counter.onnx").read_bytes()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StocktakeError(f"{folder} holds no exported model: {error}") from None
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors have no class in common
            reason = str(error).splitlines()[0]
            raise StocktakeError(f"{folder} holds no exported model: counter.onnx is damaged ({reason})") from None
        classes = self._session.get_outputs()[0].shape[-1]
        if classes != len(self.labels):
            raise StocktakeError(
                f"{folder} holds no exported model: counter.json has {len(self.labels)} labels, counter.onnx {classes}"
            )

    def count(self, photos: Sequence[bytes]) -> list[Count]:
        """The answers for JPEG, PNG or WebP photos, in order.

        Raises:
            PhotoError: one of them cannot be used.
        """
        if not photos:
            return []
        prepared = np.stack([prepare(decode(photo), self.size) for photo in photos])
        answers = []
        for row in self.probabilities(prepared):
            best = int(row.argmax())
            shares = {label: float(share) for label, share in zip(self.labels, row, strict=True)}
            answers.append(Count(self.labels[best], float(row[best]), shares))
        return answers

    def probabilities(self, prepared: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """(n, len(labels)) of prepared photos (n, size, size, 3)."""
        (logits,) = self._session.run(["logits"], {"photos": prepared})
        scaled = np.asarray(logits, dtype=np.float64) / self._temperature
        shifted = np.exp(scaled - scaled.max(1, keepdims=True))
        shares: npt.NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
        return shares
