# SPDX-License-Identifier: MIT
"""Antialiased resizing in torch, in float64: the definition, for one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """image uint8 or float32 [h, w, C], size (H, W) -> [H, W, C] of the same dtype.

    Rows are resized first, then columns; of uint8 images both results are rounded to nearest and clamped.
    """
    planes = image.movedim(-1, 0)[None].double()
    for sides in ((image.shape[0], size[1]), size):
        planes = F.interpolate(planes, sides, mode=interpolation, antialias=True)
        if image.dtype == torch.uint8:
            planes = (planes.clamp(0, 255) + 0.5).floor()
    return planes[0].movedim(0, -1).to(image.dtype)
