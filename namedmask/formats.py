# SPDX-License-Identifier: MIT
"""Label maps as PNG files: the value of a pixel is the id of its class.

`write_label_map` writes indexed (palette) files of 8 bits, or grayscale files of 16 bits if there are more than 256
classes. `read_label_map` also reads indexed and grayscale files of any other bit depth, and the color files of
ImageNet-S, where the id is R + 256 G.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import DamagedFile, UserError
from .files import atomic_write, open_file, read_bytes

MAX_LABEL = 0xFFFF
JPEG_SIDE = 65500  # maximum side of a JPEG
BACKGROUND = "background"  # the name of class 0
CATEGORIES = "categories.json"  # beside a folder of label maps: the names of classes 1, 2, ...


@functools.cache
def label_palette() -> np.ndarray:
    """Returns the colors of PASCAL VOC for ids 0 to 255, uint8 [256, 3].

    The lowest three bits of an id are the highest bits of red, green and blue, its next three bits the next ones, and
    so on: all colors differ, and those of small ids differ most.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return palette


def write_label_map(path: Path, labels: np.ndarray, classes: int) -> None:
    """Writes a label map as a PNG file, see `encode_label_map`. The file appears whole or not at all."""
    data = encode_label_map(labels, classes)
    with atomic_write(path) as file:
        file.write(data)


def encode_label_map(labels: np.ndarray, classes: int, gray: bool = False) -> bytes:
    """Encodes a label map as a PNG: indexed for up to 256 classes, else grayscale with 16 bits.

    Args:
        labels: Integer ids [H, W].
        classes: Number of classes; ids are 0 to classes - 1.
        gray: Grayscale with 8 bits instead of indexed: OpenCV and others read the colors of an indexed file.

    Raises:
        ValueError: If the labels have another shape or an id is not a class.
    """
    if labels.ndim != 2 or (labels.size and not 0 <= labels.min() <= labels.max() < classes <= MAX_LABEL + 1):
        raise ValueError(f"encode_label_map: expected labels [H, W] of {classes} classes, at most {MAX_LABEL + 1}")
    image = Image.fromarray(labels.astype(np.uint8 if classes <= 256 else np.uint16))
    if classes <= 256 and not gray:
        image.putpalette(label_palette().tobytes())
    return encode(image, "png")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image as a file of a kind such as "png", with options of `Image.save`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encodes pixels, uint8 [H, W, 3], as a JPEG; shrunk if a side is longer than `JPEG_SIDE`."""
    image = Image.fromarray(pixels)
    image.thumbnail((JPEG_SIDE, JPEG_SIDE))
    return encode(image, "jpeg", quality=quality)


@contextlib.contextmanager
def open_png(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Opens a PNG file: the image, and its bits per value. Pillow's modes do not tell 16 bits of a color from 8.

    Raises:
        UserError: If the file cannot be read, here or in the block.
    """
    try:
        with open_file(path) as file:
            depth = file.read(25)[24:]  # in the header chunk
            with Image.open(file, formats=("PNG",)) as image:
                yield image, depth[0]
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} cannot be read as a PNG: it is another file, or its header is damaged") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a PNG: {reason}") from None


def read_label_map(path: Path, red_green: bool = False) -> np.ndarray:
    """Reads the label map in a PNG file.

    The ids are the values that the file stores: neither the palette, nor the transparency, nor the gamma of the file
    changes them.

    Args:
        path: The file.
        red_green: Expect a color file in which the id is R + 256 G (ImageNet-S).

    Returns:
        The ids, uint8 or uint16 [H, W].

    Raises:
        UserError: If the file cannot be read or has another format.
    """
    with open_png(path) as (image, depth):
        pixels = np.asarray(image)
        mode = image.mode
    if red_green:
        if mode not in ("RGB", "RGBA"):
            raise UserError(f"{path} holds one value per pixel, not colors with the id R + 256 G")
        if depth == 16:
            raise UserError(f"{path} has colors of 16 bits; expected 8, with the id R + 256 G")
        return pixels[..., 0] + (pixels[..., 1].astype(np.uint16) << 8)
    if mode == "1":
        return pixels.astype(np.uint8)  # not a view: in Pillow's bytes True is 255
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise UserError(f"{path} is a color picture (PNG mode {mode}), not a label map; save it with one id per pixel")
    if mode == "L" and depth in (2, 4):  # Pillow stretches gray values to 0..255
        return pixels // (255 // ((1 << depth) - 1))
    if mode.startswith("I"):
        if pixels.size and not 0 <= pixels.min() <= pixels.max() <= MAX_LABEL:
            raise UserError(f"{path} holds ids above {MAX_LABEL}")
        return pixels.astype(np.uint16)
    return pixels


def read_categories(folder: Path, remedy: str) -> list[str]:
    """Returns the names of classes 1, 2, ... in categories.json of a folder.

    Raises:
        DamagedFile: If it cannot be read or holds something else; ends with `remedy`.
    """
    path = folder / CATEGORIES
    try:
        names = json.loads(read_bytes(path))["categories"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(path, error, remedy=remedy) from None
    return names
