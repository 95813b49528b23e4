# SPDX-License-Identifier: MIT
"""Detectors, which find the object of a photo: one class for each `name` of DetectorConfig."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from namedmask_kernels import Ragged, resize

from ..backbones import Backbone, Fit
from ..batches import Size, cropped, sizes_of
from ..config import DetectorConfig

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


class Detections(NamedTuple):
    """The object of each photo of a batch.

    Attributes:
        masks: float32 [P] in [0, 1] at the requested sizes; above 0.5 is object.
        confidence: float64 [B], how clearly the detector separates the object from the background, in [0, 1]. Each
            detector documents its measure.
    """

    masks: Ragged
    confidence: Tensor


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

    def fit(self, size: Size) -> Fit:
        """Returns how a photo of this height and width lies on the patches of the backbone."""
        return self.backbone.fit(size, self.config.image_size)

    def tokens(self, size: Size) -> int:
        """Returns the number of tokens of a photo of this height and width, the measure of its cost."""
        return math.prod(self.fit(size).grid)

    def resize(self, images: Ragged) -> Ragged:
        """Resizes photos, uint8 [P, 3], to the sizes at which the backbone sees them, without padding."""
        return self.backbone.resize(images, self.config.image_size)

    @abstractmethod
    def detect(self, images: Ragged, sizes: Sequence[Size] | None = None) -> Detections:
        """Detects the object of each photo. On a CPU, results do not depend on batch composition.

        Args:
            images: Photos of any sizes, uint8 [P, 3], on the device of the backbone.
            sizes: Height and width of each mask; those of the photos by default.

        Raises:
            FloatingPointError: If the network gives NaN or infinite values for any photo.
        """


def at_sizes(values: Ragged, fits: Sequence[Fit], sizes: Sequence[Size]) -> Ragged:
    """Values on the patches, or on equal parts of them, at the pixels of masks, by bilinear interpolation.

    Args:
        values: float32 [T].
        fits: How each photo lies on the patches.
        sizes: Height and width of each mask.
    """
    return resize(without_padding(values, fits), sizes)


def without_padding(
    values: Ragged, fits: Sequence[Fit], interpolate: Callable[[Ragged, list[Size]], Ragged] = resize
) -> Ragged:
    """Values on the patches of padded photos, or on equal parts of them, at the pixels of the photos.

    Those of photos without padding are returned as they are.

    Args:
        values: [T, ...].
        fits: How each photo lies on the patches.
        interpolate: Function of a batch and the new size of each image.
    """
    padded = [fit.whole != fit.size for fit in fits]
    if not any(padded):
        return values
    grids = sizes_of(values)
    whole = [fit.whole if pad else grid for fit, pad, grid in zip(fits, padded, grids, strict=True)]
    photo = [fit.size if pad else grid for fit, pad, grid in zip(fits, padded, grids, strict=True)]
    return cropped(interpolate(values, whole), photo)


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
