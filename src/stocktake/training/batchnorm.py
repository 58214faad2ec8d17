"""Batch normalisation over the whole batch while its photos are shared out to processes.

On GPUs it is torch's own nn.SyncBatchNorm, which refuses the CPU; there it is SynchronisedBatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synchronised(model: nn.Module, backend: str) -> Iterator[None]:
    """Within the block, the batch normalisations of `model` see the batches of all processes.

    Their parameters stay the same objects and the state dict keeps its names. After the block the layers are the plain
    ones again, with the statistics that were gathered.
    """
    kind = nn.SyncBatchNorm if backend == "nccl" else SynchronisedBatchNorm
    replaced: list[tuple[nn.Module, str, _BatchNorm]] = []
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # a layer with a forward of its own does more than normalise
            if isinstance(layer, _BatchNorm) and type(layer).forward is _BatchNorm.forward:
                replaced.append((parent, name, layer))
                setattr(parent, name, _stand_in(layer, kind))
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            stand_in = getattr(parent, name)
            for buffer, value in stand_in.named_buffers():
                setattr(layer, buffer, value)
            setattr(parent, name, layer.train(stand_in.training))


def _stand_in(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    """A layer of another kind with the same parameters and statistics."""
    made = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name, parameter in layer.named_parameters():
        setattr(made, name, parameter)
    for name, buffer in layer.named_buffers():
        setattr(made, name, buffer)
    return made.train(layer.training)


class SynchronisedBatchNorm(_BatchNorm):
    """nn.BatchNorm over the batches of all processes; they may be of different lengths."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """(n, channels, ...) to the same, normalised over n and all that follows in all processes."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        weight = self.weight if self.affine else input.new_ones(self.num_features, dtype=torch.float32)
        bias = self.bias if self.affine else input.new_zeros(self.num_features, dtype=torch.float32)
        normalised, mean, variance = _Normalise.apply(input, weight, bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)
        return normalised  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """One exchange between the processes forward, one backward (Ioffe and Szegedy 2015, section 3).

    In torch's own kernels for a CPU: written out in sums and products it takes seven times as long.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the mean and unbiased variance (channels,) over all processes."""
        mean, variance = torch.batch_norm_update_stats(input.float(), None, None, 0.0)
        count = mean.new_tensor([input.numel() / input.shape[1]], dtype=torch.float64)
        mine = torch.cat([count, mean.double(), variance.double()])
        counts, means, variances = torch.split(_gathered(mine), [1, len(mean), len(mean)], dim=1)
        total = counts.sum()
        all_mean = (counts * means).sum(0) / total
        all_variance = (counts * (variances + (means - all_mean) ** 2)).sum(0) / total
        mean, variance = all_mean.float(), all_variance.float()
        unbiased = (all_variance * (total / (total - 1))).float()
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.eps, ctx.count = eps, float(total)
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(input, mean, variance, weight, bias, training=False, eps=eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Of input, weight and bias. DDP takes the mean of the last two over the processes."""
        input, weight, mean, variance = ctx.saved_tensors
        # as if mean and variance were constants
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0].to(input.dtype), input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = _gathered(torch.stack([of_weight, of_bias])).sum(0)
        # what flows through them: in each channel a multiple of the input, and a constant
        deviations = torch.rsqrt(variance + ctx.eps)
        slope, shift = -weight * deviations * sums / ctx.count
        slope = slope * deviations
        shape = [1, -1] + [1] * (input.dim() - 2)
        of_input = of_input.float().addcmul_(input.float(), slope.view(shape)).add_((shift - slope * mean).view(shape))
        return of_input.to(input.dtype), of_weight, of_bias, None


def _gathered(mine: Tensor) -> Tensor:
    """(processes, ...): each one's. For a few numbers a quarter of the time of gloo's sum over the processes."""
    given = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(given, mine)
    return torch.stack(given)
