"""The MLflow model: a frame with photo bytes in, quantity, confidence and probabilities out.

Logged "from code": this file is the model's code, the exported folder is its only artifact. No pickle.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.models import set_model
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from stocktake.serving.predictor import ENGINES, FOLDER, Predictor

COLUMN = "photo"
REQUIREMENTS = ("mlflow-skinny", "numpy", "pandas", "pillow")
"""What the model is loaded with, besides its engine: part of the extra `serving`, in the versions it was saved with."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, COLUMN)]),
    outputs=Schema(
        [
            ColSpec(DataType.long, "quantity"),
            ColSpec(DataType.double, "confidence"),
            ColSpec(Array(DataType.double), "probabilities"),
            ColSpec(Array(DataType.long), "likely_quantities"),
            ColSpec(DataType.string, "model_version"),
        ]
    ),
)
"""The outputs are there for spark_udf, which makes a struct of them."""


class PredictorModel(PythonModel):
    """Counts the photos of a frame's `photo` column (bytes)."""

    def load_context(self, context: Any) -> None:
        """Load the exported model."""
        self._counter = Predictor(Path(context.artifacts[FOLDER]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row a photo: quantity, confidence, probabilities (in the order of the labels), quantities (the conformal
        set), model_version.
        """
        del context, params
        counts = self._counter.predict([bytes(photo) for photo in model_input[COLUMN]])
        return pd.DataFrame(
            {
                "quantity": [count.quantity for count in counts],
                "confidence": [count.confidence for count in counts],
                "probabilities": [list(count.probabilities.values()) for count in counts],
                "likely_quantities": [list(count.likely_quantities) for count in counts],
                "model_version": [count.model_version for count in counts],
            }
        )


def save_pyfunc(exported: Path, destination: Path, example: bytes) -> Path:
    """Write the MLflow model of an exported folder.

    Args:
        exported: folder with model.onnx and model.json.
        destination: the model folder to write; must not exist.
        example: bytes of a photo, for the input example.
    """
    engine = json.loads((exported / "model.json").read_text()).get("engine") or ENGINES[0]
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for talkative in ("mlflow.utils.environment", "mlflow.pyfunc"):  # one misses pip in an environment of uv's
        logging.getLogger(talkative).setLevel(logging.ERROR)
    mlflow.pyfunc.save_model(
        str(destination),
        python_model=__file__,
        artifacts={FOLDER: str(exported)},
        code_paths=[str(Path(__file__).parents[1])],
        pip_requirements=[f"{name}=={installed_version(name)}" for name in (engine, *REQUIREMENTS)],
        signature=SIGNATURE,
        input_example=pd.DataFrame({COLUMN: [example]}),
    )
    return destination


set_model(PredictorModel())
