# SPDX-License-Identifier: MIT
"""The spectral detector: the foreground of a normalized cut of ViT features (TokenCut).

Wang et al., "Self-supervised transformers for unsupervised object discovery using normalized cut", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import Ragged, normalized_cut

from ..backbones import load
from ..config import DetectorConfig
from ..photos import Photo
from . import Detection, Detector, backbone_options, packed, photo_sizes


def centered(features: Ragged) -> Ragged:
    """Subtracts the mean feature of each photo from features [T, C]."""
    return features.with_rows(torch.cat([(g - g.mean((0, 1))).flatten(0, 1) for g in features.grids()]))


class SpectralDetector(Detector):
    """Detects the object as the foreground of a normalized cut of the features.

    The foreground is the component that contains the seed. The confidence is the `separation` of the cut vector.
    """

    def __init__(self, config: DetectorConfig, device: str):
        super().__init__(config, load(config.backbone, config.backbone_weights, **backbone_options(config, device)))

    def detect(self, photos: Sequence[Photo], sizes: Sequence[tuple[int, int]] | None = None) -> list[Detection]:
        images = packed([photo.pixels for photo in photos], self.backbone)
        prepared = self.backbone.prepare(images, self.config.image_size)
        features = self.backbone.extract(prepared, [self.config.features])[self.config.features]
        # On the CPU, where the refiners run, too.
        features = features.with_rows(features.rows.cpu())
        if self.config.center_features:
            features = centered(features)
        cut = normalized_cut(features, tau=self.config.tau)
        assert isinstance(cut.foreground, Ragged) and isinstance(cut.vector, Ragged)
        detections = []
        for photo, size, grid, vector in zip(
            photos, sizes or photo_sizes(photos), cut.foreground.grids(), cut.vector.grids(), strict=True
        ):
            fit = self.backbone.fit(photo.pixels.shape[:2], self.config.image_size)
            mask = F.interpolate(fit.without_padding(grid[None, None].float()), size, mode="bilinear")[0, 0]
            detections.append(Detection(mask, separation(vector, grid)))
        return detections


def separation(vector: Tensor, foreground: Tensor) -> float:
    """Measures how clearly the vector of a cut separates the foreground from the background.

    Args:
        vector: float [h, w].
        foreground: bool [h, w].

    Returns:
        r / (1 + r) in [0, 1), where r is the distance between the means of the vector inside and outside the
        foreground, divided by the root of the sum of its variances inside and outside; 0 if either is empty.
    """
    inside, outside = vector[foreground].double(), vector[~foreground].double()
    if len(inside) == 0 or len(outside) == 0:
        return 0.0
    spread = (inside.var(correction=0) + outside.var(correction=0)).sqrt()
    ratio = (inside.mean() - outside.mean()).abs() / spread.clamp_min(1e-12)
    return float(ratio / (1 + ratio))
