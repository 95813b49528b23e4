# SPDX-License-Identifier: MIT
"""The spectral detector: ViT features -> normalised cut -> the component that holds the seed (TokenCut).

Wang et al., "Self-supervised transformers for unsupervised object discovery using normalized cut", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import Ragged, normalized_cut

from ..backbones import Backbone, load
from ..config import DetectorConfig
from ..photos import Photo

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


def centred(features: Ragged) -> Ragged:
    """Features [T, C] less the mean of their own photo."""
    return features.with_rows(torch.cat([(g - g.mean((0, 1))).flatten(0, 1) for g in features.grids()]))


class Detection(NamedTuple):
    """The object of a photo. mask: float32 [H, W] in [0, 1] at the photo's size, above 0.5 is object.

    separation: how clearly the cut tells the object from the rest, in [0, 1): r / (1 + r), where r is the distance of
    the cut vector's means in and out of the object over the root of its summed variances in and out; 0 without object.
    """

    mask: Tensor
    separation: float


class SpectralDetector:
    """Finds the object of each photo as the foreground of a normalised cut of its features."""

    def __init__(self, config: DetectorConfig, device: str):
        self.config = config
        self.backbone: Backbone = load(
            config.backbone, config.backbone_weights, device=device, precision=config.precision
        )
        self.tokens_per_batch = TOKENS_PER_BATCH[device.split(":")[0]]

    def tokens(self, photo: Photo) -> int:
        """How many tokens the photo will cost."""
        h, w = self.backbone.grid(photo.pixels, self.config.image_size)
        return h * w

    def detect(self, photos: Sequence[Photo]) -> list[Detection]:
        """The object of each photo; photos may be of any sizes, and none influences another."""
        prepared = [self.backbone.prepare(photo.pixels, self.config.image_size) for photo in photos]
        features = self.backbone.extract(prepared, [self.config.features])[self.config.features]
        # The cut has no CUDA version yet. Its input is small beside what the network has moved.
        features = features.with_rows(features.rows.cpu())
        if self.config.centre:
            features = centred(features)
        cut = normalized_cut(features, tau=self.config.tau)
        return [
            Detection(
                F.interpolate(grid[None, None].float(), photo.pixels.shape[:2], mode="bilinear")[0, 0],
                separation(vector, grid),
            )
            for grid, vector, photo in zip(cut.foreground.grids(), cut.vector.grids(), photos, strict=True)
        ]


def separation(vector: Tensor, foreground: Tensor) -> float:
    """vector float [h, w], foreground bool [h, w] -> `Detection.separation`."""
    inside, outside = vector[foreground].double(), vector[~foreground].double()
    if len(inside) == 0 or len(outside) == 0:
        return 0.0
    spread = (inside.var(correction=0) + outside.var(correction=0)).sqrt()
    ratio = (inside.mean() - outside.mean()).abs() / spread.clamp_min(1e-12)
    return float(ratio / (1 + ratio))
