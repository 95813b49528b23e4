# SPDX-License-Identifier: MIT
"""Antialiased resizing of images and masks, each to a size of its own, and the input of networks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, register
from .ragged import FLOATING, Batch, Packed, Ragged, arrange, as_float, expect_int, is_sequence, packed_shapes
from .reference import resize as reference

NAME = "resize"
INTERPOLATIONS = ("bilinear", "bicubic")
MAX_PATCH = 1024
NORMALIZED = (torch.float32, torch.bfloat16, torch.float16)

Sizes = Sequence[int] | Sequence[Sequence[int]]


@overload
def resize(
    image: Batch, sizes: Sizes, *, interpolation: str = ..., mean: Sequence[float] | None = ...,
    std: Sequence[float] | None = ..., patch: None = ..., dtype: torch.dtype = ..., backend: str = ...,
) -> Batch: ...  # fmt: skip
@overload
def resize(
    image: Batch, sizes: Sizes, *, interpolation: str = ..., mean: Sequence[float] | None = ...,
    std: Sequence[float] | None = ..., patch: int, dtype: torch.dtype = ..., backend: str = ...,
) -> Ragged: ...  # fmt: skip
def resize(
    image: Batch,
    sizes: Sizes,
    *,
    interpolation: str = "bilinear",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Batch | Ragged:
    """Resizes images with an antialiasing filter, as torchvision and Pillow do.

    With `mean` and `std`, uint8 images are normalized for a network, as by torchvision's Normalize; with `patch`, they
    are also cut into the patches of a ViT. The whole preprocessing of a batch is then one call.

    Args:
        image: uint8 or floating point [H, W] or [H, W, C] (numpy or torch), or Ragged with rows [P] or [P, C]; floating
            point is computed in float32.
        sizes: The new height and width of all images, or one such pair for each image.
        interpolation: "bilinear" or "bicubic".
        mean: C numbers, for colors in [0, 1]. The resized uint8 image x becomes (x / 255 - mean) / std.
        std: C positive numbers.
        patch: Side p of the patches; requires `mean` and `std`.
        dtype: Of normalized images: torch.float32, torch.bfloat16 or torch.float16.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        uint8, rounded to nearest, or float32 or `dtype`, arranged like `image`. With `patch` a Ragged with grids of
        ceil(H / p) x ceil(W / p) patches, rows [T, C * p * p] in the order (channel, y, x) of a convolution's weight
        [out, C, p, p]; beyond the image they are 0, the mean color.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the image has the wrong shape, a size is not positive (or not 0 for an image without pixels),
            `mean`, `std`, `patch` and `dtype` do not fit the image or each other, or the backend cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Accuracy:
        uint8 photos: at most 1 level from torchvision.transforms.v2.functional.resize on tensors, from Pillow, and from
        the reference in float64. In bicubic resizing of noise, where two roundings add up, 1 value in a million differs
        by 2 levels from the reference, 4 from torchvision, and 2 in a thousand from Pillow (whose own distance from the
        reference and torchvision is the same). float32: within 1e-5 of the largest value. Normalized values are those
        of the uint8 result in float64, rounded once. An axis that keeps its length keeps its values. NaN and Inf spread
        over the filter's reach.

    Cost:
        2 k flops per channel and pixel of the old height and the new width, and of the new image, for filters of k
        taps: 2 or 4, times the factor of a reduction. An axis that keeps its length costs nothing. The CPU version
        needs memory for an image of the old height and the new width.

    Determinism:
        Bit-identical for any batch and number of threads; uint8 on the CPU also at any instruction level. Otherwise
        backends and instruction levels differ by rounding.

    Source:
        The filters of Pillow's resize; R. G. Keys, Cubic convolution interpolation for digital image processing, IEEE
        TASSP 1981, with a = -0.5.

    Examples:
        >>> image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
        >>> resize(image, (30, 45), interpolation="bicubic").shape
        torch.Size([30, 45, 3])
        >>> patches = resize(image, (30, 45), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), patch=8)
        >>> patches.rows.shape, patches.shapes.tolist()
        (torch.Size([24, 192]), [[4, 6]])
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"{NAME}: interpolation must be one of {', '.join(INTERPOLATIONS)}, but is {interpolation!r}")
    dims = image.rows.ndim - 1 if isinstance(image, Ragged) else getattr(image, "ndim", 0) - 2
    packed = arrange(NAME, "image", image, 0 if dims == 0 else 1, torch.uint8, *FLOATING)
    pairs = _pairs(sizes, len(packed.shapes))
    rows = packed.rows if packed.rows.dtype == torch.uint8 else packed.rows.to(torch.float32)
    rows = rows[:, None] if dims == 0 else rows
    means, stds = _normalization(packed, rows.shape[1], mean, std, patch, dtype)
    side = 1 if patch is None else expect_int(NAME, "patch", patch, 1, MAX_PATCH)
    layout = packed_shapes(_grids(pairs, side))  # too many rows raise before they are allocated
    new = _resize(
        rows.contiguous(),
        packed.offsets,
        packed.shapes,
        [side for pair in pairs for side in pair],
        INTERPOLATIONS.index(interpolation),
        means,
        stds,
        side,
        dtype if means else rows.dtype,
        backend,
    )
    if patch is not None:
        return Ragged(new, *layout)
    new = new[:, 0] if dims == 0 else new
    if isinstance(image, Ragged):
        return Ragged(new, *layout)
    grid = new.reshape(*pairs[0], *new.shape[1:])
    return cast(Batch, grid.numpy() if isinstance(image, np.ndarray) else grid)


def _normalization(
    image: Packed[Any], channels: int, mean: Any, std: Any, patch: object, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """The checked means and standard deviations; empty if the image is not to be normalized."""
    if dtype not in NORMALIZED:
        raise TypeError(f"{NAME}: dtype must be torch.float32, torch.bfloat16 or torch.float16, but is {dtype!r}")
    if (mean is None) != (std is None):
        raise ValueError(f"{NAME}: mean and std must be given together")
    if mean is None:
        if patch is not None or dtype != torch.float32:
            raise ValueError(f"{NAME}: {'patch' if patch is not None else 'dtype'} requires mean and std")
        return [], []
    if image.rows.dtype != torch.uint8:
        raise TypeError(f"{NAME}: mean and std require a uint8 image, but it is {str(image.rows.dtype)[6:]}")
    if dtype == torch.bfloat16 and patch is None and isinstance(image.value, np.ndarray):
        raise TypeError(f"{NAME}: numpy has no bfloat16; pass the image as a tensor")
    means, stds = _numbers("mean", mean), _numbers("std", std)
    if len(means) != channels or len(stds) != channels:
        raise ValueError(
            f"{NAME}: mean and std must have a number for each of the {channels} channels, but have {len(means)} and "
            f"{len(stds)}"
        )
    for m, s in zip(means, stds, strict=True):
        if not s > 0 or not max(abs(m), abs(1 - m)) <= s * torch.finfo(dtype).max:
            raise ValueError(
                f"{NAME}: mean and std must give finite {dtype} values and std be positive, but are {m}, {s}"
            )
    return means, stds


def _numbers(name: str, values: Any) -> list[float]:
    if not is_sequence(values):
        raise TypeError(f"{NAME}: {name} must be a sequence of numbers, but is {values!r}")
    return [as_float(NAME, name, value) for value in values]


def _grids(pairs: Sequence[tuple[int, int]], patch: int) -> list[tuple[int, int]]:
    """The numbers of patches of images of these sizes."""
    return [(-(-height // patch), -(-width // patch)) for height, width in pairs]


def _pairs(sizes: Any, count: int) -> list[tuple[int, int]]:
    """The new height and width of each image, from one size for all of them or one for each."""
    if not is_sequence(sizes):
        raise TypeError(f"{NAME}: sizes must be a height and a width, or one such pair per image, but is {sizes!r}")
    pairs = list(sizes)
    if pairs and not is_sequence(pairs[0]):
        pairs = [pairs] * count
    if len(pairs) != count:
        raise ValueError(f"{NAME}: sizes must be one size, or one for each of the {count} images, but has {len(pairs)}")
    if odd := [pair for pair in pairs if not is_sequence(pair) or len(pair) != 2]:
        raise ValueError(f"{NAME}: a size must be a height and a width, but is {odd[0]!r}")
    return [(expect_int(NAME, "height", height), expect_int(NAME, "width", width)) for height, width in pairs]


# -- backends: every implementation takes the arguments of the schema below and returns its result -------------------


def _empty(
    image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int, mean: list[float],
    std: list[float], patch: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    cells = sum(h * w for h, w in _grids(list(zip(sides[::2], sides[1::2], strict=True)), patch))
    return image.new_empty(cells, image.shape[1] * patch**2, dtype=dtype)


def _reference(
    image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int, mean: list[float],
    std: list[float], patch: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _empty(image, offsets, shapes, sides, interpolation, mean, std, patch, dtype)
    first = 0
    sizes = zip(sides[::2], sides[1::2], strict=True)
    for b, (grid, size) in enumerate(zip(Ragged(image, offsets, shapes).grids(), sizes, strict=True)):
        if (0 in grid.shape[:2]) != (0 in size):
            raise ValueError(f"{NAME}: image {b} and its new size must both have pixels, or neither")
        if 0 in size or not image.shape[1]:  # torch resizes no image without channels
            continue
        new = reference.resize(grid, size, INTERPOLATIONS[interpolation])
        if mean:
            new = reference.normalize(new, mean, std)
        rows = reference.patches(new, patch)
        out[first : first + len(rows)] = rows.to(dtype)
        first += len(rows)
    return out


def _native_arguments(
    image: Tensor, offsets: Tensor, shapes: Tensor, sides: list[int], interpolation: int, mean: list[float],
    std: list[float], patch: int, dtype: torch.dtype,
) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
    """The unfilled result and the arguments of the C++ and CUDA functions."""
    sizes = list(zip(sides[::2], sides[1::2], strict=True))
    rows = _empty(image, offsets, shapes, sides, interpolation, mean, std, patch, dtype)
    out = Ragged.of_shapes(rows, _grids(sizes, patch))
    new_sizes = torch.from_numpy(np.array(sizes, np.int32).reshape(-1, 2))
    levels = _levels(tuple(mean), tuple(std), dtype, image.device)
    return rows, (image, offsets, shapes, *out, new_sizes, levels, interpolation, patch)


@functools.lru_cache(maxsize=64)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The normalized value of every uint8 level, [C, 256]."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, len(mean))
    return reference.normalize(levels, mean, std).T.to(dtype).contiguous().to(device)


def _cpu(*arguments: Any) -> Tensor:
    rows, native = _native_arguments(*arguments)
    backends.native().resize(*native)
    return rows


def _cuda(*arguments: Any) -> Tensor:
    rows, native = _native_arguments(*arguments)
    backends.native().cuda.resize(*native, cuda_stream(rows))
    return rows


_resize = register(
    f"{NAME}(Tensor image, Tensor offsets, Tensor shapes, int[] sides, int interpolation, float[] mean, float[] std, "
    "int patch, ScalarType dtype) -> Tensor",
    outputs=_empty,
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
)
