# SPDX-License-Identifier: MIT
"""Antialiased resizing and the input of networks in torch, in float64: the definition, for one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """image uint8 or float32 [h, w, C], size (H, W) -> [H, W, C] of the same dtype.

    Rows are resized first, then columns; of uint8 images both results are rounded to nearest and clamped. An axis that
    keeps its length is left as it is.
    """
    planes = image.movedim(-1, 0)[None].double()
    for length in reversed(size):  # of the last axis: torch 2.14 computes columns of images one pixel wide wrongly
        if planes.shape[3] != length:
            planes = F.interpolate(planes, (planes.shape[2], length), mode=interpolation, antialias=True)
            if image.dtype == torch.uint8:
                planes = (planes.clamp(0, 255) + 0.5).floor()
        planes = planes.transpose(2, 3).contiguous()
    return planes[0].movedim(0, -1).to(image.dtype)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """image uint8 [..., C], mean and std of C numbers -> float64 [..., C]."""
    means, stds = (torch.tensor(values, dtype=torch.float64, device=image.device) for values in (mean, std))
    return (image.double() / 255 - means) / stds


def patches(image: Tensor, side: int) -> Tensor:
    """image [h, w, C] -> patches [ceil(h / side) * ceil(w / side), C * side * side], 0 beyond the image."""
    h, w, channels = image.shape
    image = F.pad(image, (0, 0, 0, -w % side, 0, -h % side))
    cells = image.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # [rows, y, columns, x, C]
    return cells.permute(0, 2, 4, 1, 3).reshape(-1, channels * side * side)
