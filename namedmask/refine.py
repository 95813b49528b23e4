# SPDX-License-Identifier: MIT
"""Refinement: makes masks follow the edges of the photo. One `Refiner` for all methods."""

from __future__ import annotations

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


class Refiner:
    """Refines masks with the method of the settings. May be called from several threads."""

    def __init__(self, config: RefineConfig):
        self.config = config
        self.bytes_per_pixel = BYTES_PER_PIXEL[config.name]

    def refine(self, images: Ragged, masks: Ragged) -> Ragged:
        if self.config.name == "none":
            return masks
        if self.config.largest_component:
            masks = keep_largest_component(masks)
        out = []
        for i, m in zip(images.grids(), masks.grids()):
            soft = getattr(self, f"_{self.config.name}")(Ragged.pack([m]), Ragged.pack([i]), min(m.shape) / SHORT_SIDE)
            if self.config.fill_holes:
                soft = fill_holes(soft)
            out.append(soft.rows)
        return masks.with_rows(torch.cat(out))

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
