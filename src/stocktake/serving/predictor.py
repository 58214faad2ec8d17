"""Photo bytes to quantity, confidence and probabilities. Needs numpy, Pillow, pydantic and an engine; neither torch nor
mlflow.

The engine is OpenVINO where it is installed, else ONNX Runtime. On processors with bfloat16 instructions OpenVINO
computes in bfloat16, about twice as fast, if the export check found that this model's answers stay the same.

This file, data/images.py and errors.py are copied into every logged model: they import nothing else of the package.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, Field

from stocktake.data.images import FORMATS, LARGEST_PHOTO, PhotoError, decode, resize_to_square
from stocktake.errors import StocktakeError

NEWEST_FORMAT = 2
FOLDER = "exported"
"""Name of the exported folder; an MLflow model has it as artifacts/exported."""
GRAPH, DESCRIPTION = "model.onnx", "model.json"
Engine = Literal["openvino", "onnxruntime"]
Precision = Literal["f32", "bf16"]
ENGINES: tuple[Engine, ...] = ("openvino", "onnxruntime")
"""In the order of preference."""
CHUNK = 8
"""Photos of a forward pass: larger ones are no faster on a CPU."""
MAX_SIDE = 16_384
"""Pixels. Photos with a longer side are refused before they are decoded."""
MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each costs the decoder a pass over all pixels."""
MANY_PIXELS = 2_000_000
"""Photos with more are decoded one at a time: a decoder needs up to 15 bytes a pixel while it works."""
MAX_DESCRIPTION_BYTES = 1_000_000
MAX_GRAPH_BYTES = 2**31
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
    """The conformal set: contains the true quantity of as many photos as the export's `set_level` says."""
    model_version: str
    """Version of the model that answered."""


class _Preprocessing(BaseModel):
    size: Annotated[int, Field(strict=True, ge=8, le=4096)]


class _Calibration(BaseModel):
    temperature: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
    set_threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0


class _Description(BaseModel):
    """What is read of model.json, which may come from somebody else."""

    labels: Annotated[list[Annotated[int, Field(strict=True, ge=0, le=100_000)]], Field(min_length=1, max_length=1000)]
    preprocessing: _Preprocessing
    calibration: _Calibration
    engine: Engine | None = None
    precision: Precision = "f32"


class Predictor:
    """An exported model, loaded. May be used by several threads at once; forward passes run one at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int = 1,
        version: str | None = None,
        engine: Engine | None = None,
        precision: Precision | None = None,
        max_pixels: int = LARGEST_PHOTO,
    ) -> None:
        """Load model.onnx and model.json.

        Args:
            folder: as written by the export, or an MLflow model folder with one in it.
            threads: of one forward pass. One by default: with more, passes stall as soon as the machine is shared.
            version: model_version of the predictions. Default: the first 12 digits of the files' SHA-256.
            engine: which one computes. Default: the one that model.json names, else the first that is installed.
            precision: of OpenVINO; bf16 where the processor has it. Default: what the export check found to be equal.
            max_pixels: of a photo; larger ones are refused before they are decoded.

        Raises:
            StocktakeError: no model, a damaged one, values out of bounds, a newer format, or no engine is installed.
        """
        folder = exported_folder(folder)
        try:
            text = _read(folder / DESCRIPTION, MAX_DESCRIPTION_BYTES)
            graph = _read(folder / GRAPH, MAX_GRAPH_BYTES)
            self.description: dict[str, Any] = json.loads(text)
            if (format := self.description["format"]) > NEWEST_FORMAT:
                raise StocktakeError(
                    f"{folder} has format {format}; this version reads up to {NEWEST_FORMAT}: upgrade stocktake"
                )
            described = _Description.model_validate(self.description)
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StocktakeError(f"{folder} holds no exported model: {_one_line(error)}") from None
        self.labels = tuple(described.labels)
        self.size = described.preprocessing.size
        self.version = version or digest(text, graph)
        self._calibration, self._max_pixels = described.calibration, max_pixels
        self._engine_lock, self._large_photo = threading.Lock(), threading.Lock()
        chosen = engine or described.engine or next((name for name in ENGINES if find_spec(name)), None)
        if chosen is None or not find_spec(chosen):
            raise StocktakeError(
                f"the model in {folder} needs {chosen or ' or '.join(ENGINES)}, which is not installed: pip install "
                f"{chosen or repr('stocktake[serving]')}"
            )
        load = _openvino if chosen == "openvino" else _onnxruntime
        try:
            refuse_external_data(graph)
            self._forward, classes, self.engine = load(graph, threads, precision or described.precision)
        except Exception as error:  # the engines' errors have no class in common
            raise StocktakeError(
                f"{folder} holds no exported model that {chosen} can load: {GRAPH} is damaged, or has an operator or "
                f"data that are not supported ({_one_line(error)})"
            ) from None
        if not classes == len(self.labels) == len(set(self.labels)):
            raise StocktakeError(
                f"{folder} holds no exported model: {DESCRIPTION} has the labels {self.labels}, {GRAPH} {classes}"
            )

    def predict(self, photos: Sequence[bytes]) -> list[Prediction]:
        """The predictions for JPEG, PNG or WebP photos, in order.

        Raises:
            PhotoError: one of them cannot be used.
        """
        predictions = []
        for outcome in self.predict_each(photos):
            if isinstance(outcome, PhotoError):
                raise outcome
            predictions.append(outcome)
        return predictions

    def predict_each(self, photos: Iterable[bytes]) -> Iterator[Prediction | PhotoError]:
        """The prediction, or what is wrong with it, of each photo in order; CHUNK photos are in memory at once."""
        remaining = iter(photos)
        while chunk := list(islice(remaining, CHUNK)):
            prepared = [self._prepare_or_error(photo) for photo in chunk]
            usable = [photo for photo in prepared if not isinstance(photo, PhotoError)]
            predictions = map(self._prediction, self.probabilities(np.stack(usable)) if usable else ())
            yield from (photo if isinstance(photo, PhotoError) else next(predictions) for photo in prepared)

    def prepare(self, photo: bytes) -> npt.NDArray[np.uint8]:
        """(size, size, 3): the photo as the graph takes it.

        Raises:
            PhotoError: it cannot be used.
        """
        if photo.startswith(b"\xff\xd8") and photo.count(b"\xff\xda") > MAX_SCANS:
            raise PhotoError(f"photo has more than {MAX_SCANS} scans")
        width, height = _sides(photo)
        if max(width, height) > MAX_SIDE or width * height > self._max_pixels:
            raise PhotoError(
                f"photo has {width}x{height} pixels; a side may have {MAX_SIDE}, a photo {self._max_pixels}"
            )
        with self._large_photo if width * height > MANY_PIXELS else nullcontext():
            return resize_to_square(decode(photo), self.size)

    def probabilities(self, prepared: npt.NDArray[np.uint8], *, calibrated: bool = True) -> npt.NDArray[np.float64]:
        """(n, len(labels)), calibrated or the network's own, of prepared photos (n, size, size, 3)."""
        with self._engine_lock:
            logits = self._forward(prepared)
        scaled = logits.astype(np.float64) / (self._calibration.temperature if calibrated else 1.0)
        shifted = np.exp(scaled - scaled.max(1, keepdims=True))
        probabilities: npt.NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
        return probabilities

    def _prepare_or_error(self, photo: bytes) -> npt.NDArray[np.uint8] | PhotoError:
        try:
            return self.prepare(photo)
        except PhotoError as error:
            return error

    def _prediction(self, row: npt.NDArray[np.float64]) -> Prediction:
        probabilities = dict(zip(self.labels, row.tolist(), strict=True))
        quantity = self.labels[int(row.argmax())]
        likely = [label for label, share in probabilities.items() if share >= self._calibration.set_threshold]
        return Prediction(quantity, probabilities[quantity], probabilities, tuple(likely or [quantity]), self.version)


def record(outcome: Prediction | PhotoError, version: str) -> dict[str, Any]:
    """The one shape of an answer: in HTTP, in the MLflow model, in Spark.

    quantity, confidence, probabilities (by quantity, as text), likely_quantities, model_version, and error: the
    reason why a photo has no prediction, else empty (MLflow would hand Spark the text "None" for a null).
    """
    if isinstance(outcome, PhotoError):
        return {
            "quantity": None,
            "confidence": None,
            "probabilities": {},
            "likely_quantities": [],
            "model_version": version,
            "error": str(outcome),
        }
    return {
        "quantity": outcome.quantity,
        "confidence": outcome.confidence,
        "probabilities": {str(quantity): share for quantity, share in outcome.probabilities.items()},
        "likely_quantities": list(outcome.likely_quantities),
        "model_version": outcome.model_version,
        "error": "",
    }


def digest(description: bytes, graph: bytes) -> str:
    """The version of a model that is in no registry: 12 digits of the SHA-256 of its files."""
    return hashlib.sha256(description + graph).hexdigest()[:12]


def exported_folder(folder: Path) -> Path:
    """The folder with model.json: this one, or artifacts/exported of an MLflow model folder."""
    inside = folder / "artifacts" / FOLDER
    return inside if (inside / DESCRIPTION).is_file() else folder


def refuse_external_data(graph: bytes) -> None:
    """Refuse an ONNX graph with tensors in other files: the engines would open any path that it names.

    A tensor names its file under the key "location", which protobuf stores as it is.

    Raises:
        ValueError: the word occurs in the graph.
    """
    if b"location" in graph:
        raise ValueError("it has data in other files, which are never opened")


def _sides(photo: bytes) -> tuple[int, int]:
    """Width and height by the header; 0 where it cannot be read: decoding says why."""
    try:
        with Image.open(io.BytesIO(photo), formats=FORMATS) as opened:
            return opened.size
    except Exception:  # Pillow's readers raise many kinds of errors on hostile bytes
        return 0, 0


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} has more than {limit} bytes")
    return content


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@cache
def _openvino_core() -> Any:
    """The process's one core, which is never dropped.

    OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack, and frees that stack when the plugin
    is dropped, in whatever thread that happens: the first thread's next signal would then end the process.
    """
    import openvino

    return openvino.Core()


def _openvino(graph: bytes, threads: int, precision: Precision) -> tuple[_Forward, int, str]:
    core = _openvino_core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    classes = compiled.output("logits").partial_shape[-1].get_length()
    name = f"openvino {installed_version('openvino')} {used}"
    return lambda prepared: compiled({"photos": prepared})["logits"], classes, name


def _onnxruntime(graph: bytes, threads: int, _: Precision) -> tuple[_Forward, int, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    classes = session.get_outputs()[0].shape[-1]
    name = f"onnxruntime {installed_version('onnxruntime')} f32"
    return lambda prepared: session.run(["logits"], {"photos": prepared})[0], classes, name
