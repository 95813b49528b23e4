# SPDX-License-Identifier: MIT
"""The spectral detector: the foreground of a normalized cut of ViT features (TokenCut).

Wang et al., "Self-supervised transformers for unsupervised object discovery using normalized cut", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from namedmask_kernels import Ragged, normalized_cut

from ..backbones import load
from ..batches import Size, runs, sizes_of
from ..config import DetectorConfig
from .candidates import groups
from .detector import Detections, Detector, at_sizes, backbone_options, cells


class SpectralDetector(Detector):
    """Detects the object as the foreground of a normalized cut of the features.

    The foreground is the component that contains the seed. The confidence is the `separation` of the cut vector.
    """

    def __init__(self, config: DetectorConfig, device: str):
        super().__init__(config, load(config.backbone, config.backbone_weights, **backbone_options(config, device)))

    def detect(self, images: Ragged, sizes: Sequence[Size] | None = None) -> Detections:
        features, fits = self.features(self.backbone, images), [self.fit(size) for size in sizes_of(images)]
        with self.step("cut"):
            cut = normalized_cut(features, tau=self.config.tau)
            assert isinstance(cut.foreground, Ragged) and isinstance(cut.vector, Ragged)
            masks = at_sizes(cut.foreground.with_rows(cut.foreground.rows.float()), fits, sizes or sizes_of(images))
            return Detections(masks, separation(cut.vector, cut.foreground))

    def candidates(self, images: Ragged) -> Ragged:
        features, fits = self.features(self.backbone, images), [self.fit(size) for size in sizes_of(images)]
        with self.step("candidates"):
            masks = groups(features, self.config.tau)
            return at_sizes(masks.with_rows(masks.rows.float()), fits, [cells(fit) for fit in fits])


def separation(vectors: Ragged, foregrounds: Ragged) -> Tensor:
    """Measures how clearly the vectors of cuts separate the foreground from the background.

    Args:
        vectors: float [T].
        foregrounds: bool [T].

    Returns:
        float64 [B]: r / (1 + r) in [0, 1), where r is the distance between the means of the vector inside and outside
        the foreground, divided by the root of the sum of its variances inside and outside; 0 if either is empty.
    """
    ratios = [vectors.rows.new_zeros(0, dtype=torch.float64)]
    for grids, inside in zip(runs(vectors), runs(foregrounds), strict=True):
        vector, sides = grids.double().flatten(1), torch.stack([inside, ~inside]).flatten(2)  # [n, t], [2, n, t]
        counts = sides.sum(2)
        means = (vector * sides).sum(2) / counts
        variances = ((vector - means[..., None]).square() * sides).sum(2) / counts
        ratio = (means[0] - means[1]).abs() / variances.sum(0).sqrt().clamp_min(1e-12)
        ratios.append(torch.where(counts.prod(0) > 0, ratio / (1 + ratio), 0.0))
    return torch.cat(ratios)
