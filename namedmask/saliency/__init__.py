# SPDX-License-Identifier: MIT
"""Detectors, which find the object of a photo: one class for each `name` of DetectorConfig."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from namedmask_kernels import Ragged

from ..backbones import Backbone
from ..config import DetectorConfig
from ..photos import Photo

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


class Detection(NamedTuple):
    """The object of a photo.

    Attributes:
        mask: float32 [H, W] in [0, 1] at the requested size; above 0.5 is object.
        confidence: How clearly the detector separates the object from the background, in [0, 1]. Each detector
            documents its measure.
    """

    mask: Tensor
    confidence: float


class Detector(ABC):
    """Base class: detects the object of each photo from the features of a backbone.

    Attributes:
        tokens_per_batch: Maximum number of tokens in a batch.
        bytes_per_pixel: Memory that a photo and its masks take at the peak, in bytes per pixel of the larger; measured.
    """

    bytes_per_pixel = 12

    def __init__(self, config: DetectorConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.tokens_per_batch = TOKENS_PER_BATCH[backbone.device.type]

    def tokens(self, photo: Photo) -> int:
        """Returns the number of tokens that the photo will have, the measure of its cost."""
        return math.prod(self.backbone.fit(photo.pixels.shape[:2], self.config.image_size).grid)

    def size(self, photo: Photo) -> tuple[int, int]:
        """Returns the height and width of the photo as the backbone sees it, without padding."""
        return self.backbone.fit(photo.pixels.shape[:2], self.config.image_size).size

    def resize(self, photo: Photo) -> Photo:
        """Resizes a photo to `size`."""
        resized = self.backbone.resize(packed([photo.pixels], self.backbone), self.config.image_size)
        return Photo(photo.name, resized.grids()[0].cpu().numpy())

    @abstractmethod
    def detect(self, photos: Sequence[Photo], sizes: Sequence[tuple[int, int]] | None = None) -> list[Detection]:
        """Detects the object of each photo. Photos may have any sizes; results do not depend on batch composition.

        Args:
            photos: The photos.
            sizes: Height and width of each mask; those of the photos by default.

        Raises:
            FloatingPointError: If the network gives NaN or infinite values for any photo.
        """


def packed(images: Sequence[np.ndarray], backbone: Backbone) -> Ragged:
    """The batch of images, uint8 [H, W, 3] each, on the device of a backbone."""
    batch = Ragged.pack(images)
    return batch.with_rows(batch.rows.to(backbone.device))


def photo_sizes(photos: Sequence[Photo]) -> list[tuple[int, int]]:
    """The height and width of each photo."""
    return [(photo.pixels.shape[0], photo.pixels.shape[1]) for photo in photos]


def backbone_options(config: DetectorConfig, device: str) -> dict[str, Any]:
    """The settings of a detector that `backbones.load` takes for each of its backbones."""
    return {
        "device": device,
        "precision": config.precision,
        "interpolation": config.interpolation,
        "patch_fit": config.patch_fit,
    }


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
