"""Any model as an ONNX graph with a JSON beside it: what is served, without torch and without pickle."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from stocktake.models.counting_model import CountingModel

GRAPH = "model.onnx"
DESCRIPTION = "model.json"
FORMAT = 2
"""Version of model.json; readers refuse a newer one."""
OPSET = 18


def export_model(model: CountingModel, folder: Path, calibration: Mapping[str, object] | None = None) -> None:
    """Write model.onnx (photos (n, size, size, 3) uint8 -> logits (n, classes) float32) and model.json.

    By tracing (`dynamo=False`): the models branch on nothing but shapes, and torch's newer exporter needs 12 s of a
    processor for EfficientNet-Lite0, half of them for its own imports, where tracing needs 1 s. Torch calls tracing
    deprecated; should it go, `dynamo=True` with `dynamic_shapes` gives a graph with the same outputs.

    Args:
        model: left on the CPU, in evaluation mode.
        folder: made when it is not there.
        calibration: goes into model.json: temperature, set_threshold and what else is known of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.cpu().eval()
    size = model.spec.image_size
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), _attention_in_plain_operators():
        warnings.simplefilter("ignore")  # of sizes that become constants, and of the newer exporter
        torch.onnx.export(
            model,
            (example,),
            folder / GRAPH,
            input_names=["photos"],
            output_names=["logits"],
            dynamic_axes={"photos": {0: "n"}, "logits": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    description = {
        "format": FORMAT,
        "labels": list(model.spec.labels),
        "preprocessing": {"size": size, "resize": "bilinear, stretched to a square", "channels": "RGB"},
        "decoding": "argmax",
        "calibration": {"temperature": 1.0, **(calibration or {})},
        "precision": "f32",
        "kind": model.spec.kind,
        "options": model.spec.options,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


@contextmanager
def _attention_in_plain_operators() -> Iterator[None]:
    """The vision transformers' fused attention has no ONNX operator."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
