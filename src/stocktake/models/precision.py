"""Number format and memory layout: the fastest for this network on this processor, measured once and remembered.

The right choice differs by architecture and processor, up to three times in speed, in ways that no rule gives:
depthwise networks can lose by what dense ones win with.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

from stocktake.models.network import NetworkModel

MARGIN = 1.2
"""Another format than the plain one must be this many times faster, or the plain one stays: so that noise
in a measurement does not change a run's figures."""
_BATCH = 4
_ROUNDS = 2


@dataclass(frozen=True)
class Precision:
    """What a network computes in."""

    dtype: Literal["fp32", "bf16"]
    channels_last: bool
    photos_per_second: float | None = None
    """As measured when it was chosen, on one thread of a CPU; None when nothing was to choose."""

    def __str__(self) -> str:
        """As logged: bf16 channels_last."""
        return f"{self.dtype} {'channels_last' if self.channels_last else 'contiguous'}"

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context to compute in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bf16")


PLAIN = Precision("fp32", channels_last=True)


def choose_precision(
    model: NetworkModel,
    purpose: Literal["train", "infer"],
    requested: Literal["auto", "fp32", "bf16"],
    device: torch.device,
    workspace: Path,
) -> Precision:
    """The fastest that `requested` allows, measured on random photos once for a network, processor and torch.

    `auto` keeps inference in fp32, since features and figures must be those of the served graph, and looks at
    bf16 only where the processor has it in hardware.
    """
    formats: list[Literal["fp32", "bf16"]] = [requested] if requested != "auto" else ["fp32"]
    if requested == "auto" and purpose == "train" and _has_bf16(device):
        formats.append("bf16")
    candidates = [Precision(dtype, layout) for dtype in formats for layout in (True, False)]
    memory = workspace / "cache" / "precision.json"
    backbone, size = model.spec.options["backbone"], model.spec.image_size
    key = f"{_processor(device)} | torch {torch.__version__} | {backbone} {size}px {purpose} {requested}"
    known = _remembered(memory)
    if key not in known:
        speeds = _measure(model, candidates, purpose, device)
        best = max(range(len(candidates)), key=lambda index: speeds[index])
        chosen = best if speeds[best] > MARGIN * speeds[0] else 0
        found = Precision(candidates[chosen].dtype, candidates[chosen].channels_last, round(speeds[chosen], 1))
        memory.parent.mkdir(parents=True, exist_ok=True)
        beside = memory.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json.dumps(known | {key: asdict(found)}, indent=2))
        beside.replace(memory)
        return found
    return Precision(**known[key])


def _remembered(memory: Path) -> dict[str, Any]:
    """What was chosen before; a missing or damaged file is no memory."""
    try:
        content = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _measure(
    model: NetworkModel, candidates: list[Precision], purpose: Literal["train", "infer"], device: torch.device
) -> list[float]:
    """Photos a second of each candidate: the best of rounds that take turns, after one to warm up.

    On a CPU it is one thread's own time that counts, so that other processes on the machine do not decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(device).train(purpose == "train")
    size = model.spec.image_size
    targets = torch.zeros(_BATCH, dtype=torch.long, device=device)
    best = [float("inf")] * len(candidates)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        photos = torch.randint(0, 256, (_BATCH, size, size, 3), dtype=torch.uint8, device=device)
        for turn in range(_ROUNDS + 1):
            for index, candidate in enumerate(candidates):
                model.lay_out(candidate.channels_last)
                start = _clock(device)
                with candidate.autocast(device), torch.set_grad_enabled(purpose == "train"):
                    loss = F.cross_entropy(model(photos), targets)
                if purpose == "train":
                    loss.backward()  # type: ignore[no-untyped-call]
                    model.zero_grad()
                if turn:
                    best[index] = min(best[index], _clock(device) - start)
    torch.set_num_threads(threads)
    model.load_state_dict(state)  # batch normalisation has seen noise
    model.lay_out(True)
    return [_BATCH / seconds for seconds in best]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() == "arm64"
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name
