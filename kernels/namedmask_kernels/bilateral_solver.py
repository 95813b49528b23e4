# SPDX-License-Identifier: MIT
"""The fast bilateral solver: smooths a mask so that it follows the edges of its image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import per_image, register
from .ragged import (
    FLOATING,
    Array,
    Batch,
    Ragged,
    arrange,
    as_float,
    expect_finite,
    expect_image,
    expect_int,
    expect_per_image,
    expect_same_grids,
    image_of_row,
    pack_numpy,
)
from .reference import bilateral_solver as reference

NAME = "bilateral_solver"
MOST_EXTREME = 2.0**40  # confidence, smoothness and their ratio are computed in float32 between this and its inverse


def bilateral_solver(
    target: Batch,
    image: Ragged | Array,
    *,
    confidence: float | Ragged | Array = 0.999,
    sigma_spatial: float | Sequence[float] = 16,
    sigma_luma: float = 16,
    sigma_chroma: float = 8,
    smoothness: float = 256.0,
    iterations: int = 25,
    tolerance: float = 1e-5,
    backend: str = "auto",
) -> Batch:
    """Smooths a mask within the regions of its image, so that the mask's edges move to the image's edges.

    Args:
        target: Floating point or bool [H, W] (numpy or torch), or Ragged with rows [P]. Usually a mask from 0 to 1, but
            any finite values are allowed; computed in float32.
        image: uint8 RGB [H, W, 3], or Ragged with rows [P, 3], with the height and width of `target`.
        confidence: Confidence in the target: a number above 0 and at most 1 for every pixel; or an image from 0 to 1,
            floating point or bool, with the height and width of `target`. The solution in cells of the grid without
            any confidence comes from their neighbors alone; an image without any confidence gives 0.
        sigma_spatial: Side of the bilateral grid's cells in pixels, at least 1: a number, or one for each image of a
            Ragged batch (a sequence, or a 1-D array or tensor). Pixels of one cell get one value.
        sigma_luma: Side of the cells in luma, in levels of full-range BT.601 YCbCr (0 to 255), at least 1.
        sigma_chroma: Side of the cells in the two chroma channels, likewise.
        smoothness: Weight of the smoothness term against the data term, at least 0. Only its ratio to `confidence`
            matters; ratios (or with a confidence image, weights) above 2^40 (1e12) count as 2^40, where the data term
            is lost in float32's rounding.
        iterations: Maximum number of conjugate gradient iterations. The default is the published one; images require
            about 140 iterations to converge, and after 25 the result is within 0.02 of the solution.
        tolerance: Stops when the norm of the residual is at most this fraction of the right-hand side's.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        The soft mask, float32, arranged like `target`; threshold it at 0.5 for a binary mask. A constant target is
        returned unchanged.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, a parameter is out of range, there is not one `sigma_spatial` per
            image, the target is not finite or a confidence image not from 0 to 1 (the message names the image), or the
            backend cannot run. The CUDA version does not wait for the GPU to check the target and the confidence: the
            result of such an image is NaN.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Accuracy:
        The reference computes in float64, the other backends in float32. For targets from 0 to 1 they agree within
        about 2e-8 * smoothness / confidence (1e-5 by default), where that of a confidence image is its mean over a
        connected region of the grid; the CUDA version, in the emulator, reached 6.7e-5 for a random image of 17 x 19
        pixels with a luma sigma of 1. A GPU rounds confidences to multiples of 2^-61 times the number of pixels.

    Cost:
        On one core of a Zen 4, 3 ms for an image of 512 x 683; the images of a Ragged batch are distributed over
        torch's threads. The CUDA version solves an image with one thread block, or with a cluster of 8 where the GPU
        has clusters (compute capability 9.0), and allocates 92 bytes per pixel. With one block, an H100 took 0.05 ms
        per image in a batch of 64, but 3 ms for a single image; no GPU has run clusters.

    Determinism:
        On the CPU, bit-identical for any batch, number of threads and instruction set. On a GPU, bit-identical on every
        call and for any batch.

    Source:
        J. T. Barron and B. Poole, The Fast Bilateral Solver, ECCV 2016; default parameters of SelfMask and NamedMask.

    Examples:
        >>> image = torch.full((120, 160, 3), 40, dtype=torch.uint8)
        >>> image[30:90, 40:120] = 200
        >>> rough = torch.zeros(120, 160)
        >>> rough[20:84, 48:128] = 1
        >>> (bilateral_solver(rough, image) > 0.5).sum()  # the bright rectangle
        tensor(4800)
    """
    weight = _number("smoothness", smoothness, "finite and at least 0", lambda x: 0 <= x < math.inf)
    per_pixel = isinstance(confidence, Ragged) or (isinstance(confidence, Array) and confidence.ndim > 0)
    if per_pixel:
        weights = 1.0, min(weight, MOST_EXTREME)
    else:
        number = _number("confidence", cast(float, confidence), "above 0 and at most 1", lambda x: 0 < x <= 1)
        weights = _in_range(number, weight)
    spatial = [
        _sigma("sigma_spatial", sigma) for sigma in expect_per_image(NAME, "sigma_spatial", sigma_spatial, target)
    ]
    luma, chroma = _sigma("sigma_luma", sigma_luma), _sigma("sigma_chroma", sigma_chroma)
    steps = expect_int(NAME, "iterations", iterations)
    enough = _number("tolerance", tolerance, "finite and at least 0", lambda x: 0 <= x < math.inf)
    settings = weights[0], spatial, luma, chroma, weights[1], steps, enough
    soft = np.float32, np.bool_
    maps = ((confidence, 0, soft),) if per_pixel else ()
    arrays = backends.numpy_arguments(NAME, backend, (target, 0, soft), (image, 3, (np.uint8,)), *maps)
    if arrays:
        out = np.empty(arrays[0].shape, np.float32)
        own = arrays[2].astype(np.float32, copy=False).reshape(-1) if per_pixel else _NO_MAP
        if not ((own >= 0) & (own <= 1)).all():
            raise _not_a_fraction(0)
        *grids, offsets, shapes = pack_numpy(arrays[0].astype(np.float32, copy=False), arrays[1])
        backends.native().bilateral_solver(*grids, own, offsets, shapes, out.reshape(-1), *settings)
        return cast(Batch, out)
    packed = arrange(NAME, "target", target, 0, *FLOATING, torch.bool)
    pixels = expect_image(NAME, image, packed)
    rows = packed.rows.to(torch.float32).contiguous()
    confidences = rows.new_empty(0)
    if per_pixel:
        values = arrange(NAME, "confidence", cast(Array, confidence), 0, *FLOATING, torch.bool)
        expect_same_grids(NAME, values, packed)
        confidences = values.rows.to(torch.float32).contiguous()
    return packed.restore(_solve(rows, pixels, confidences, packed.offsets, packed.shapes, *settings, backend))


def _number(name: str, value: float, expected: str, valid: Callable[[float], bool]) -> float:
    number = as_float(NAME, name, value)
    if not valid(number):
        raise ValueError(f"{NAME}: {name} must be {expected}, but is {value}")
    return number


def _sigma(name: str, value: float) -> float:
    return _number(name, value, "finite and at least 1", lambda x: 1 <= x < math.inf)


def _in_range(confidence: float, smoothness: float) -> tuple[float, float]:
    """Brings extreme weights into the range of float32. The solution depends on their ratio alone."""
    if confidence * MOST_EXTREME >= 1 and smoothness <= MOST_EXTREME * confidence:
        return confidence, smoothness
    larger = max(confidence, smoothness)
    return max(confidence / larger, 1 / MOST_EXTREME), smoothness / larger


def _not_a_fraction(image: int) -> ValueError:
    return ValueError(f"{NAME}: confidence must be from 0 to 1, but image {image} holds other values")


def _expect_fractions(confidences: Tensor, offsets: Tensor) -> None:
    valid = (confidences >= 0) & (confidences <= 1)
    if not valid.all():
        raise _not_a_fraction(image_of_row(int(valid.byte().argmin()), offsets))


_NO_MAP = np.empty(0, np.float32)

# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------
# `confidences` is [P], or [0] if `confidence` holds for all pixels.


def _solve_reference(
    target: Tensor, image: Tensor, confidences: Tensor, offsets: Tensor, shapes: Tensor, *settings: Any
) -> Tensor:
    expect_finite(NAME, "target", target.isfinite(), offsets)
    if not len(confidences):
        run = per_image(reference.bilateral_solver, numpy=True, varying=(1,))
        return run(target, image, offsets, shapes, *settings)
    _expect_fractions(confidences, offsets)
    run = per_image(reference.bilateral_solver, numpy=True, varying=(0,))
    return run(target, image, confidences, offsets, shapes, *settings[1:])


def _solve_cpu(
    target: Tensor, image: Tensor, confidences: Tensor, offsets: Tensor, shapes: Tensor, *settings: Any
) -> Tensor:
    _expect_fractions(confidences, offsets)
    out = torch.empty_like(target)
    backends.native().bilateral_solver(target, image, confidences, offsets, shapes, out, *settings)
    return out


_solve = register(
    f"{NAME}(Tensor target, Tensor image, Tensor confidences, Tensor offsets, Tensor shapes, float confidence, "
    "float[] sigma_spatial, float sigma_luma, float sigma_chroma, float smoothness, int iterations, float tolerance) "
    "-> Tensor",
    reference=_solve_reference,
    cpu=_solve_cpu,
    cuda_workspace=lambda pixels, images: 23 * pixels + 3 * images + 768 * min(images, 64),
    capturable=True,
)
