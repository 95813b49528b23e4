# SPDX-License-Identifier: MIT
"""Antialiased resizing of images and masks, each to a size of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, register
from .ragged import FLOATING, Batch, Ragged, arrange, expect_int
from .reference import resize as reference

NAME = "resize"
INTERPOLATIONS = ("bilinear", "bicubic")


def resize(
    image: Batch,
    sizes: Sequence[int] | Sequence[Sequence[int]],
    *,
    interpolation: str = "bilinear",
    backend: str = "auto",
) -> Batch:
    """Resizes images with an antialiasing filter, as torchvision and Pillow do.

    Args:
        image: uint8 or floating point [H, W] or [H, W, C] (numpy or torch), or Ragged with rows [P] or [P, C]; floating
            point is computed in float32.
        sizes: The new height and width of all images, or one such pair for each image.
        interpolation: "bilinear" or "bicubic".
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        uint8, rounded to nearest, or float32, arranged like `image`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the image has the wrong shape, a size is not positive (or not 0 for an image without pixels), or
            the backend cannot run.
        RuntimeError: On a backward pass, since there is no gradient.

    Accuracy:
        uint8: at most 1 level from torchvision.transforms.v2.functional.resize on tensors, from Pillow, and from the
        reference in float64. float32: within 1e-5 of the largest value. NaN and Inf spread over the filter's reach.

    Cost:
        2 k flops per channel and pixel of the new height and the old width, and of the new image, for filters of k
        taps: 2 or 4, times the factor of a reduction.

    Determinism:
        Bit-identical for any batch and number of threads; backends and instruction levels differ by rounding.

    Source:
        The filters of Pillow's resize; R. G. Keys, Cubic convolution interpolation for digital image processing, IEEE
        TASSP 1981, with a = -0.5.

    Examples:
        >>> image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
        >>> resize(image, (30, 45), interpolation="bicubic").shape
        torch.Size([30, 45, 3])
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"{NAME}: interpolation must be one of {', '.join(INTERPOLATIONS)}, but is {interpolation!r}")
    dims = image.rows.ndim - 1 if isinstance(image, Ragged) else getattr(image, "ndim", 0) - 2
    packed = arrange(NAME, "image", image, 0 if dims == 0 else 1, torch.uint8, *FLOATING)
    pairs = _pairs(sizes, len(packed.shapes))
    rows = packed.rows if packed.rows.dtype == torch.uint8 else packed.rows.to(torch.float32)
    rows = rows[:, None] if dims == 0 else rows
    new = _resize(
        rows.contiguous(),
        packed.offsets,
        packed.shapes,
        [side for pair in pairs for side in pair],
        INTERPOLATIONS.index(interpolation),
        backend,
    )
    new = new[:, 0] if dims == 0 else new
    if isinstance(image, Ragged):
        return cast(Batch, Ragged.of_shapes(new, pairs))
    grid = new.reshape(*pairs[0], *new.shape[1:])
    return cast(Batch, grid.numpy() if isinstance(image, np.ndarray) else grid)


def _pairs(sizes: Any, count: int) -> list[tuple[int, int]]:
    """The new height and width of each image, from one size for all of them or one for each."""
    pairs = list(sizes)
    if pairs and (isinstance(pairs[0], (int, float, np.number)) or getattr(pairs[0], "ndim", 1) == 0):
        pairs = [pairs] * count
    if len(pairs) != count:
        raise ValueError(f"{NAME}: sizes must be one size, or one for each of the {count} images, but has {len(pairs)}")
    if odd := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{NAME}: a size must be a height and a width, but is {odd[0]!r}")
    return [(expect_int(NAME, "height", height), expect_int(NAME, "width", width)) for height, width in pairs]


# -- backends: every implementation takes the arguments of the schema below and returns its result -------------------


def _empty(image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int) -> Tensor:
    pixels = sum(math.prod(sides[i : i + 2]) for i in range(0, len(sides), 2))
    return image.new_empty(pixels, image.shape[1])


def _reference(image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int) -> Tensor:
    out = _new(image, offsets, shapes, sides)
    for b, (grid, new) in enumerate(zip(Ragged(image, offsets, shapes).grids(), out.grids(), strict=True)):
        if bool(math.prod(grid.shape[:2])) != bool(math.prod(new.shape[:2])):
            raise ValueError(f"{NAME}: image {b} and its new size must both have pixels, or neither")
        if new.numel():
            new.copy_(reference.resize(grid, (new.shape[0], new.shape[1]), INTERPOLATIONS[interpolation]))
    return out.rows


def _new(image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int]) -> Ragged:
    """The resized images, unfilled."""
    sizes = list(zip(sides[::2], sides[1::2], strict=True))
    return Ragged.of_shapes(_empty(image, offsets, shapes, sides, 0), sizes)


def _cpu(image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int) -> Tensor:
    out = _new(image, offsets, shapes, sides)
    backends.native().resize(image, offsets, shapes, *out, interpolation)
    return out.rows


def _cuda(image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int) -> Tensor:
    out = _new(image, offsets, shapes, sides)
    backends.native().cuda.resize(image, offsets, shapes, *out, interpolation, cuda_stream(image))
    return out.rows


_resize = register(
    f"{NAME}(Tensor image, Tensor offsets, Tensor shapes, int[] sides, int interpolation) -> Tensor",
    outputs=_empty,
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
)
