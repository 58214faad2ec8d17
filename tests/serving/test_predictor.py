from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
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
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.models.inference import predict
from stocktake.serving.predictor import CHUNK, ENGINES, Prediction, Predictor
from tiny_bins import draw_bin, tiny_model


@pytest.fixture(scope="module")
def model(few_bins) -> CountingModel:
    return tiny_model("pca_svm", few_bins)


@pytest.fixture(scope="module")
def exported(model: CountingModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(model, folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """An exported folder to damage."""
    for name in ("model.onnx", "model.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    return tmp_path


def test_bytes_are_counted_as_torch_counts_them(model: CountingModel, exported: Path, few_bins) -> None:
    bins = few_bins.manifest.bins
    photos = [few_bins.manifest.source.photo(bin_id) for bin_id in bins["id"]]
    counts = Predictor(exported).predict(photos)
    expected = predict(model, few_bins.photos, bins["hash"].tolist(), 8, torch.device("cpu"))
    found = np.array([list(count.probabilities.values()) for count in counts])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for count, row in zip(counts, expected, strict=True):
        assert isinstance(count, Prediction)
        assert count.quantity == row.argmax() + 1
        assert list(count.probabilities) == [1, 2, 3]
        assert count.confidence == max(count.probabilities.values())
        assert sum(count.probabilities.values()) == pytest.approx(1)
    assert len({count.quantity for count in counts}) > 1
    assert Predictor(exported).predict([]) == []


def test_a_photo_alone_and_among_others_has_one_answer(exported: Path) -> None:
    counter = Predictor(exported, threads=2)
    photos = [draw_bin(quantity, 900) for quantity in (1, 2, 3)]
    together = counter.predict(photos)
    for photo, count in zip(photos, together, strict=True):
        (alone,) = counter.predict([photo])
        assert alone.quantity == count.quantity
        assert alone.confidence == pytest.approx(count.confidence, abs=1e-5)


def test_png_and_webp_are_photos_too(exported: Path) -> None:
    photo = Image.open(io.BytesIO(draw_bin(2, 901)))
    files = []
    for form in ("PNG", "WEBP"):
        file = io.BytesIO()
        photo.save(file, form, lossless=True)
        files.append(file.getvalue())
    first, second = Predictor(exported).predict(files)
    assert first == second


@pytest.mark.parametrize("photo", [b"", b"no photo", draw_bin(1, 902)[:300]], ids=["empty", "text", "truncated"])
def test_a_bad_photo_is_told(photo: bytes, exported: Path) -> None:
    with pytest.raises(PhotoError, match="photo"):
        Predictor(exported).predict([draw_bin(1, 903), photo])


@pytest.mark.parametrize("kind", ["majority", "pca_svm", "network"])
def test_the_engines_agree(kind: str, few_bins, tmp_path: Path) -> None:
    export_model(tiny_model(kind, few_bins), tmp_path)
    prepared = few_bins.photos.read(few_bins.manifest.bins["hash"].tolist())
    one, other = Predictor(tmp_path, engine="openvino"), Predictor(tmp_path, engine="onnxruntime")
    assert one.engine.startswith("openvino ")
    assert other.engine.startswith("onnxruntime ")
    np.testing.assert_allclose(one.probabilities(prepared), other.probabilities(prepared), atol=1e-4)


def test_without_openvino_it_is_onnxruntime_and_without_either_it_is_told(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(draw_bin(2, 905))
    code = (
        "import sys, pathlib, importlib.util as u\n"
        "missing = sys.argv[3:]\n"
        "import stocktake.serving.predictor as counter\n"
        "counter.find_spec = lambda name: None if name in missing else u.find_spec(name)\n"
        "one = counter.Predictor(pathlib.Path(sys.argv[1]))\n"
        "print(one.engine.split()[0], one.predict([pathlib.Path(sys.argv[2]).read_bytes()])[0].quantity)\n"
    )

    def without(*missing: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(exported), str(tmp_path / "photo.jpg"), *missing]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    (count,) = Predictor(exported).predict([draw_bin(2, 905)])
    assert without().stdout == f"openvino {count.quantity}\n"
    assert without("openvino").stdout == f"onnxruntime {count.quantity}\n"
    assert r"pip install 'stocktake[serving]'" in without("openvino", "onnxruntime").stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_outlives_a_counter_that_another_thread_lets_go(exported: Path, engine: str) -> None:
    """Seen as a crash at the next child's end: OpenVINO's plugin had taken the stack for signals with it."""
    code = (
        "import gc, pathlib, signal, subprocess, sys, threading\n"
        "from stocktake.serving.predictor import Predictor\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "counters = [Predictor(pathlib.Path(sys.argv[1]), engine=sys.argv[2])]\n"
        "thread = threading.Thread(target=lambda: (counters.clear(), gc.collect()))\n"
        "thread.start(), thread.join()\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
    )
    command = [sys.executable, "-c", code, str(exported), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_several_threads_get_their_own_answers(exported: Path) -> None:
    counter = Predictor(exported, threads=2)
    photos = [draw_bin(quantity, seed) for seed in range(40, 60) for quantity in (1, 2, 3)]
    expected = [count.probabilities for count in counter.predict(photos)]
    with ThreadPoolExecutor(8) as threads:
        found = [counts[0].probabilities for counts in threads.map(lambda photo: counter.predict([photo]), photos)]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_conformal_set_holds_what_is_likely_enough(exported: Path, copied: Path) -> None:
    photos = [draw_bin(quantity, 906) for quantity in (1, 2, 3)]
    description = json.loads((copied / "model.json").read_text())
    for threshold in (0.0, 0.15, 0.999):
        calibration = {"temperature": 1.0, "set_threshold": threshold}
        (copied / "model.json").write_text(json.dumps(description | {"calibration": calibration}))
        for count in Predictor(copied).predict(photos):
            likely = {label for label, share in count.probabilities.items() if share >= threshold}
            assert set(count.likely_quantities) == likely | {count.quantity}


def test_answers_bear_the_models_version(exported: Path, copied: Path) -> None:
    photo = draw_bin(1, 907)
    assert Predictor(exported, version="stocktake/3").predict([photo])[0].model_version == "stocktake/3"
    own = Predictor(exported).version
    assert own == Predictor(copied).version, "of the same files it is the same"
    (copied / "model.json").write_text((copied / "model.json").read_text() + " ")
    assert own != Predictor(copied).version


def test_an_older_export_is_still_served(copied: Path) -> None:
    description = json.loads((copied / "model.json").read_text())
    older = {key: value for key, value in description.items() if key not in ("precision", "check")}
    (copied / "model.json").write_text(json.dumps(older | {"format": 1, "calibration": {"temperature": 1.0}}))
    (count,) = Predictor(copied).predict([draw_bin(3, 908)])
    assert count.likely_quantities == (1, 2, 3), "of a set nothing was fitted"


def test_temperature_softens_and_keeps_the_answer(exported: Path, copied: Path) -> None:
    description = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps(description | {"calibration": {"temperature": 4.0}}))
    photo = draw_bin(3, 904)
    (sharp,), (soft,) = Predictor(exported).predict([photo]), Predictor(copied).predict([photo])
    assert soft.quantity == sharp.quantity
    assert soft.confidence < sharp.confidence


def test_a_newer_format_asks_for_an_upgrade(copied: Path) -> None:
    description = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps(description | {"format": 3}))
    with pytest.raises(StocktakeError, match="format 3; this version reads up to 2: upgrade"):
        Predictor(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "one"}'])
def test_a_damaged_description_is_told(content: str, copied: Path) -> None:
    (copied / "model.json").write_text(content)
    with pytest.raises(StocktakeError, match="holds no exported model"):
        Predictor(copied)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "truncated"])
def test_a_damaged_graph_is_told(content: bytes | None, copied: Path) -> None:
    graph = copied / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(StocktakeError, match="holds no exported model") as caught:
        Predictor(copied)
    assert str(copied) in str(caught.value)


def test_labels_of_another_graph_are_told(copied: Path) -> None:
    description = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps(description | {"labels": [1, 2]}))
    with pytest.raises(StocktakeError, match=r"model\.json has 2 labels, model\.onnx 3"):
        Predictor(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "os.path"},
        {"engine": "antigravity"},
        {"precision": "int4"},
        {"labels": [1, 2, 2]},
        {"labels": ["1", 2, 3]},
        {"labels": []},
        {"preprocessing": {"size": 10**9}},
        {"preprocessing": {"size": 1.5}},
        {"calibration": {"temperature": 0}},
        {"calibration": {"temperature": -1.0}},
        {"calibration": {"temperature": float("nan")}},
        {"calibration": {"temperature": 1e300}},
        {"calibration": {"temperature": 1.0, "set_threshold": 2}},
    ],
    ids=json.dumps,
)
def test_values_out_of_bounds_are_refused(changes: dict[str, Any], copied: Path) -> None:
    """A model from somebody else: its engine names no module to import, its sizes fill no memory."""
    path = copied / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = set(sys.modules)
    with pytest.raises(StocktakeError, match="holds no exported model"):
        Predictor(copied)
    assert "antigravity" not in set(sys.modules) - before


def test_a_deep_or_endless_description_is_refused(copied: Path) -> None:
    for content in ("[" * 100_000, " " * 1_000_001):
        (copied / "model.json").write_text(content)
        with pytest.raises(StocktakeError, match="holds no exported model"):
            Predictor(copied)


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_with_data_in_other_files_is_refused(place: str, engine: Any, copied: Path, tmp_path: Path) -> None:
    """It would read any file of the machine into the answers."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(12))
    graph = onnx.load(copied / "model.onnx")
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
    (copied / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(StocktakeError, match="other files"):
        Predictor(copied, engine=engine)


def test_a_photo_with_a_huge_side_is_refused_before_it_is_decoded(exported: Path) -> None:
    photo = png_header(1, 1_000_000)
    start = time.process_time()
    (outcome,) = Predictor(exported).predict_each([photo])
    assert isinstance(outcome, PhotoError)
    assert "1x1000000" in str(outcome)
    assert time.process_time() - start < 2


def test_photos_are_predicted_in_chunks_and_a_bad_one_is_an_error_in_its_place(exported: Path) -> None:
    taken: list[int] = []

    def photos() -> Iterator[bytes]:
        for number in range(3 * CHUNK):
            taken.append(number)
            yield b"no photo" if number == 1 else draw_bin(1 + number % 3, 910)

    outcomes = Predictor(exported).predict_each(photos())
    first = [next(outcomes) for _ in range(CHUNK)]
    assert len(taken) == CHUNK
    assert [isinstance(outcome, PhotoError) for outcome in first] == [number == 1 for number in range(CHUNK)]
    assert len(list(outcomes)) == 2 * CHUNK


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match="holds no exported model"):
        Predictor(tmp_path / "nowhere")


def test_counting_loads_no_training_library() -> None:
    heavy = "{'torch', 'torchvision', 'pytorch_lightning', 'sklearn', 'mlflow', 'pandas'}"
    code = f"import sys, stocktake.serving.predictor; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
