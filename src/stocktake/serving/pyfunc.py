"""The MLflow model: a frame with photo bytes in, a record a photo out.

Logged "from code": this file is the model's code, the exported folder its artifact, and of the package it carries the
three files that it imports. No pickle. Where stocktake is installed, the installed package is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.models import set_model
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Map

from stocktake.serving.predictor import DESCRIPTION, ENGINES, FOLDER, GRAPH, Predictor, record

COLUMN = "photo"
CODE = ("errors.py", "data/images.py", "serving/predictor.py")
"""Files of the package that a logged model carries beside this one."""
REQUIREMENTS = ("mlflow-skinny", "numpy", "pandas", "pillow", "pydantic")
"""What the model is loaded with, besides its engine: part of the extra `serving`, in the versions it was saved with."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, COLUMN)]),
    outputs=Schema(
        [
            ColSpec(DataType.double, "quantity"),  # double: a photo with an error has none, and Spark needs a null
            ColSpec(DataType.double, "confidence"),
            ColSpec(Map(DataType.double), "probabilities"),
            ColSpec(Array(DataType.long), "likely_quantities"),
            ColSpec(DataType.string, "model_version"),
            ColSpec(DataType.string, "error"),
        ]
    ),
)
"""spark_udf makes a struct of the outputs."""


class PredictorModel(PythonModel):
    """Predicts for the photos in a frame's `photo` column (bytes)."""

    def load_context(self, context: Any) -> None:
        """Load the exported model."""
        self._predictor = Predictor(Path(context.artifacts[FOLDER]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row a photo: quantity, confidence, probabilities (by quantity), likely_quantities, model_version, error.

        A photo that cannot be used has the reason as its error, and no quantity. Only a few photos are decoded at a
        time, however long the frame is.
        """
        del context, params
        photos = (b"" if photo is None else bytes(photo) for photo in model_input[COLUMN])
        version = self._predictor.version
        records = [record(outcome, version) for outcome in self._predictor.predict_each(photos)]
        columns = SIGNATURE.outputs.input_names()
        # objects: None stays None, where pandas would make NaN of it
        return pd.DataFrame({name: pd.Series([row[name] for row in records], dtype=object) for name in columns})


def save_pyfunc(exported: Path, destination: Path, example: bytes) -> Path:
    """Write the MLflow model of an exported folder.

    Args:
        exported: folder with model.onnx and model.json.
        destination: the model folder to write; must not exist.
        example: bytes of a photo, for the input example.
    """
    engine = json.loads((exported / DESCRIPTION).read_text()).get("engine") or ENGINES[0]
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.utils.environment", "mlflow.pyfunc"):  # one warns that pip is missing in uv's environments
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="stocktake-model-") as temporary:
        artifact = Path(temporary) / FOLDER  # MLflow keeps the folder's name
        artifact.mkdir()
        for name in (DESCRIPTION, GRAPH):
            shutil.copyfile(exported / name, artifact / name)
        mlflow.pyfunc.save_model(
            str(destination),
            python_model=__file__,
            artifacts={FOLDER: str(artifact)},
            code_paths=[str(_copy_code(Path(temporary)))],
            pip_requirements=[f"{name}=={installed_version(name)}" for name in (engine, *REQUIREMENTS)],
            signature=SIGNATURE,
            input_example=pd.DataFrame({COLUMN: [example]}),
        )
    return destination


def _copy_code(folder: Path) -> Path:
    """The carried files as a namespace package: without __init__.py it hides no installed stocktake."""
    package = folder / "stocktake"
    for name in CODE:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).parents[1] / name, package / name)
    return package


set_model(PredictorModel())
