"""EfficientNet-Lite0: EfficientNet-B0 with ReLU6 for swish and without squeeze-and-excitation.

Source: M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for CNNs", ICML 2019, and its Lite variant
(R. Liu, 2020, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).

Written out here in plain torch because `import torchvision` takes seconds. Layers stand in the order in which they are
applied, so that the state lists its tensors in the order of the published checkpoints.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1280
_STEM = 32
_CLASSES = 1000
# kernel, stride of the first block, expansion, channels, blocks
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """TensorFlow's "SAME": as many outputs as inputs / stride, the odd pixel of padding at the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad by what the photo's size asks for, and convolve."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        sides = [int(side) for side in input.shape[2:]]  # numbers while tracing too, not a graph that computes them
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in sides)
        return super().forward(F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


class InvertedResidual(nn.Module):
    """Widen, convolve each channel by itself, narrow; added to its input where the shape stays."""

    def __init__(self, given: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = given * expansion
        widen = [] if expansion == 1 else [_convolution(given, wide)]
        self.layers = nn.Sequential(
            *widen, _convolution(wide, wide, kernel, stride, groups=wide), _convolution(wide, channels, act=False)
        )
        self.residual = stride == 1 and given == channels

    def forward(self, photos: Tensor) -> Tensor:
        """(n, channels, rows / stride, columns / stride)."""
        given: Tensor = self.layers(photos)
        return given + photos if self.residual else given


def efficientnet_lite0() -> nn.Sequential:
    """The classifier of ImageNet's classes at random weights, drawn as the published code does."""
    blocks: list[nn.Module] = []
    given = _STEM
    for kernel, first_stride, expansion, channels, repeats in _STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            blocks.append(InvertedResidual(given, channels, kernel, stride, expansion))
            given = channels
    network = nn.Sequential(
        OrderedDict(
            stem=_convolution(3, _STEM, 3, 2),
            blocks=nn.Sequential(*blocks),
            top=_convolution(given, FEATURES),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(FEATURES, _CLASSES),
        )
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            outputs = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / outputs))
    return network


def _convolution(
    given: int, channels: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, if wanted, ReLU6."""
    convolution = (
        nn.Conv2d(given, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        if stride == 1
        else SameConv2d(given, channels, kernel, stride, groups=groups, bias=False)
    )
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    return nn.Sequential(convolution, norm, *([nn.ReLU6(inplace=True)] if act else []))
