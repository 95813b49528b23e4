# SPDX-License-Identifier: MIT
"""Overlays: photos with the colors of their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..formats import label_palette

Overlays = Literal["none", "sample", "all"]
SAMPLE = 100  # overlays of a sample
OPACITY = 0.5  # of the colors
ROWS = 256  # of an overlay that are computed at once


def shown_photos(names: Sequence[str], overlays: Overlays) -> set[str]:
    """The photos that get an overlay: none, all, or at most `SAMPLE`, evenly spaced in the list."""
    if overlays == "none":
        return set()
    if overlays == "all" or len(names) <= SAMPLE:
        return set(names)
    return {names[number * len(names) // SAMPLE] for number in range(SAMPLE)}


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blends the colors of a mask over a photo and outlines its objects in white.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        mask: Class of every pixel, uint16 [H, W].

    Returns:
        uint8 [H, W, 3].
    """
    image = pixels.copy()
    for first in range(0, len(mask), ROWS):  # temporary float64 arrays of a few rows only
        part, photo = mask[first : first + ROWS], pixels[first : first + ROWS]
        colors = label_palette()[part.astype(np.uint8)]  # colors repeat beyond 255 classes
        blended = ((1 - OPACITY) * photo + OPACITY * colors).astype(np.uint8)
        np.copyto(image[first : first + ROWS], blended, where=(part > 0)[..., None])
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    image[edge] = 255
    return image
