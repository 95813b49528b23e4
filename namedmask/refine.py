# SPDX-License-Identifier: MIT
"""Refinement: makes masks follow the edges of the photo. One `Refiner` for all methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import namedmask_kernels
from namedmask_kernels import Ragged

from .config import RefineConfig
from .photos import Photo

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


class Refiner:
    """Refines masks with the method of the settings. May be called from several threads."""

    def __init__(self, config: RefineConfig):
        self.config = config
        self.bytes_per_pixel = BYTES_PER_PIXEL[config.name]

    def refine(self, photos: Sequence[Photo], targets: Sequence[Tensor]) -> list[Tensor]:
        """Refines one mask for each photo. Results do not depend on batch composition.

        Args:
            photos: Photos of any sizes.
            targets: A mask for each photo, float32 [H, W] in [0, 1]; above 0.5 is object.

        Returns:
            Refined soft masks, float32 [H, W]; above 0.5 is object.
        """
        if self.config.name == "none":
            return list(targets)
        by_side: dict[int, list[int]] = {}
        for number, target in enumerate(targets):
            by_side.setdefault(min(target.shape), []).append(number)
        refined: dict[int, Tensor] = {}
        for side, numbers in by_side.items():  # photos with the same short side have the same settings
            batch = Ragged.pack([targets[number] for number in numbers])
            if self.config.largest_component:
                batch = keep_largest_component(batch)
            images = Ragged.pack([torch.from_numpy(photos[number].pixels) for number in numbers])
            soft = getattr(self, f"_{self.config.name}")(batch, images, side / SHORT_SIDE)
            if self.config.fill_holes:
                soft = fill_holes(soft)
            refined.update(zip(numbers, soft.grids(), strict=True))
        return [refined[number] for number in range(len(targets))]

    def _bilateral(self, targets: Ragged, images: Ragged, scale: float) -> Ragged:
        config = self.config
        return namedmask_kernels.bilateral_solver(
            targets.with_rows((targets.rows > 0.5).float()),  # as published
            images,
            sigma_spatial=max(1.0, config.sigma_spatial * scale),
            sigma_luma=config.sigma_luma,
            sigma_chroma=config.sigma_chroma,
            smoothness=config.smoothness,
        )

    def _crf(self, targets: Ragged, images: Ragged, scale: float) -> Ragged:
        config = self.config.crf
        # The masks of the detector are nearly binary; the probabilities should be less certain.
        foreground = 0.5 + (2 * config.confidence - 1) * (targets.rows - 0.5)
        marginals = namedmask_kernels.dense_crf(
            targets.with_rows(torch.stack([1 - foreground, foreground], 1)),
            images,
            iterations=config.iterations,
            gaussian=(max(1.0, config.gaussian_sigma * scale), config.gaussian_weight),
            bilateral=(max(1.0, config.bilateral_sigma * scale), config.color_sigma, config.bilateral_weight),
        )
        return targets.with_rows(marginals.rows[:, 1])

    def _pamr(self, targets: Ragged, images: Ragged, scale: float) -> Ragged:
        config = self.config.pamr
        dilations = sorted({max(1, round(d * scale)) for d in config.dilations})
        return namedmask_kernels.pamr(targets, images, dilations=dilations, iterations=config.iterations)
