# SPDX-License-Identifier: MIT
"""Baselines without any learning; the demo compares its masks with the strongest of them.

Each function maps a photo, uint8 [H, W, 3], to the mask of the object, bool [H, W], before refinement. The demo refines
them with the same settings as the cut. All are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CELL = 8
"""Side of the cells of the hand-made features, in pixels of a photo whose short side is 192 pixels."""


def center_disc(image: np.ndarray) -> np.ndarray:
    """A disc at the center that covers a quarter of the photo."""
    height, width = image.shape[:2]
    y = (np.arange(height) + 0.5)[:, None] - height / 2
    x = (np.arange(width) + 0.5)[None, :] - width / 2
    return x * x + y * y < 0.25 * height * width / np.pi


def lab(image: np.ndarray) -> np.ndarray:
    """Converts an sRGB photo, uint8 [H, W, 3], to CIE Lab under D65, float32 [H, W, 3]."""
    rgb = image.astype(np.float32) / 255.0
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], -1).astype(np.float32)


def color_kmeans(image: np.ndarray, clusters: int = 3) -> np.ndarray:
    """k-means on the colors; returns the largest component of the cluster that is rarest on the border of the photo."""
    from namedmask_kernels import largest_component

    pixels = _blur(lab(image), 2).reshape(-1, 3)
    # Farthest-point initialization, from the mean: deterministic.
    initial = [pixels.mean(0)]
    for _ in range(clusters):
        distance = np.min([((pixels - c) ** 2).sum(1) for c in initial], axis=0)
        initial.append(pixels[distance.argmax()])
    centers = np.stack(initial[1:])
    for _ in range(12):
        labels = ((pixels[:, None] - centers) ** 2).sum(2).argmin(1)
        centers = np.stack(
            [pixels[labels == k].mean(0) if (labels == k).any() else centers[k] for k in range(clusters)]
        )
    labels = labels.reshape(image.shape[:2])
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    border_ratio = [  # how often a cluster is on the border, relative to its area; tiny clusters are excluded
        (border == k).mean() / max((labels == k).mean(), 1e-6) + ((labels == k).mean() < 0.02) for k in range(clusters)
    ]
    return np.asarray(largest_component(labels == int(np.argmin(border_ratio))), dtype=bool)


def handmade_features(image: np.ndarray) -> np.ndarray:
    """Texture and color of each cell, float32 [h, w, 11].

    The channels are the mean and the standard deviation of L, a and b, the energy of edges in four directions and the
    energy of fine detail. Each is normalized to mean 0 and standard deviation 1 over the photo.
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
    """The spectral detector of the demo with a ViT with random weights, as a function photo -> mask."""
    import torch

    from namedmask_kernels import Ragged

    from ..backbones import Backbone
    from .models import untrained_vit

    backbone = Backbone(untrained_vit(), torch.device("cpu"), torch.float32)

    def detect(image: np.ndarray) -> np.ndarray:
        patches = backbone.prepare(Ragged.pack([image]), image_size)
        extracted = backbone.extract(patches, [features])[features]
        grid = extracted.grids()[0].numpy()
        return _cut(grid - grid.mean((0, 1)) if center else grid, image.shape[:2], tau)

    return detect


def baselines(
    image_size: int, features: str, tau: float, center: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """All baselines by name, as functions photo -> mask.

    Args:
        image_size: Short side of the photo for the untrained ViT, in pixels.
        features: Features of the untrained ViT, a name of `backbones.TAPS`.
        tau: Threshold of the affinity of the untrained ViT's features.
        center: Whether to subtract each photo's mean feature.
    """
    return {
        "color k-means": color_kmeans,
        "center disc": center_disc,
        "hand-made features, cut": handmade_cut,
        "untrained ViT, cut": untrained_cut(image_size, features, tau, center),
    }


def _blur(maps: np.ndarray, passes: int) -> np.ndarray:
    """Binomial blur of [H, W, C] with replicated borders."""
    for _ in range(passes):
        p = np.pad(maps, ((1, 1), (0, 0), (0, 0)), mode="edge")
        maps = (p[:-2] + p[2:]) * 0.25 + maps * 0.5
        p = np.pad(maps, ((0, 0), (1, 1), (0, 0)), mode="edge")
        maps = (p[:, :-2] + p[:, 2:]) * 0.25 + maps * 0.5
    return maps


def _cut(grid: np.ndarray, shape: tuple[int, int], tau: float) -> np.ndarray:
    """Foreground of the normalized cut of features [h, w, C], at the size of the photo, as in the spectral detector."""
    import torch
    import torch.nn.functional as F

    from namedmask_kernels import normalized_cut

    foreground = normalized_cut(torch.from_numpy(np.ascontiguousarray(grid)), tau=tau).foreground
    assert isinstance(foreground, torch.Tensor)
    soft = F.interpolate(foreground.view(1, 1, *grid.shape[:2]).float(), shape, mode="bilinear")[0, 0]
    return (soft > 0.5).numpy()
