# SPDX-License-Identifier: MIT
"""BatchNorm over the photos of all workers, so that several train the network that one would."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """torch's SyncBatchNorm for the CPU, which that one refuses: statistics of the batches of all workers together.

    Every worker must bring a batch of the same shape. Gradients flow through the statistics, as through BatchNorm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [n, C, h, w], this worker's -> the same, normalized and scaled, in x's dtype."""
        if not self.training:
            return super().forward(x)
        from torch.distributed import get_world_size
        from torch.distributed.nn.functional import all_reduce

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
    """Replaces every BatchNorm of the network by one over all workers; tensors keep their names.

    On a GPU that is torch's own. What timm's variants do after it (dropout, activation) follows it as before.
    """
    kind = GlobalBatchNorm if device == "cpu" else nn.SyncBatchNorm
    for parent in list(network.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, nn.BatchNorm2d):
                new = kind(old.num_features, old.eps, old.momentum)
                new.load_state_dict(old.state_dict())
                after = nn.Sequential(*(getattr(old, part) for part in ("drop", "act") if hasattr(old, part)))
                if len(after):
                    new.register_forward_hook(lambda module, inputs, output, after=after: after(output))
                setattr(parent, name, new)
