# SPDX-License-Identifier: MIT
"""What all detectors share: the base class, and how masks on patches become masks of photos."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import Ragged, resize

from ..backbones import Backbone, Fit
from ..batches import Size, cropped, runs, sizes_of
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
        step: Context in which `detect` runs a step of this name, such as `StepTimes.step`.
    """

    bytes_per_pixel = 12
    step: Callable[[str], AbstractContextManager] = contextlib.nullcontext

    def __init__(self, config: DetectorConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.tokens_per_batch = TOKENS_PER_BATCH[backbone.device.type]

    def fit(self, size: Size) -> Fit:
        """Returns how a photo of this height and width lies on the patches of the backbone."""
        return self.backbone.fit(size, self.config.image_size)

    def tokens(self, size: Size) -> int:
        """Returns the number of tokens of a photo of this height and width, the measure of its cost."""
        return math.prod(self.fit(size).grid)

    def features(self, backbone: Backbone, images: Ragged) -> Ragged:
        """Returns the features of the settings from a backbone, float32 [T, C], centered if the settings say so."""
        with self.step("network"):
            patches = backbone.prepare(images, self.config.image_size)
            features = backbone.extract(patches, [self.config.features])[self.config.features]
            return centered(features) if self.config.center_features else features

    def resize(self, images: Ragged) -> Ragged:
        """Resizes photos, uint8 [P, 3], to the sizes of the backbone's input, without padding."""
        return self.backbone.resize(images, self.config.image_size)

    @abstractmethod
    def detect(self, images: Ragged, sizes: Sequence[Size] | None = None) -> Detections:
        """Detects the object of each photo as published, without selection among candidates.

        On a CPU, results do not depend on batch composition.

        Args:
            images: Photos of any sizes, uint8 [P, 3], on the device of the backbone.
            sizes: Height and width of each mask; those of the photos by default.

        Raises:
            FloatingPointError: If the network gives NaN or infinite values for any photo.
        """

    @abstractmethod
    def candidates(self, images: Ragged) -> Ragged:
        """Masks of each photo that may be its object (see `candidates`), as many for every photo.

        Args:
            images: Photos of any sizes, uint8 [P, 3], on the device of the backbone.

        Returns:
            float32 [T, K] in [0, 1] on grids that cover the photos; above 0.5 is object.

        Raises:
            FloatingPointError: If the network gives NaN or infinite values for any photo.
        """


def centered(features: Ragged) -> Ragged:
    """Subtracts the mean feature of each photo from features [T, C]."""
    grids = ((images - images.mean((1, 2), keepdim=True)).flatten(0, 2) for images in runs(features))
    return features.with_rows(torch.cat([features.rows[:0], *grids]))


def cells(fit: Fit, per_patch: int = 1) -> Size:
    """Rows and columns of equal parts of a photo, without its padding, about `per_patch` along the side of a patch."""
    h, w = (max(1, round(side * per_patch / fit.patch)) for side in fit.size)
    return h, w


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


def certainty(softs: Ragged) -> Tensor:
    """Measures how clear and compact each soft mask [P] is, float64 [B] in [0, 1].

    It is the Dice coefficient of the mask and its own threshold at 0.5, times the perimeter of a square of the same
    area divided by the perimeter of the mask (its total variation), at most 1; 0 for an empty mask. Wrong masks often
    have ragged outlines.
    """
    values = [softs.rows.new_zeros(0, dtype=torch.float64)]
    for soft in runs(softs):
        hard = soft > 0.5
        padded = F.pad(soft, (1, 1, 1, 1))
        outline = sum(padded.diff(dim=dim).abs().sum((1, 2), dtype=torch.float64) for dim in (1, 2))
        area, inside = soft.sum((1, 2), dtype=torch.float64), (soft * hard).sum((1, 2), dtype=torch.float64)
        dice = 2 * inside / (area + hard.sum((1, 2)))
        compactness = (4 * area.sqrt() / outline).clamp_max(1.0)
        values.append(torch.where(hard.any(2).any(1), dice * compactness, 0.0))
    return torch.cat(values)


def backbone_options(config: DetectorConfig, device: str) -> dict[str, Any]:
    """The settings of a detector that `backbones.load` takes for each of its backbones."""
    return {
        "device": device,
        "precision": config.precision,
        "interpolation": config.interpolation,
        "patch_fit": config.patch_fit,
    }
