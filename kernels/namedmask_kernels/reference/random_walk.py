# SPDX-License-Identifier: MIT
"""Masks refined by a random walk over the features' affinity, in plain torch, the definition. One photo."""

from __future__ import annotations

import torch
from torch import Tensor


def random_walk(masks: Tensor, features: Tensor, steps: int, sharpness: float) -> Tensor:
    """masks [n, M], features [n, C] of one floating dtype, in which all is computed -> [n, M]."""
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    weights = torch.exp(sharpness * (unit @ unit.T - 1))
    transition = weights / weights.sum(1, keepdim=True)
    for _ in range(steps):
        masks = transition @ masks
    return masks
