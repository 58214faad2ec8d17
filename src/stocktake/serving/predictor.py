"""Photo bytes to quantity, confidence and probabilities. Needs numpy, Pillow and an engine; neither torch nor mlflow.

The engine is OpenVINO where it is installed, else ONNX Runtime. On processors with bfloat16 instructions OpenVINO
computes in bfloat16, about twice as fast, if the export check found that this model's answers stay the same.

This file, data/images.py and errors.py are copied into every logged model: they import nothing else of the package.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from stocktake.data.images import FORMATS, PhotoError, decode, resize_to_square
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


class Predictor:
    """An exported model, loaded. Its methods may be called from several threads at once."""

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
            folder: as written by the export, or an MLflow model folder with one in it.
            threads: of one forward pass. One by default: with more, passes stall as soon as the machine is shared.
            version: model_version of the predictions. Default: the first 12 digits of the files' SHA-256.
            engine: which one computes. Default: the one that model.json asks for, else the first that is installed.
            precision: of OpenVINO; bf16 where the processor has it. Default: what the export check found to be equal.

        Raises:
            StocktakeError: no model, a damaged one, values out of bounds, a newer format, or no engine is installed.
        """
        folder = exported_folder(folder)
        try:
            text = _read(folder / DESCRIPTION, MAX_DESCRIPTION_BYTES)
            graph = _read(folder / GRAPH, MAX_GRAPH_BYTES)
            self.description = _checked_description(json.loads(text))
        except _NewerFormatError as error:
            raise StocktakeError(f"{folder} {error}") from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StocktakeError(f"{folder} holds no exported model: {error}") from None
        self.labels: tuple[int, ...] = tuple(self.description["labels"])
        self.size: int = self.description["preprocessing"]["size"]
        self.temperature = float(self.description["calibration"]["temperature"])
        self.set_threshold = float(self.description["calibration"].get("set_threshold", 0.0))
        self.version = version or digest(text, graph)
        required: Engine | None = self.description.get("engine")
        chosen = engine or required or next((name for name in ENGINES if find_spec(name)), None)
        if chosen == required and required and not find_spec(required):
            raise StocktakeError(
                f"the model in {folder} needs {required}, which is not installed: pip install {required}"
            )
        if chosen is None:
            raise StocktakeError("neither openvino nor onnxruntime is installed: pip install 'stocktake[serving]'")
        try:
            refuse_external_data(graph)
            load = _openvino if chosen == "openvino" else _onnxruntime
            precision = precision or self.description.get("precision", "f32")
            self._forward, classes, self.engine = load(graph, threads, precision)
        except Exception as error:  # the engines' errors have no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StocktakeError(
                f"{folder} holds no exported model that {chosen} can load: {GRAPH} is damaged, or has an operator or "
                f"data that are not supported ({reason[:300]})"
            ) from None
        if classes != len(self.labels):
            raise StocktakeError(
                f"{folder} holds no exported model: {DESCRIPTION} has {len(self.labels)} labels, {GRAPH} {classes}"
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

    def predict_each(
        self, photos: Iterable[bytes], map: Callable[..., Iterable[Any]] = map
    ) -> Iterator[Prediction | PhotoError]:
        """The prediction, or what is wrong with it, of each photo in order; CHUNK photos are in memory at once.

        Args:
            photos: bytes of JPEG, PNG or WebP files.
            map: decodes the photos of a chunk; an executor's `map` uses its threads.
        """
        remaining = iter(photos)
        while chunk := list(islice(remaining, CHUNK)):
            prepared = list(map(self.prepare_or_error, chunk))
            usable = [photo for photo in prepared if not isinstance(photo, PhotoError)]
            predictions = iter(self.predictions(self.probabilities(np.stack(usable))) if usable else ())
            yield from (photo if isinstance(photo, PhotoError) else next(predictions) for photo in prepared)

    def prepare(self, photo: bytes) -> npt.NDArray[np.uint8]:
        """(size, size, 3): the photo as the graph takes it.

        Raises:
            PhotoError: it cannot be used.
        """
        check_header(photo)
        return resize_to_square(decode(photo), self.size)

    def prepare_or_error(self, photo: bytes) -> npt.NDArray[np.uint8] | PhotoError:
        """As `prepare`, with the error as the result."""
        try:
            return self.prepare(photo)
        except PhotoError as error:
            return error

    def probabilities(self, prepared: npt.NDArray[np.uint8], *, calibrated: bool = True) -> npt.NDArray[np.float64]:
        """(n, len(labels)), calibrated or the network's own, of prepared photos (n, size, size, 3)."""
        scaled = self._forward(prepared).astype(np.float64) / (self.temperature if calibrated else 1.0)
        shifted = np.exp(scaled - scaled.max(1, keepdims=True))
        shares: npt.NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
        return shares

    def predictions(self, probabilities: npt.NDArray[np.float64]) -> list[Prediction]:
        """A prediction a row of probabilities."""
        predictions = []
        for row in probabilities:
            best = int(row.argmax())
            shares = {label: float(share) for label, share in zip(self.labels, row, strict=True)}
            likely = tuple(label for label, share in shares.items() if share >= self.set_threshold)
            quantity = self.labels[best]
            predictions.append(Prediction(quantity, float(row[best]), shares, likely or (quantity,), self.version))
        return predictions


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


def check_header(photo: bytes) -> int:
    """Pixels of a photo by its header; 0 where it cannot be read: decoding says why.

    Raises:
        PhotoError: a side is too long, or a JPEG has too many scans.
    """
    if photo.startswith(b"\xff\xd8") and photo.count(b"\xff\xda") > MAX_SCANS:
        raise PhotoError(f"photo has more than {MAX_SCANS} scans")
    try:
        with Image.open(io.BytesIO(photo), formats=FORMATS) as opened:
            width, height = opened.size
    except Exception:  # Pillow's readers raise many kinds of errors on hostile bytes
        return 0
    if max(width, height) > MAX_SIDE:
        raise PhotoError(f"photo has {width}x{height} pixels; a side may have {MAX_SIDE}")
    return width * height


class _NewerFormatError(Exception):
    pass


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} has more than {limit} bytes")
    return content


def _checked_description(content: Any) -> dict[str, Any]:
    """The content of model.json, its values within bounds."""
    if content["format"] > NEWEST_FORMAT:
        raise _NewerFormatError(
            f"has format {content['format']}; this version reads up to {NEWEST_FORMAT}: upgrade stocktake"
        )
    labels, size, calibration = content["labels"], content["preprocessing"]["size"], content["calibration"]
    if not 1 <= len(labels) <= 1000 or not all(type(label) is int and 0 <= label <= 100_000 for label in labels):
        raise ValueError("labels must be 1 to 1000 whole numbers up to 100,000")
    if len(set(labels)) < len(labels):
        raise ValueError("a label is there twice")
    if type(size) is not int or not 8 <= size <= 4096:
        raise ValueError(f"size {size!r} must be from 8 to 4096")
    for name, least, most in (("temperature", 0.01, 100.0), ("set_threshold", 0.0, 1.0)):
        value = float(calibration.get(name, 0.0) if name == "set_threshold" else calibration[name])
        if not isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} {value:g} must be from {least:g} to {most:g}")
    if content.get("engine") not in (None, *ENGINES):
        raise ValueError(f"engine {content['engine']!r} must be one of {', '.join(ENGINES)}")
    if content.get("precision", "f32") not in ("f32", "bf16"):
        raise ValueError(f"precision {content['precision']!r} must be f32 or bf16")
    checked: dict[str, Any] = content
    return checked


_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Messages of onnx.proto that can hold a tensor: field number -> message."""
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto


def refuse_external_data(graph: bytes) -> None:
    """Refuse an ONNX graph with tensors in other files: the engines would open any path that it names.

    Raises:
        ValueError: it has such tensors, or is no ONNX graph.
    """
    messages = [("model", memoryview(graph))]
    while messages:
        kind, content = messages.pop()
        for number, value in _fields(content):
            if kind == "tensor":
                if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                    raise ValueError("it has data in other files, which are never opened")
            elif (inner := _MESSAGES[kind].get(number)) and isinstance(value, memoryview):
                messages.append((inner, value))


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of a protobuf message's fields."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            if place >= len(content) or shift > 63:
                raise ValueError("it is no ONNX graph")
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while place < len(content):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError("it is no ONNX graph")
        length = varint() if wire_type == 2 else 8 if wire_type == 1 else 4
        if place + length > len(content):
            raise ValueError("it is no ONNX graph")
        yield number, content[place : place + length]
        place += length


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
