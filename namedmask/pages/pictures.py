# SPDX-License-Identifier: MIT
"""The pictures of the pages: photos and masks, as bytes or as URLs that hold them."""

from __future__ import annotations

import base64
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..formats import encode

BYTES_PER_PIXEL = 24  # of a photo while it is decoded, or reduced together with its mask
_SIDE = 224  # pixels of the longer side of a thumbnail
# Any single color is invisible on some photo. Therefore the background is dimmed and the outline is black and white.
_BACKGROUND, _OBJECT, _LIGHT, _DARK = range(4)
_PALETTE = [0, 0, 0, 255, 40, 140, 255, 255, 255, 0, 0, 0]
_OPACITY = bytes([80, 72, 255, 200])


class Picture(NamedTuple):
    """A picture of a photo: a data URI or URL and its size. `share` is its scale, `part` whether it is a part of it."""

    image: str
    width: int
    height: int
    share: float = 1.0
    part: bool = False


def thumbnail_size(size: tuple[int, ...], side: int = _SIDE) -> tuple[int, int]:
    """Width and height of the thumbnail of a photo of this height and width."""
    scale = side / max(size)
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


def draw_thumbnail(pixels: np.ndarray, side: int = _SIDE) -> bytes:
    """The thumbnail of a photo, as JPEG."""
    size = thumbnail_size(pixels.shape[:2], side)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2)
    return encode(image, "jpeg", quality=80, optimize=True)


def overlay_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    return data_uri(draw_overlay(mask, size), "png")


def draw_overlay(mask: np.ndarray, size: tuple[int, int]) -> bytes:
    """The mask tinted and outlined, the background dimmed, as PNG: an image of its own, so that the page can hide it.

    Args:
        mask: bool [height, width].
        size: Width and height of the image.
    """
    coverage = np.asarray(Image.fromarray(mask.view(np.uint8) * 255).resize(size, Image.Resampling.BOX))
    # A mask of a few pixels covers less than half of every thumbnail pixel, but must not look empty.
    small = coverage >= min(128, max(1, coverage.max()))
    padded = np.pad(small, 2)  # zeros, so that an object that touches the border of the photo is outlined there too
    offsets = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    neighbors = [np.roll(padded, offset, (0, 1))[2:-2, 2:-2] for offset in offsets]
    colors = np.where(small, _OBJECT, _BACKGROUND).astype(np.uint8)
    colors[np.logical_or.reduce(neighbors) & ~small] = _DARK
    colors[small & ~np.logical_and.reduce(neighbors)] = _LIGHT
    image = Image.fromarray(colors)
    image.putpalette(_PALETTE)
    return encode(image, "png", bits=2, transparency=_OPACITY)


def data_uri(data: bytes, kind: str) -> str:
    """An image of this kind, as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
