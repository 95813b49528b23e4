# SPDX-License-Identifier: MIT
"""What makes a mask follow edges: one Refiner for every method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import namedmask_kernels
from namedmask_kernels import Ragged

from .config import RefineConfig
from .photos import Photo

# The settings belong to photos of this short side; lengths are scaled with the photo, so that they cover the same share
# of it. Colors need no scaling.
SHORT_SIDE = 512


def without_small_parts(targets: Ragged) -> Ragged:
    """Targets [P] with 0 wherever they are object (above 0.5) and not of the largest 4-connected part of a photo."""
    is_object = targets.rows > 0.5
    largest = namedmask_kernels.largest_component(targets.with_rows(is_object)).rows
    return targets.with_rows(targets.rows.masked_fill(is_object & ~largest.bool(), 0.0))


def without_holes(soft: Ragged) -> Ragged:
    """Soft masks [P] with 1 wherever they are background (0.5 or less) that a photo's object surrounds."""
    is_object = soft.rows > 0.5
    filled = namedmask_kernels.fill_holes(soft.with_rows(is_object)).rows
    return soft.with_rows(soft.rows.masked_fill(filled.bool() & ~is_object, 1.0))


class Refiner:
    """Refines masks by the method that the settings name; safe to call from several threads."""

    def __init__(self, config: RefineConfig):
        self.config = config

    def refine(self, photos: Sequence[Photo], targets: Sequence[Tensor]) -> list[Tensor]:
        """Targets float32 [H, W], above 0.5 is object, in between is doubt -> soft masks float32 [H, W], likewise.

        Photos may be of any sizes; none influences another.
        """
        if self.config.name == "none":
            return list(targets)
        by_side: dict[int, list[int]] = {}
        for number, target in enumerate(targets):
            by_side.setdefault(min(target.shape), []).append(number)
        refined: dict[int, Tensor] = {}
        for side, numbers in by_side.items():  # all of a batch have the same settings
            batch = Ragged.pack([targets[number] for number in numbers])
            if self.config.largest_component:
                batch = without_small_parts(batch)
            images = Ragged.pack([torch.from_numpy(photos[number].pixels) for number in numbers])
            soft = getattr(self, f"_{self.config.name}")(batch, images, side / SHORT_SIDE)
            if self.config.fill_holes:
                soft = without_holes(soft)
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
        # The detector's masks are nearly binary, but not that sure.
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
