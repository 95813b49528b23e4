# SPDX-License-Identifier: MIT
"""Refinement of masks by a random walk over the affinity of the features, in torch: the definition, for one image."""

from __future__ import annotations

import torch
from torch import Tensor


def random_walk(masks: Tensor, features: Tensor, steps: int, sharpness: float) -> Tensor:
    """masks [..., M], features [..., C] of one floating point dtype, in which all is computed -> [..., M]."""
    walked, rows = masks.flatten(0, -2), features.flatten(0, -2)
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    transition = torch.softmax(sharpness * (unit @ unit.T - 1), 1)  # exp, divided by its row sum
    for _ in range(steps):
        walked = transition @ walked
    return walked.reshape(masks.shape)
