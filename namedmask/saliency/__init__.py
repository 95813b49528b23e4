# SPDX-License-Identifier: MIT
"""Detectors, which find the object of a photo: one class for each `name` of DetectorConfig."""

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
    """The object of a photo.

    Attributes:
        mask: float32 [H, W] in [0, 1] at the size of the photo; above 0.5 is object.
        confidence: How clearly the detector separates the object from the background, in [0, 1]. Each detector
            documents its measure.
    """

    mask: Tensor
    confidence: float


class Detector(ABC):
    """Base class: detects the object of each photo from the features of a backbone.

    Attributes:
        tokens_per_batch: Maximum number of tokens in a batch.
        bytes_per_pixel: Memory that a photo and its masks take at the peak, in bytes per pixel; measured.
    """

    bytes_per_pixel = 12

    def __init__(self, config: DetectorConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.tokens_per_batch = TOKENS_PER_BATCH[backbone.device.type]

    def tokens(self, photo: Photo) -> int:
        """Returns the number of tokens that the photo will have, the measure of its cost."""
        h, w = self.backbone.grid(photo.pixels, self.config.image_size)
        return h * w

    @abstractmethod
    def detect(self, photos: Sequence[Photo]) -> list[Detection]:
        """Detects the object of each photo. Photos may have any sizes; results do not depend on batch composition.

        Raises:
            FloatingPointError: If the network gives NaN or infinite values for any photo.
        """


def make_detector(config: DetectorConfig, device: str) -> Detector:
    """Creates the detector of the settings.

    Args:
        config: The settings.
        device: Device as torch names it.

    Raises:
        UserError: If the backbone is unknown or weights cannot be loaded.
    """
    if config.name == "selfmask":
        from .selfmask import SelfMaskDetector

        return SelfMaskDetector(config, device)
    if config.name == "cluster-vote":
        from .cluster_vote import ClusterVoteDetector

        return ClusterVoteDetector(config, device)
    from .spectral import SpectralDetector

    return SpectralDetector(config, device)
