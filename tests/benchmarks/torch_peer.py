"""The peer of serving.py: a network logged with mlflow.pytorch, behind MLflow's own scoring server.

`mlflow models serve` takes no image, so the photo comes as base64 in JSON, and is decoded here as the counter does.
"""

from __future__ import annotations

import base64
from typing import Any

import mlflow.pytorch
import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from stocktake.data.images import decode, resize_to_square


class TorchPeer(PythonModel):
    """Counts the photos of a frame's `photo` column (base64)."""

    def load_context(self, context: Any) -> None:
        self.network = mlflow.pytorch.load_model(context.artifacts["network"]).eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        photos = [resize_to_square(decode(base64.b64decode(photo)), 224) for photo in model_input["photo"]]
        with torch.inference_mode():
            shares = torch.softmax(self.network(torch.from_numpy(np.stack(photos))), 1).numpy()
        return pd.DataFrame({"quantity": shares.argmax(1) + 1, "confidence": shares.max(1)})


set_model(TorchPeer())
