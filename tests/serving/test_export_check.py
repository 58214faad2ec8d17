from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from stocktake.errors import StocktakeError
from stocktake.evaluation.calibration import temperature_scale
from stocktake.models.export import export_model
from stocktake.models.inference import predict
from stocktake.models.majority import fit_majority
from stocktake.serving.export_check import check_export
from stocktake.serving.predictor import Predictor
from stocktake.serving.pyfunc import save_pyfunc
from tiny_bins import draw_bin, tiny_model


class Exported:
    """An export of a model, with the photos and probabilities that it is held to."""

    def __init__(self, kind: str, bins, folder: Path) -> None:
        model = tiny_model(kind, bins)
        table = bins.manifest.bins
        self.folder, self.ids = folder, table["id"].tolist()
        self.prepared = bins.photos.read(table["hash"].tolist())
        raw = predict(model, bins.photos, table["hash"].tolist(), 8, torch.device("cpu"))
        self.expected = temperature_scale(raw, 1.7)
        export_model(model, folder, {"temperature": 1.7, "set_threshold": 0.2})

    def check(self, expected: np.ndarray | None = None):
        return check_export(self.folder, self.ids, self.prepared, self.expected if expected is None else expected)

    def described(self) -> dict:
        return json.loads((self.folder / "model.json").read_text())


@pytest.mark.parametrize("kind", ["majority", "pca_svm", "network"])
def test_an_export_of_every_kind_passes_with_every_engine(kind: str, few_bins, tmp_path: Path) -> None:
    exported = Exported(kind, few_bins, tmp_path)
    checks = exported.check()
    assert [check.engine.split()[0] for check in checks][:2] == ["openvino", "onnxruntime"]
    assert all(check.largest_difference < 1e-4 and not check.ties for check in checks if check.engine.endswith("f32"))
    described = exported.described()
    assert described["check"]["passed"] is True
    assert described["check"]["photos"] == len(exported.ids)
    assert set(described["check"]["engines"]) == {check.engine for check in checks}
    fast = [check for check in checks if check.engine.endswith("bf16")]
    assert described["precision"] == ("bf16" if fast and fast[0].passed else "f32")
    assert Predictor(tmp_path, engine="openvino").engine.endswith(described["precision"] if fast else "f32")


def test_an_export_that_answers_otherwise_is_refused(few_bins, tmp_path: Path) -> None:
    exported = Exported("pca_svm", few_bins, tmp_path)
    off = exported.expected.copy()
    off[3] = np.roll(off[3], 1)
    with pytest.raises(StocktakeError, match="the export is refused: with openvino") as caught:
        exported.check(off)
    assert f"other quantities for {exported.ids[3]};" in str(caught.value)
    described = exported.described()
    assert described["check"]["passed"] is False
    assert described["precision"] == "f32"


def test_a_small_difference_of_many_probabilities_is_refused_too(few_bins, tmp_path: Path) -> None:
    exported = Exported("pca_svm", few_bins, tmp_path)
    with pytest.raises(StocktakeError, match=r"differs by 0\.\d+ from the checkpoint's \(tolerance 0\.001\)"):
        exported.check(temperature_scale(exported.expected, 1.1))


def test_a_graph_that_one_engine_cannot_load_is_served_by_the_other(few_bins, tmp_path: Path) -> None:
    """OpenVINO has no optional values, which ONNX Runtime has."""
    exported = Exported("majority", few_bins, tmp_path / "exported")
    path = exported.folder / "model.onnx"
    graph = onnx.load(path)
    (output,) = graph.graph.output
    last = next(node for node in graph.graph.node if output.name in node.output)
    last.output[list(last.output).index(output.name)] = "before"
    graph.graph.node.extend(
        [
            onnx.helper.make_node("Optional", ["before"], ["optional"]),
            onnx.helper.make_node("OptionalGetElement", ["optional"], [output.name]),
        ]
    )
    onnx.save(graph, path)
    expected = exported.expected
    (check,) = exported.check(expected)
    assert check.engine.startswith("onnxruntime")
    described = exported.described()
    assert (described["engine"], described["check"]["passed"]) == ("onnxruntime", True)
    assert "openvino can load" in described["check"]["unusable"]["openvino"]
    assert Predictor(exported.folder).engine.startswith("onnxruntime")
    saved = save_pyfunc(exported.folder, tmp_path / "model", draw_bin(1, 0))
    required = (saved / "requirements.txt").read_text()
    assert "onnxruntime==" in required
    assert "openvino" not in required


def test_a_tie_is_named_and_is_no_refusal(few_bins, tmp_path: Path) -> None:
    exported = Exported("pca_svm", few_bins, tmp_path)
    seen_alike = np.array([1] * 5001 + [2] * 5000 + [3] * 10)  # one bin apart: the two likeliest nearly tie
    export_model(fit_majority(few_bins.manifest.labels, 32, seen_alike), tmp_path)
    swapped = Predictor(tmp_path).probabilities(exported.prepared)[:, [1, 0, 2]]
    checks = exported.check(swapped)
    assert all(check.passed for check in checks)
    assert checks[0].ties == tuple(exported.ids)
    assert not checks[0].wrong
