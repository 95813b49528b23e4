# SPDX-License-Identifier: MIT
"""The cluster-vote detector: clusters the features of one or several backbones and votes among the clusters.

Shin, Albanie and Xie, "Unsupervised salient object detection with spectral cluster voting", CVPR Workshops 2022. The
paper upsamples the features twofold before clustering. Here the features are clustered at their own resolution, and the
labels are resized to the photo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from namedmask_kernels import Ragged, vote_masks

from ..backbones import Fit, load
from ..batches import Size, nearest, on_rows, sizes_of
from ..config import DetectorConfig
from .candidates import COUNTS, clusters
from .detector import Detections, Detector, at_sizes, backbone_options, cells, without_padding


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

    def detect(self, images: Ragged, sizes: Sequence[Size] | None = None) -> Detections:
        found, fits = self._clusters(images)
        with self.step("vote"):
            return elect(found, fits, sizes or sizes_of(images))

    def candidates(self, images: Ragged) -> Ragged:
        """The clusters of all backbones, on the patches of the finest one."""
        found, fits = self._clusters(images)
        with self.step("candidates"):
            grids = [cells(self.fit(size)) for size in sizes_of(images)]
            soft = (masks.with_rows(masks.rows.float()) for masks in found)
            parts = [at_sizes(masks, own, grids) for masks, own in zip(soft, fits, strict=True)]
            return parts[0].with_rows(torch.cat([part.rows for part in parts], 1))

    def _clusters(self, images: Ragged) -> tuple[list[Ragged], list[list[Fit]]]:
        """From each backbone, all clusters, bool [T, sum(COUNTS)], and how the photos lie on its patches."""
        found, fits = [], []
        for backbone in self.backbones:
            features = self.features(backbone, images)
            with self.step("clusters"):
                found.append(clusters(features))
            fits.append([backbone.fit(size, self.config.image_size) for size in sizes_of(images)])
        return found, fits


def elect(masks: Sequence[Ragged], fits: Sequence[Sequence[Fit]], sizes: Sequence[Size]) -> Detections:
    """Votes among all clusters of each photo.

    Args:
        masks: The clusters from each backbone, bool [T, sum(COUNTS)].
        fits: For each backbone, how each photo lies on its patches.
        sizes: Height and width of each mask, at which the clusters are compared.
    """
    count = sum(COUNTS)
    pixels = [nearest(without_padding(batch, own, nearest), sizes) for batch, own in zip(masks, fits, strict=True)]
    vote = vote_masks(pixels[0].with_rows(torch.cat([batch.rows for batch in pixels], 1)))
    assert isinstance(vote.winner, Tensor) and isinstance(vote.kept, Tensor) and isinstance(vote.scores, Tensor)
    winner = vote.winner.long()
    soft = torch.zeros_like(pixels[0].rows[:, 0], dtype=torch.float32)
    for number, (batch, own) in enumerate(zip(masks, fits, strict=True)):
        cluster = winner - number * count  # of a winner from this backbone
        column = on_rows(batch, cluster.clamp(0, count - 1))
        tokens = batch.rows.gather(1, column[:, None])[:, 0]
        is_here = on_rows(pixels[0], (cluster >= 0) & (cluster < count))
        soft = torch.where(is_here, at_sizes(batch.with_rows(tokens.float()), own, sizes).rows, soft)
    others = vote.kept.sum(1) - 1
    agreement = (vote.scores.gather(1, winner[:, None])[:, 0] - 1) / others.clamp_min(1)
    return Detections(pixels[0].with_rows(soft), torch.where(others > 0, agreement.clamp(0.0, 1.0), 0.0))


def _split_weights(entry: str) -> tuple[str, str | None]:
    """Splits "NAME" or "NAME=FILE" into name and file."""
    name, _, file = entry.partition("=")
    return name, file or None
