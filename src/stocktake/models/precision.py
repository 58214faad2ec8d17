"""Number format of a network: a rule of processor and network, so that the same command gives the same figures."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


def choose_precision(model: nn.Module, requested: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The requested format; for `auto`, bf16 where it is in the hardware and pays, else fp32.

    On a CPU that is with avx512_bf16 or AMX, and for a network without depthwise convolutions, which are slower in
    bf16 there.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() and not _has_depthwise_convolutions(model) else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context to compute in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _has_depthwise_convolutions(model: nn.Module) -> bool:
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return any(layer.groups == layer.in_channels > 1 for layer in convolutions)


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
