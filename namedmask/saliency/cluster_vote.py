# SPDX-License-Identifier: MIT
"""The cluster-vote detector: clusters the features of one or several backbones and votes among the clusters.

Shin, Albanie and Xie, "Unsupervised salient object detection with spectral cluster voting", CVPR Workshops 2022. The
paper upsamples the features twofold before clustering. Here the features are clustered at their own resolution, and the
labels are resized to the photo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import spectral_clusters, vote_masks

from ..backbones import Fit, load
from ..config import DetectorConfig
from ..photos import Photo
from . import Detection, Detector, backbone_options, packed, photo_sizes
from .spectral import centered

COUNTS = (2, 3, 4)  # numbers of clusters; every cluster is a candidate


class ClusterVoteDetector(Detector):
    """Detects the object as the cluster that overlaps most with the clusters of other counts and backbones.

    The confidence is the mean IoU of the winner with the other voting candidates; 0 if there are none.
    """

    bytes_per_pixel = 24

    def __init__(self, config: DetectorConfig, device: str):
        self.backbones = [
            load(name, weights, **backbone_options(config, device))
            for name, weights in (
                (config.backbone, config.backbone_weights),
                *map(_split_weights, config.more_backbones),
            )
        ]
        finest = min(self.backbones, key=lambda backbone: backbone.patch)  # its tokens dominate the cost
        super().__init__(config, finest)

    def detect(self, photos: Sequence[Photo], sizes: Sequence[tuple[int, int]] | None = None) -> list[Detection]:
        labels: list[list[Tensor]] = [[] for _ in photos]  # for each photo, int32 [h, w, 3] from each backbone
        for backbone in self.backbones:
            images = packed([photo.pixels for photo in photos], backbone)
            prepared = backbone.prepare(images, self.config.image_size)
            features = backbone.extract(prepared, [self.config.features])[self.config.features]
            # On the CPU, where the vote and the refiners run, too.
            features = features.with_rows(features.rows.cpu())
            if self.config.center_features:
                features = centered(features)
            for photo_labels, grid in zip(labels, spectral_clusters(features, COUNTS).grids(), strict=True):
                photo_labels.append(grid)
        return [
            elect(photo_labels, [b.fit(photo.pixels.shape[:2], self.config.image_size) for b in self.backbones], size)
            for photo_labels, photo, size in zip(labels, photos, sizes or photo_sizes(photos), strict=True)
        ]


def elect(labels: Sequence[Tensor], fits: Sequence[Fit], size: tuple[int, ...]) -> Detection:
    """Votes among all clusters of a photo.

    Args:
        labels: Cluster labels from each backbone, int32 [h, w, len(COUNTS)].
        fits: How the photo lies on the patches of each backbone.
        size: Height and width of the mask, at which the clusters are compared.
    """
    columns = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))  # 0 0 1 1 1 2 2 2 2
    clusters = torch.cat([torch.arange(k) for k in COUNTS])  # 0 1 0 1 2 0 1 2 3
    tokens = [(grid[..., columns] == clusters).permute(2, 0, 1) for grid in labels]  # bool [9, h, w] each
    candidates = [
        F.interpolate(fit.without_padding(x[None].byte(), "nearest-exact"), size, mode="nearest-exact")[0].bool()
        for x, fit in zip(tokens, fits, strict=True)
    ]
    vote = vote_masks(torch.cat(candidates))
    backbone, cluster = divmod(int(vote.winner), len(clusters))
    winner = fits[backbone].without_padding(tokens[backbone][cluster][None, None].float())
    mask = F.interpolate(winner, size, mode="bilinear")[0, 0]
    others = int(vote.kept.sum()) - 1
    agreement = (float(vote.scores[vote.winner]) - 1) / others if others else 0.0
    return Detection(mask, min(max(agreement, 0.0), 1.0))


def _split_weights(entry: str) -> tuple[str, str | None]:
    """Splits "NAME" or "NAME=FILE" into name and file."""
    name, _, file = entry.partition("=")
    return name, file or None
