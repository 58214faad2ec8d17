"""Any model as an ONNX graph with a JSON beside it: what is served, without torch and without pickle."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch

from stocktake.models.counting_model import CountingModel
from stocktake.models.network import NetworkModel

GRAPH = "counter.onnx"
DESCRIPTION = "counter.json"
FORMAT = 1
"""Version of counter.json; readers refuse a newer one."""
OPSET = 18


def export_model(model: CountingModel, folder: Path) -> None:
    """Write counter.onnx (photos (n, size, size, 3) uint8 -> logits (n, classes) float32) and counter.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.cpu().eval()
    if isinstance(model, NetworkModel):
        model.lay_out(True)
    size = model.spec.image_size
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter reports its progress as prints and warnings
        torch.onnx.export(
            model,
            (example,),
            folder / GRAPH,
            input_names=["photos"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
        )
    description = {
        "format": FORMAT,
        "labels": list(model.spec.labels),
        "preprocessing": {"size": size, "resize": "bilinear, stretched to a square", "channels": "RGB"},
        "decoding": "argmax",
        "calibration": {"temperature": 1.0},
        "kind": model.spec.kind,
        "options": model.spec.options,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))
