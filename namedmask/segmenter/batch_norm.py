# SPDX-License-Identifier: MIT
"""Synchronized BatchNorm on the CPU and on GPUs, so that multiple workers train the same network as one worker."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """SyncBatchNorm for the CPU, which torch's does not support: statistics over the batches of all workers.

    All workers must pass batches of the same shape. Gradients flow through the statistics, as in BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes and scales this worker's features.

        Args:
            x: [n, C, h, w].

        Returns:
            [n, C, h, w], of the dtype of x.
        """
        if not self.training:
            return super().forward(x)
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        y, mean, variance, count = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        return y


class _GlobalBatchNorm(torch.autograd.Function):
    """BatchNorm with the statistics of all workers: one exchange in each direction, torch's kernels around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
        from torch.distributed import all_reduce, get_world_size

        workers = get_world_size()
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        moments = torch.stack([mean, variance]).double()  # in float64, the squares cancel without a loss
        moments[1] += moments[0].square()
        all_reduce(moments)
        moments /= workers
        moments[1] -= moments[0].square()
        mean, variance = moments.float()
        ctx.eps, ctx.count = eps, workers * x.numel() // x.shape[1]
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, ctx.count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *others: None) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        from torch.distributed import all_reduce

        x, weight, mean, variance = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )  # of_x as if the statistics were constants
        sums = torch.stack([of_weight, of_bias])
        all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()
        slope = weight * scale.square() * sums[0] / ctx.count
        offset = weight * scale * sums[1] / ctx.count - slope * mean
        of_x = of_x - torch.addcmul(offset.view(-1, 1, 1), x.float(), slope.view(-1, 1, 1)).to(of_x.dtype)
        return of_x, of_weight, of_bias, None


def synchronize(network: nn.Module, device: str) -> None:
    """Replaces every BatchNorm of a network, in place, by one that is synchronized over all workers.

    Tensors keep their names. timm's variants of BatchNorm keep the dropout and activation that follow them.

    Args:
        network: The network.
        device: "cpu", which takes `GlobalBatchNorm`, or a GPU, which takes torch's SyncBatchNorm.
    """
    synchronized = GlobalBatchNorm if device == "cpu" else nn.SyncBatchNorm
    for parent in list(network.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, nn.BatchNorm2d):
                new = synchronized(old.num_features, old.eps, old.momentum)
                new.load_state_dict(old.state_dict())
                after = nn.Sequential(*(getattr(old, part) for part in ("drop", "act") if hasattr(old, part)))
                if len(after):
                    new.register_forward_hook(lambda module, inputs, output, after=after: after(output))
                setattr(parent, name, new)
