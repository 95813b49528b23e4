# SPDX-License-Identifier: MIT
"""Which pixels of a photo are the object: one class for each detector of DetectorConfig."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..backbones import Backbone
from ..config import DetectorConfig
from ..photos import Photo

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


class Detection(NamedTuple):
    """The object of a photo. mask: float32 [H, W] in [0, 1] at the photo's size, above 0.5 is object.

    confidence: how clearly the detector tells the object from the rest, in [0, 1]; each says how it measures that.
    """

    mask: Tensor
    confidence: float


class Detector(ABC):
    """Finds the object of each photo in a backbone's features."""

    def __init__(self, config: DetectorConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.tokens_per_batch = TOKENS_PER_BATCH[backbone.device.type]

    def tokens(self, photo: Photo) -> int:
        """How many tokens the photo will cost."""
        h, w = self.backbone.grid(photo.pixels, self.config.image_size)
        return h * w

    @abstractmethod
    def detect(self, photos: Sequence[Photo]) -> list[Detection]:
        """The object of each photo; photos may be of any sizes, and none influences another."""


def make_detector(config: DetectorConfig, device: str) -> Detector:
    """The detector that `config` names, on a device as torch names it."""
    if config.name == "selfmask":
        from .selfmask import SelfMaskDetector

        return SelfMaskDetector(config, device)
    if config.name == "cluster-vote":
        from .cluster_vote import ClusterVoteDetector

        return ClusterVoteDetector(config, device)
    from .spectral import SpectralDetector

    return SpectralDetector(config, device)
