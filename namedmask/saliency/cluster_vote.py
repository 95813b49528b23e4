# SPDX-License-Identifier: MIT
"""The cluster-vote detector: features of one or several backbones -> clusters -> a vote among them (SelfMask).

Shin, Albanie and Xie, "Unsupervised salient object detection with spectral cluster voting", CVPR Workshops 2022. There
the features are upsampled twofold before they are clustered; here they are clustered as they are, and the labels are
brought to the photo's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import spectral_clusters, vote_masks

from ..backbones import load
from ..config import DetectorConfig
from ..photos import Photo
from . import Detection, Detector
from .spectral import centered

COUNTS = (2, 3, 4)  # numbers of clusters; every cluster is a candidate


class ClusterVoteDetector(Detector):
    """Finds the object of each photo as the cluster that most overlaps those of other counts and backbones.

    Its confidence is the winner's mean IoU with the other candidates that voted; 0 where there are none.
    """

    def __init__(self, config: DetectorConfig, device: str):
        self.backbones = [
            load(name, weights, device=device, precision=config.precision)
            for name, weights in ((config.backbone, config.backbone_weights), *map(_named, config.more_backbones))
        ]
        finest = min(self.backbones, key=lambda backbone: backbone.patch)  # a photo costs what it costs this one
        super().__init__(config, finest)

    def detect(self, photos: Sequence[Photo]) -> list[Detection]:
        labels: list[list[Tensor]] = [[] for _ in photos]  # of each photo, int32 [h, w, 3] from each backbone
        for backbone in self.backbones:
            prepared = [backbone.prepare(photo.pixels, self.config.image_size) for photo in photos]
            features = backbone.extract(prepared, [self.config.features])[self.config.features]
            # No GPU has run the clustering's CUDA version yet. Its input is small beside what the network has moved.
            features = features.with_rows(features.rows.cpu())
            if self.config.center_features:
                features = centered(features)
            for mine, grid in zip(labels, spectral_clusters(features, COUNTS).grids(), strict=True):
                mine.append(grid)
        return [elect(mine, photo.pixels.shape[:2]) for mine, photo in zip(labels, photos, strict=True)]


def elect(labels: Sequence[Tensor], size: tuple[int, int]) -> Detection:
    """The winner among all clusters of labels int32 [h, w, len(COUNTS)], one tensor for each backbone, at `size`."""
    columns = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))  # 0 0 1 1 1 2 2 2 2
    clusters = torch.cat([torch.arange(k) for k in COUNTS])  # 0 1 0 1 2 0 1 2 3
    tokens = [(grid[..., columns] == clusters).permute(2, 0, 1) for grid in labels]  # bool [9, h, w] each
    candidates = [F.interpolate(x[None].byte(), size, mode="nearest-exact")[0].bool() for x in tokens]
    vote = vote_masks(torch.cat(candidates))
    backbone, cluster = divmod(int(vote.winner), len(clusters))
    winner = tokens[backbone][cluster]
    mask = F.interpolate(winner[None, None].float(), size, mode="bilinear")[0, 0]
    others = int(vote.kept.sum()) - 1
    agreement = (float(vote.scores[vote.winner]) - 1) / others if others else 0.0
    return Detection(mask, min(max(agreement, 0.0), 1.0))


def _named(entry: str) -> tuple[str, str | None]:
    """ "NAME" or "NAME=FILE" -> (NAME, FILE)."""
    name, _, file = entry.partition("=")
    return name, file or None
