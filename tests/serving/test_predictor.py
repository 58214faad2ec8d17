from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from hostile_requests import png_header
from stocktake.data.images import PhotoError
from stocktake.errors import StocktakeError
from stocktake.models.export import export_model
from stocktake.models.inference import predict
from stocktake.serving.predictor import CHUNK, ENGINES, MANY_PIXELS, MAX_SIDE, Predictor
from tiny_bins import draw_bin, tiny_model

PHOTOS = [draw_bin(quantity, 900) for quantity in (1, 2, 3)]
Change = Callable[..., Path]


@pytest.fixture
def change(exported_model: Path, tmp_path: Path) -> Change:
    """change(labels=[1, 2]): a copy of the exported model with other values in model.json."""
    for name in ("model.onnx", "model.json"):
        (tmp_path / name).write_bytes((exported_model / name).read_bytes())

    def write(**values: Any) -> Path:
        description = json.loads((exported_model / "model.json").read_text())
        (tmp_path / "model.json").write_text(json.dumps(description | values))
        return tmp_path

    return write


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_photos_are_counted_as_torch_counts_them(exported_model: Path, few_bins) -> None:
    bins = few_bins.manifest.bins
    predictions = Predictor(exported_model).predict([few_bins.manifest.source.photo(bin_id) for bin_id in bins["id"]])
    model = tiny_model("pca_svm", few_bins)
    expected = predict(model, few_bins.photos, bins["hash"].tolist(), 8, torch.device("cpu"))
    probabilities = np.array([list(prediction.probabilities.values()) for prediction in predictions])
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    for prediction, row in zip(predictions, expected, strict=True):
        assert prediction.quantity == row.argmax() + 1
        assert list(prediction.probabilities) == [1, 2, 3]
        assert prediction.confidence == max(prediction.probabilities.values())
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert len({prediction.quantity for prediction in predictions}) > 1
    assert Predictor(exported_model).predict([]) == []


def test_png_and_webp_are_photos_too(exported_model: Path) -> None:
    files = []
    for format in ("PNG", "WEBP"):
        file = io.BytesIO()
        Image.open(io.BytesIO(PHOTOS[1])).save(file, format, lossless=True)
        files.append(file.getvalue())
    png, webp = Predictor(exported_model).predict(files)
    assert png == webp


@pytest.mark.parametrize(
    "photo",
    [b"", b"no photo", PHOTOS[0][:300], png_header(1, 1_000_000), b"\xff\xd8" + b"\xff\xda" * 101],
    ids=["empty", "text", "truncated", "side", "scans"],
)
def test_a_bad_photo_is_refused(photo: bytes, exported_model: Path) -> None:
    with pytest.raises(PhotoError, match="photo"):
        Predictor(exported_model).predict([PHOTOS[0], photo])


def test_the_pixels_of_a_photo_are_bounded_before_it_is_decoded(exported_model: Path) -> None:
    predictor = Predictor(exported_model, max_pixels=2 * MANY_PIXELS)
    with pytest.raises(PhotoError, match="2000x2001"):
        predictor.predict([png_header(2000, 2001)])
    with pytest.raises(PhotoError, match="x10 pixels"):
        predictor.predict([png_header(MAX_SIDE + 1, 10)])
    file = io.BytesIO()
    Image.open(io.BytesIO(PHOTOS[0])).resize((2000, 1500)).save(file, "JPEG")
    assert len(predictor.predict([file.getvalue()] * 2)) == 2  # decoded one at a time


@pytest.mark.parametrize("kind", ["majority", "network"])
def test_the_engines_agree(kind: str, few_bins, tmp_path: Path) -> None:
    export_model(tiny_model(kind, few_bins), tmp_path)
    prepared = few_bins.photos.read(few_bins.manifest.bins["hash"].tolist())
    openvino, onnxruntime = (Predictor(tmp_path, engine=engine) for engine in ENGINES)
    assert [openvino.engine.split()[0], onnxruntime.engine.split()[0]] == list(ENGINES)
    np.testing.assert_allclose(openvino.probabilities(prepared), onnxruntime.probabilities(prepared), atol=1e-4)


def test_without_openvino_it_is_onnxruntime_and_without_either_an_error(
    exported_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Predictor(exported_model).engine.startswith("openvino ")
    monkeypatch.setattr("stocktake.serving.predictor.find_spec", lambda name: name == "onnxruntime" or None)
    assert Predictor(exported_model).engine.startswith("onnxruntime ")
    monkeypatch.setattr("stocktake.serving.predictor.find_spec", lambda _: None)
    with pytest.raises(StocktakeError, match=r"pip install 'stocktake\[serving\]'"):
        Predictor(exported_model)


def test_a_process_outlives_a_predictor_that_another_thread_drops(exported_model: Path) -> None:
    """Seen as a crash at the next child's end: OpenVINO's plugin had taken the stack for signals with it."""
    code = (
        "import gc, pathlib, signal, subprocess, sys, threading\n"
        "from stocktake.serving.predictor import Predictor\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "predictors = [Predictor(pathlib.Path(sys.argv[1]), engine='openvino')]\n"
        "thread = threading.Thread(target=lambda: (predictors.clear(), gc.collect()))\n"
        "thread.start(), thread.join()\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "print(sorted({'torch', 'torchvision', 'pytorch_lightning', 'sklearn', 'mlflow', 'pandas'} & {*sys.modules}))\n"
    )
    done = run(code, exported_model)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[]\n", "libraries of training were loaded"


def test_several_threads_get_their_own_answers(exported_model: Path) -> None:
    predictor = Predictor(exported_model, threads=2)
    photos = [draw_bin(quantity, seed) for seed in range(40, 50) for quantity in (1, 2, 3)]
    expected = [prediction.probabilities for prediction in predictor.predict(photos)]
    with ThreadPoolExecutor(8) as threads:
        answered = [alone[0].probabilities for alone in threads.map(lambda photo: predictor.predict([photo]), photos)]
    for alone, together in zip(answered, expected, strict=True):
        assert alone == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.999])
def test_the_conformal_set_has_what_is_likely_enough(threshold: float, change: Change) -> None:
    folder = change(calibration={"temperature": 1.0, "set_threshold": threshold})
    for prediction in Predictor(folder).predict(PHOTOS):
        likely = {label for label, share in prediction.probabilities.items() if share >= threshold}
        assert set(prediction.likely_quantities) == likely | {prediction.quantity}


def test_answers_bear_the_models_version(exported_model: Path, change: Change, tmp_path: Path) -> None:
    assert Predictor(exported_model, version="stocktake/3").predict(PHOTOS[:1])[0].model_version == "stocktake/3"
    version = Predictor(exported_model).version
    (change() / "model.json").write_bytes((exported_model / "model.json").read_bytes())
    assert Predictor(tmp_path).version == version, "of the same files it is the same"
    assert Predictor(change(n=1)).version != version


def test_an_older_export_is_still_served(change: Change) -> None:
    (prediction,) = Predictor(change(format=1, calibration={"temperature": 1.0})).predict(PHOTOS[:1])
    assert prediction.likely_quantities == (1, 2, 3), "of a set nothing was fitted"


def test_temperature_softens_and_keeps_the_answer(exported_model: Path, change: Change) -> None:
    softened = Predictor(change(calibration={"temperature": 4.0}))
    (sharp,), (soft,) = Predictor(exported_model).predict(PHOTOS[2:]), softened.predict(PHOTOS[2:])
    assert soft.quantity == sharp.quantity
    assert soft.confidence < sharp.confidence


def test_a_newer_format_asks_for_an_upgrade(change: Change) -> None:
    with pytest.raises(StocktakeError, match="format 3; this version reads up to 2: upgrade"):
        Predictor(change(format=3))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.json", b""),
        ("model.json", b"[]"),
        ("model.json", b"{}"),
        ("model.json", b'{"format": "one"}'),
        ("model.json", b"[" * 100_000),
        ("model.json", b" " * 1_000_001),
        ("model.onnx", b""),
        ("model.onnx", b"not a graph"),
        ("model.onnx", None),
    ],
)
def test_a_damaged_model_is_refused_by_its_folder(file: str, content: bytes | None, change: Change) -> None:
    path = change() / file
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(StocktakeError, match="holds no exported model") as caught:
        Predictor(path.parent)
    assert str(path.parent) in str(caught.value)
    path.unlink()
    with pytest.raises(StocktakeError, match="holds no exported model"):
        Predictor(path.parent)


@pytest.mark.parametrize(
    "values",
    [
        {"engine": "os.path"},
        {"engine": "antigravity"},
        {"precision": "int4"},
        {"labels": [1, 2]},
        {"labels": [1, 2, 2]},
        {"labels": ["1", 2, 3]},
        {"labels": []},
        {"preprocessing": {"size": 10**9}},
        {"preprocessing": {"size": 1.5}},
        {"calibration": {"temperature": 0}},
        {"calibration": {"temperature": float("nan")}},
        {"calibration": {"temperature": 1e300}},
        {"calibration": {"temperature": 1.0, "set_threshold": 2}},
    ],
    ids=json.dumps,
)
def test_values_out_of_bounds_are_refused(values: dict[str, Any], change: Change) -> None:
    """A model from somebody else: its engine names no module to import, its sizes fill no memory."""
    with pytest.raises(StocktakeError, match="holds no exported model"):
        Predictor(change(**values))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
def test_a_graph_with_data_in_other_files_is_refused(place: str, change: Change, tmp_path: Path) -> None:
    """It would read any file of the machine into the answers."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(12))
    graph = onnx.load(change() / "model.onnx")
    tensor = onnx.TensorProto(name="stolen", data_type=onnx.TensorProto.FLOAT, dims=[3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(secret))
    if place == "initializer":
        graph.graph.initializer.append(tensor)
    else:
        constant = onnx.helper.make_node("Constant", [], ["stolen"], value=tensor)
        body = onnx.helper.make_graph([constant], "body", [], [])
        inner = onnx.helper.make_node("If", ["photos"], ["x"], then_branch=body, else_branch=body)
        graph.graph.node.append(constant if place == "constant" else inner)
    (change() / "model.onnx").write_bytes(graph.SerializeToString())
    for engine in ENGINES:
        with pytest.raises(StocktakeError, match="other files"):
            Predictor(change(), engine=engine)


def test_photos_are_predicted_in_chunks_and_a_bad_one_is_an_error_in_its_place(exported_model: Path) -> None:
    taken: list[int] = []

    def photos() -> Iterator[bytes]:
        for number in range(3 * CHUNK):
            taken.append(number)
            yield b"no photo" if number == 1 else PHOTOS[number % 3]

    outcomes = Predictor(exported_model).predict_each(photos())
    first = [next(outcomes) for _ in range(CHUNK)]
    assert len(taken) == CHUNK
    assert [isinstance(outcome, PhotoError) for outcome in first] == [number == 1 for number in range(CHUNK)]
    assert len(list(outcomes)) == 2 * CHUNK
