# SPDX-License-Identifier: MIT
"""CutLER's MaskCut with a dense float64 eigensolver: the definition, for one image."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .normalized_cut import cut, edges, seed_component


def mask_cut(features: Tensor, objects: int, tau: float, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features float32 [h, w, C], finite -> masks bool [h, w, objects], values [objects], seeds [objects]."""
    h, w, _ = features.shape
    masks, values, seeds = np.zeros((h, w, objects), bool), np.ones(objects), np.full(objects, -1)
    if h * w == 0:
        return masks, values, seeds
    corners = np.ravel_multi_index(([0, 0, h - 1, h - 1], [0, w - 1, 0, w - 1]), (h, w))
    left = np.ones(h * w, bool)  # tokens that belong to no object
    connected = edges(features.flatten(0, 1), tau)
    for k in range(objects):
        found = cut(connected & left & left[:, None], eps)
        values[k] = found.value
        if found.seed < 0:
            break
        side, vector = found.partition, found.vector
        size = np.where(left, np.abs(vector), -np.inf)
        inside = side[corners][left[corners]]
        # The side with fewer corners; with equally many, that of the largest |vector|.
        seed = np.argmax(size >= (1 - 1e-5) * size.max())
        if 2 * inside.sum() > len(inside) or (2 * inside.sum() == len(inside) and not side[seed]):
            side, vector = ~side, -vector
        side = side & left
        if not side.any():
            break
        height = np.where(side, vector, -np.inf)
        top = height.max()
        seeds[k] = np.argmax(height >= top - 1e-5 * abs(top))
        masks[:, :, k] = seed_component(side.reshape(h, w), seeds[k])
        left &= ~masks[:, :, k].ravel()
    return masks, values, seeds
