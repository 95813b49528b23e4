# SPDX-License-Identifier: MIT
"""What one gets without learning anything: the strongest of these is what the demo's detector has to beat.

Each function takes a photo, uint8 [H, W, 3], and gives its guess at the object, bool [H, W], before refinement; the
demo refines every one with the solver settings of its own detector. None is random: same photo, same mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CELL = 8
"""Pixels a side of the cells of the hand-made features, on a photo whose short side is 192 pixels."""


def center_disc(image: np.ndarray) -> np.ndarray:
    """A disc in the middle that covers a quarter of the photo, whatever is shown."""
    height, width = image.shape[:2]
    y = (np.arange(height) + 0.5)[:, None] - height / 2
    x = (np.arange(width) + 0.5)[None, :] - width / 2
    return x * x + y * y < 0.25 * height * width / np.pi


def lab(image: np.ndarray) -> np.ndarray:
    """CIE Lab under D65, float32 [H, W, 3], of an sRGB photo uint8 [H, W, 3]."""
    rgb = image.astype(np.float32) / 255.0
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], -1).astype(np.float32)


def color_kmeans(image: np.ndarray, clusters: int = 3) -> np.ndarray:
    """k-means on the colors; of the clusters the one that the photo's border shows least, its largest component."""
    from namedmask_kernels import largest_component

    pixels = _blur(lab(image), 2).reshape(-1, 3)
    # Start at the mean, then always at the color farthest from all centers so far: no dice needed.
    centers = [pixels.mean(0)]
    for _ in range(clusters):
        gap = np.min([((pixels - c) ** 2).sum(1) for c in centers], axis=0)
        centers.append(pixels[gap.argmax()])
    centers = np.stack(centers[1:])
    for _ in range(12):
        labels = ((pixels[:, None] - centers) ** 2).sum(2).argmin(1)
        centers = np.stack(
            [pixels[labels == k].mean(0) if (labels == k).any() else centers[k] for k in range(clusters)]
        )
    labels = labels.reshape(image.shape[:2])
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    share = [
        (border == k).mean() / max((labels == k).mean(), 1e-6) + ((labels == k).mean() < 0.02) for k in range(clusters)
    ]
    return np.asarray(largest_component(labels == int(np.argmin(share))), dtype=bool)


def handmade_features(image: np.ndarray) -> np.ndarray:
    """Texture and color of each cell: float32 [h, w, 11], every column with mean 0 and deviation 1 over the photo.

    Mean and deviation of L, a and b, the energy of edges in four directions, and of fine detail.
    """
    values = lab(image)
    light = values[..., 0]
    right, down = np.zeros_like(light), np.zeros_like(light)
    right[:, 1:-1], down[1:-1] = light[:, 2:] - light[:, :-2], light[2:] - light[:-2]
    edges = [np.abs(right), np.abs(down), np.abs(right + down), np.abs(right - down)]
    fine = np.abs(light - _blur(light[..., None], 1)[..., 0])
    maps = np.concatenate([values, values**2, np.stack([*edges, fine], -1)], -1)
    height, width = image.shape[:2]
    scale = min(height, width) / 192.0
    rows = np.linspace(0, height, max(round(height / scale / CELL), 2) + 1).round().astype(int)
    columns = np.linspace(0, width, max(round(width / scale / CELL), 2) + 1).round().astype(int)
    sums = np.add.reduceat(np.add.reduceat(maps.astype(np.float64), rows[:-1], 0), columns[:-1], 1)
    cells = sums / (np.diff(rows)[:, None] * np.diff(columns)[None, :])[..., None]
    cells[..., 3:6] = np.sqrt(np.maximum(cells[..., 3:6] - cells[..., :3] ** 2, 0.0))
    cells = _blur(cells, 1)
    cells = (cells - cells.mean((0, 1))) / (cells.std((0, 1)) + 1e-6)
    return cells.astype(np.float32)


def handmade_cut(image: np.ndarray, tau: float = 0.1) -> np.ndarray:
    """The normalized cut on hand-made features instead of learned ones."""
    return _cut(handmade_features(image), image.shape[:2], tau)


def untrained_cut(
    image_size: int, features: str, tau: float, center: bool = True
) -> Callable[[np.ndarray], np.ndarray]:
    """The demo's own detector with the ViT's weights as drawn, before any training: a function photo -> mask."""
    import torch

    from ..backbones import Backbone
    from .models import create_vit

    backbone = Backbone(create_vit(None), torch.device("cpu"), torch.float32)

    def detect(image: np.ndarray) -> np.ndarray:
        found = backbone.extract([backbone.prepare(image, image_size)], [features])[features]
        grid = found.grids()[0].numpy()
        return _cut(grid - grid.mean((0, 1)) if center else grid, image.shape[:2], tau)

    return detect


def baselines(
    image_size: int, features: str, tau: float, center: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """All of them by name, ``photo -> mask``; the arguments are the detector's own, for the untrained ViT."""
    return {
        "color k-means": color_kmeans,
        "center disc": center_disc,
        "hand-made features, cut": handmade_cut,
        "untrained ViT, cut": untrained_cut(image_size, features, tau, center),
    }


def _blur(maps: np.ndarray, passes: int) -> np.ndarray:
    """Binomial blur of [H, W, C], borders repeated."""
    for _ in range(passes):
        p = np.pad(maps, ((1, 1), (0, 0), (0, 0)), mode="edge")
        maps = (p[:-2] + p[2:]) * 0.25 + maps * 0.5
        p = np.pad(maps, ((0, 0), (1, 1), (0, 0)), mode="edge")
        maps = (p[:, :-2] + p[:, 2:]) * 0.25 + maps * 0.5
    return maps


def _cut(grid: np.ndarray, shape: tuple[int, int], tau: float) -> np.ndarray:
    """features [h, w, C] -> the cut's foreground at the photo's size, as the spectral detector does it."""
    import torch
    import torch.nn.functional as F

    from namedmask_kernels import normalized_cut

    foreground = normalized_cut(torch.from_numpy(np.ascontiguousarray(grid)), tau=tau).foreground
    soft = F.interpolate(foreground.view(1, 1, *grid.shape[:2]).float(), shape, mode="bilinear")[0, 0]
    return (soft > 0.5).numpy()
