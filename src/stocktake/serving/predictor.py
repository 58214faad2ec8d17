"""Photo bytes to quantity and confidence. Needs numpy, Pillow and an engine; neither torch nor pickle.

The engine is OpenVINO where it is installed, else ONNX Runtime. On processors that can, OpenVINO computes in bfloat16,
about twice as fast, if the export found that this model answers alike then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stocktake.data.images import decode, prepare
from stocktake.errors import StocktakeError

NEWEST_FORMAT = 2
FOLDER = "exported"
"""Name of the exported folder; an MLflow model holds it as artifacts/exported."""
Engine = Literal["openvino", "onnxruntime"]
Precision = Literal["f32", "bf16"]
ENGINES: tuple[Engine, ...] = ("openvino", "onnxruntime")
"""In the order of preference."""
_Forward = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo."""

    quantity: int
    confidence: float
    """Calibrated probability of that quantity."""
    probabilities: dict[int, float]
    """Of every quantity of the task; they sum to 1."""
    likely_quantities: tuple[int, ...]
    """The conformal set: holds the recorded quantity of as many photos as the export's `set_level` says."""
    model_version: str
    """Which model answered."""


class Predictor:
    """An exported model, loaded. `predict` may be called from several threads at once."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int = 1,
        version: str | None = None,
        engine: Engine | None = None,
        precision: Precision | None = None,
    ) -> None:
        """Load model.onnx and model.json.

        Args:
            folder: as written by the export, or an MLflow model folder that holds it.
            threads: of one forward pass. One by default: with more, passes stall as soon as the machine is shared.
            version: what answers bear as model_version. Default: the first 12 digits of the files' SHA-256.
            engine: what computes. Default: the one that model.json asks for, else the first that is installed.
            precision: of OpenVINO; bf16 where the processor can. Default: what the export found to be good enough.

        Raises:
            StocktakeError: nothing there, damaged, of a newer format, or no engine is installed.
        """
        folder = exported_folder(folder)
        try:
            text, graph = (folder / "model.json").read_bytes(), (folder / "model.onnx").read_bytes()
            description = json.loads(text)
            if description["format"] > NEWEST_FORMAT:
                raise StocktakeError(
                    f"{folder} has format {description['format']}; this version reads up to {NEWEST_FORMAT}: upgrade"
                )
            self.labels = tuple(int(label) for label in description["labels"])
            self.size = int(description["preprocessing"]["size"])
            self.temperature = float(description["calibration"]["temperature"])
            self.set_threshold = float(description["calibration"].get("set_threshold", 0.0))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StocktakeError(f"{folder} holds no exported model: {error}") from None
        self.description: dict[str, Any] = description
        self.version = version or hashlib.sha256(text + graph).hexdigest()[:12]
        only: Engine | None = description.get("engine")
        chosen = engine or only or next((name for name in ENGINES if find_spec(name)), None)
        if chosen == only and only and not find_spec(only):
            raise StocktakeError(f"the model in {folder} needs {only}, which is not installed: pip install {only}")
        if chosen is None:
            raise StocktakeError("neither openvino nor onnxruntime is installed: pip install 'stocktake[serving]'")
        try:
            load = _openvino if chosen == "openvino" else _onnxruntime
            self._forward, classes, self.engine = load(graph, threads, precision or description.get("precision", "f32"))
        except Exception as error:  # the engines' errors have no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StocktakeError(
                f"{folder} holds no exported model that {chosen} can load: model.onnx is damaged, or has an operator "
                f"that it lacks ({reason[:300]})"
            ) from None
        if classes != len(self.labels):
            raise StocktakeError(
                f"{folder} holds no exported model: model.json has {len(self.labels)} labels, model.onnx {classes}"
            )

    def predict(self, photos: Sequence[bytes]) -> list[Prediction]:
        """The answers for JPEG, PNG or WebP photos, in order.

        Raises:
            PhotoError: one of them cannot be used.
        """
        if not photos:
            return []
        return self.answers(self.probabilities(np.stack([self.prepare(photo) for photo in photos])))

    def prepare(self, photo: bytes) -> npt.NDArray[np.uint8]:
        """(size, size, 3): the photo as the graph takes it.

        Raises:
            PhotoError: it cannot be used.
        """
        return prepare(decode(photo), self.size)

    def probabilities(self, prepared: npt.NDArray[np.uint8], *, calibrated: bool = True) -> npt.NDArray[np.float64]:
        """(n, len(labels)), calibrated or the network's own, of prepared photos (n, size, size, 3)."""
        scaled = self._forward(prepared).astype(np.float64) / (self.temperature if calibrated else 1.0)
        shifted = np.exp(scaled - scaled.max(1, keepdims=True))
        shares: npt.NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
        return shares

    def answers(self, probabilities: npt.NDArray[np.float64]) -> list[Prediction]:
        """What rows of probabilities say."""
        answers = []
        for row in probabilities:
            best = int(row.argmax())
            shares = {label: float(share) for label, share in zip(self.labels, row, strict=True)}
            likely = tuple(label for label, share in shares.items() if share >= self.set_threshold)
            quantity = self.labels[best]
            answers.append(Prediction(quantity, float(row[best]), shares, likely or (quantity,), self.version))
        return answers


def exported_folder(folder: Path) -> Path:
    """Where model.json lies: in the folder, or in artifacts/exported of an MLflow model folder."""
    inside = folder / "artifacts" / FOLDER
    return inside if (inside / "model.json").is_file() else folder


@cache
def _openvino_core() -> Any:
    """The process's one core, which is never dropped.

    OpenVINO's CPU plugin gives the thread that loads it a stack for signals, and frees that stack when the plugin ends,
    in whatever thread that is: the first one's next signal would then end the process.
    """
    import openvino

    return openvino.Core()


def _openvino(graph: bytes, threads: int, precision: Precision) -> tuple[_Forward, int, str]:
    core = _openvino_core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    requests: list[Any] = []  # an infer request is for one thread at a time

    def forward(prepared: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            request = requests.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            return np.array(request.infer({"photos": prepared})["logits"], dtype=np.float32)
        finally:
            requests.append(request)

    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    classes = compiled.output("logits").partial_shape[-1].get_length()
    return forward, classes, f"openvino {installed_version('openvino')} {used}"


def _onnxruntime(graph: bytes, threads: int, _: Precision) -> tuple[_Forward, int, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def forward(prepared: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(session.run(["logits"], {"photos": prepared})[0], dtype=np.float32)

    return forward, session.get_outputs()[0].shape[-1], f"onnxruntime {installed_version('onnxruntime')} f32"
