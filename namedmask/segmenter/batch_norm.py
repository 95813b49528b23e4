# SPDX-License-Identifier: MIT
"""Synchronized BatchNorm on the CPU and on GPUs, so that multiple workers train the same network as one worker."""

from __future__ import annotations

import torch
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
        from torch.distributed import get_world_size
        from torch.distributed.nn.functional import all_reduce

        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        y = x.float()
        count = get_world_size() * y.numel() // y.shape[1]
        mean = all_reduce(y.sum((0, 2, 3))) / count
        centered = y - mean.view(-1, 1, 1)
        variance = all_reduce(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


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
