# SPDX-License-Identifier: MIT
"""Refinement: makes masks follow the edges of the photo. One `Refiner` for all methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import namedmask_kernels
from namedmask_kernels import Ragged

from .config import RefineConfig

# Lengths in the settings are for photos with this short side, in pixels. They are scaled with the photo.
SHORT_SIDE = 512
# Memory that each method takes at its peak, in bytes per pixel; measured at 8 megapixels.
BYTES_PER_PIXEL = {"none": 4, "bilateral": 32, "crf": 100, "pamr": 130}


def keep_largest_component(targets: Ragged) -> Ragged:
    """Sets targets [P] to 0 where they are object (above 0.5) outside the largest 4-connected component of a photo."""
    is_object = targets.rows > 0.5
    largest = namedmask_kernels.largest_component(targets.with_rows(is_object)).rows
    return targets.with_rows(targets.rows.masked_fill(is_object & ~largest.bool(), 0.0))


def fill_holes(soft: Ragged) -> Ragged:
    """Sets soft masks [P] to 1 where they are background (0.5 or less) that is enclosed by the object of a photo."""
    is_object = soft.rows > 0.5
    filled = namedmask_kernels.fill_holes(soft.with_rows(is_object)).rows
    return soft.with_rows(soft.rows.masked_fill(filled.bool() & ~is_object, 1.0))


def scaled(length: float, scales: Sequence[float]) -> list[float]:
    """A length of the settings in pixels of each photo, at least 1."""
    return [max(1.0, length * scale) for scale in scales]


class Refiner:
    """Refines masks with the method of the settings. May be called from several threads."""

    def __init__(self, config: RefineConfig):
        self.config = config
        self.bytes_per_pixel = BYTES_PER_PIXEL[config.name]

    def refine(self, images: Ragged, masks: Ragged) -> Ragged:
        """Refines the mask of each photo of a batch. Results do not depend on batch composition.

        Args:
            images: Photos of any sizes, uint8 [P, 3], on any device.
            masks: A mask for each photo, float32 [P] in [0, 1], on the same device; above 0.5 is object.

        Returns:
            Refined soft masks, float32 [P], on the same device; above 0.5 is object.
        """
        if self.config.name == "none":
            return masks
        if self.config.largest_component:
            masks = keep_largest_component(masks)
        scales = [min(shape) / SHORT_SIDE for shape in masks.shapes.tolist()]
        soft = getattr(self, f"_{self.config.name}")(images, masks, scales)
        return fill_holes(soft) if self.config.fill_holes else soft

    def _bilateral(self, images: Ragged, masks: Ragged, scales: Sequence[float]) -> Ragged:
        config = self.config
        return namedmask_kernels.bilateral_solver(
            masks.with_rows((masks.rows > 0.5).float()),  # as published
            images,
            sigma_spatial=scaled(config.sigma_spatial, scales),
            sigma_luma=config.sigma_luma,
            sigma_chroma=config.sigma_chroma,
            smoothness=config.smoothness,
        )

    def _crf(self, images: Ragged, masks: Ragged, scales: Sequence[float]) -> Ragged:
        config = self.config.crf
        # The masks of the detector are nearly binary; the probabilities should be less certain.
        foreground = 0.5 + (2 * config.confidence - 1) * (masks.rows - 0.5)
        marginals = namedmask_kernels.dense_crf(
            masks.with_rows(torch.stack([1 - foreground, foreground], 1)),
            images,
            iterations=config.iterations,
            gaussian=(scaled(config.gaussian_sigma, scales), config.gaussian_weight),
            bilateral=(scaled(config.bilateral_sigma, scales), config.color_sigma, config.bilateral_weight),
        )
        return masks.with_rows(marginals.rows[:, 1])

    def _pamr(self, images: Ragged, masks: Ragged, scales: Sequence[float]) -> Ragged:
        config = self.config.pamr
        dilations = [sorted({max(1, round(d * scale)) for d in config.dilations}) for scale in scales]
        return namedmask_kernels.pamr(masks, images, dilations=dilations, iterations=config.iterations)
