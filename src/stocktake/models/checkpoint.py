"""Saving and loading any model: weights as safetensors, the rest as JSON. No pickle."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stocktake import models
from stocktake.errors import StocktakeError
from stocktake.files import atomic_path, atomic_write
from stocktake.models.counting_model import CountingModel, ModelSpec

WEIGHTS = "model.safetensors"
SPEC = "model.json"


def save_model(model: CountingModel, folder: Path) -> None:
    """Write model.safetensors and model.json."""
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in model.state_dict().items()}, temporary)
    atomic_write(folder / SPEC, json.dumps(model.spec.to_json(), indent=2))


def load_model(folder: Path) -> CountingModel:
    """The model of a folder, ready to evaluate.

    Raises:
        StocktakeError: the folder holds no model, or a damaged one.
    """
    try:
        content = json.loads((folder / SPEC).read_text())
        spec = ModelSpec(
            kind=content["kind"],
            labels=tuple(content["labels"]),
            image_size=int(content["image_size"]),
            options=dict(content["options"]),
        )
        model = _model_class(spec.kind)(spec)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise StocktakeError(f"{folder} holds no model that can be loaded: {error}") from None
    return model.eval()


def _model_class(kind: str) -> type[CountingModel]:
    """The CountingModel of the module in this folder that has the kind's name."""
    if kind in {module.name for module in pkgutil.iter_modules(models.__path__)}:
        module = importlib.import_module(f"{models.__name__}.{kind}")
        for member in vars(module).values():
            if isinstance(member, type) and issubclass(member, CountingModel) and member.__module__ == module.__name__:
                return member
    raise ValueError(f"no model is of the kind {kind!r}")
