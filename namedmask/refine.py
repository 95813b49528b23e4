# SPDX-License-Identifier: MIT
"""What makes a mask follow edges: one Refiner for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from namedmask_kernels import bilateral_solver

from .config import RefineConfig
from .photos import Photo

# The paper's sigmas belong to photos of this short side; the spatial one is scaled with the photo, so that a cell
# covers the same share of it. Colours need no scaling.
SHORT_SIDE = 512


class Refiner:
    """Refines one mask at a time; safe to call from several threads."""

    def __init__(self, config: RefineConfig):
        self.config = config

    def refine(self, photo: Photo, target: Tensor) -> Tensor:
        """target float32 [H, W], above 0.5 is object -> soft mask float32 [H, W], above 0.5 is object."""
        if self.config.name == "none":
            return target
        return bilateral_solver(
            (target > 0.5).float(),
            torch.from_numpy(photo.pixels),
            sigma_spatial=max(1.0, self.config.sigma_spatial * min(target.shape) / SHORT_SIDE),
            sigma_luma=self.config.sigma_luma,
            sigma_chroma=self.config.sigma_chroma,
            smoothness=self.config.smoothness,
        )
