# SPDX-License-Identifier: MIT
"""Pixel-adaptive mask refinement in torch: the definition, for one image, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(grid: Tensor, dilations: Sequence[int]) -> Iterator[tuple[Tensor, bool]]:
    """grid [C, H, W] -> for each dilation and each position in a 3 x 3 window: the shifted grid, and whether the
    position is the center. The border is padded by replication."""
    h, w = grid.shape[1:]
    for d in dilations:
        padded = F.pad(grid[None], (d, d, d, d), mode="replicate")[0]
        for y in (0, d, 2 * d):
            for x in (0, d, 2 * d):
                yield padded[:, y : y + h, x : x + w], y == x == d


def affinities(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """image [3, H, W] from 0 to 1 -> each pixel's weights of its neighbors, [8 * dilations, H, W], with sum 1."""
    spread = torch.stack([window for window, _ in windows(image, dilations)]).std(0)  # [3, H, W]
    logits = [
        -((window - image).abs() / (1e-8 + 0.1 * spread)).mean(0)
        for window, center in windows(image, dilations)
        if not center
    ]
    return torch.stack(logits).softmax(0)


def pamr(masks: Tensor, image: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """masks float [H, W, L], image uint8 [H, W, 3] -> refined masks, computed in the dtype of the masks."""
    if masks.numel() == 0:
        return masks.clone()
    weights = affinities(image.permute(2, 0, 1).to(masks.dtype) / 255, dilations)
    refined = masks.permute(2, 0, 1)  # [L, H, W]
    for _ in range(iterations):
        neighbors = [window for window, center in windows(refined, dilations) if not center]
        total = torch.zeros_like(refined)
        for weight, window in zip(weights, neighbors, strict=True):
            total = total + weight * window
        refined = total
    return refined.permute(1, 2, 0).clone()
