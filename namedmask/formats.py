# SPDX-License-Identifier: MIT
"""Label maps as PNG files, as other tools read and write them: a pixel's value is the id of its class.

Written are indexed (palette) files of 8 bits, and gray ones of 16 bits where ids go beyond 255. Read are these, gray
files of 8 bits, and ImageNet-S's color files, whose id is R + 256 G.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UserError
from .files import atomic_write

MAX_LABEL = 0xFFFF
BACKGROUND = "background"  # the name of class 0


@functools.cache
def label_palette() -> np.ndarray:
    """Colors of ids 0 to 255, uint8 [256, 3]: PASCAL VOC's, which most viewers of masks know.

    An id's lowest three bits are the highest bits of red, green and blue, the next three the next ones, and so on: all
    colors differ, and those of small ids most.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return palette


def write_label_map(path: Path, labels: np.ndarray, classes: int) -> None:
    """Writes labels [H, W], ids below `classes`, as a PNG: indexed up to 256 classes, else gray with 16 bits.

    The file appears whole or not at all. Raises ValueError for an id that is no class.
    """
    if labels.ndim != 2 or (labels.size and not 0 <= labels.min() <= labels.max() < classes <= MAX_LABEL + 1):
        raise ValueError(f"write_label_map: expected labels [H, W] of {classes} classes, at most {MAX_LABEL + 1}")
    if classes <= 256:
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(label_palette().tobytes())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    with atomic_write(path) as file:
        image.save(file, "png")


def read_label_map(path: Path, red_green: bool = False) -> np.ndarray:
    """The ids in a PNG file, uint8 or uint16 [H, W]. red_green: color files, the id is R + 256 G (ImageNet-S).

    Raises UserError, naming the file, where it cannot be read or is not of the kind asked for.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image)
            mode = image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG: {error}") from None
    if red_green:
        if mode not in ("RGB", "RGBA"):
            raise UserError(f"{path} holds one value a pixel, not ids as R + 256 G")
        return pixels[..., 0] + (pixels[..., 1].astype(np.uint16) << 8)
    if mode == "1":
        return pixels.astype(np.uint8)  # not a view: the bytes that Pillow gives for True are 255
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise UserError(f"{path} is a picture in colors (PNG mode {mode}), not a label map with an id a pixel")
    if mode.startswith("I"):
        if pixels.size and not 0 <= pixels.min() <= pixels.max() <= MAX_LABEL:
            raise UserError(f"{path} holds ids above {MAX_LABEL}")
        return pixels.astype(np.uint16)
    return pixels
