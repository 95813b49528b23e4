# SPDX-License-Identifier: MIT
"""The fast bilateral solver: smooths a mask so that it follows the edges of its image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

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
    pack_numpy,
)
from .reference import bilateral_solver as reference

NAME = "bilateral_solver"
MOST_EXTREME = 2.0**40  # confidence, smoothness and their ratio are computed in float32 between this and its inverse


def bilateral_solver(
    target: Batch,
    image: Ragged | Array,
    *,
    confidence: float = 0.999,
    sigma_spatial: float = 16,
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
        confidence: Confidence in the target, above 0 and at most 1, the same for every pixel.
        sigma_spatial: Side of the bilateral grid's cells in pixels, at least 1. Pixels of one cell get one value.
        sigma_luma: Side of the cells in luma, in levels of full-range BT.601 YCbCr (0 to 255), at least 1.
        sigma_chroma: Side of the cells in the two chroma channels, likewise.
        smoothness: Weight of the smoothness term against the data term, at least 0. Only its ratio to `confidence`
            matters; ratios above 2^40 (1e12) count as 2^40, where float32 no longer sees the data term.
        iterations: Maximum number of conjugate gradient iterations. The default is the published one; images require
            about 140 iterations to converge, and after 25 the result is within 0.02 of the solution.
        tolerance: Stops when the norm of the residual is at most this fraction of the right-hand side's.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        The soft mask, float32, arranged like `target`; threshold it at 0.5 for a binary mask. A constant target is
        returned unchanged.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, a parameter is out of range, the target is not finite (the
            message names the image), or the backend cannot run. The CUDA version does not wait for the GPU to check the
            target: the result of an image whose target is not finite is NaN.

    Accuracy:
        The reference computes in float64, the other backends in float32. For targets from 0 to 1 they agree within
        about 2e-8 * smoothness / confidence (1e-5 by default).

    Cost:
        About 4 ms on one CPU core for an image of 512 x 683; the images of a Ragged batch are distributed over torch's
        threads. On an H100, 0.05 ms per image in a batch of 64, but 3 ms for a single image, since the solver runs one
        thread block per image. The CUDA version allocates 84 bytes per pixel.

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
    weights = _in_range(
        _number("confidence", confidence, "above 0 and at most 1", lambda x: 0 < x <= 1),
        _number("smoothness", smoothness, "finite and at least 0", lambda x: 0 <= x < math.inf),
    )
    sigmas = [
        _number(name, sigma, "finite and at least 1", lambda x: 1 <= x < math.inf)
        for name, sigma in (
            ("sigma_spatial", sigma_spatial),
            ("sigma_luma", sigma_luma),
            ("sigma_chroma", sigma_chroma),
        )
    ]
    steps = expect_int(NAME, "iterations", iterations)
    enough = _number("tolerance", tolerance, "finite and at least 0", lambda x: 0 <= x < math.inf)
    settings = weights[0], *sigmas, weights[1], steps, enough
    arrays = backends.numpy_arguments(NAME, backend, (target, 0, (np.float32, np.bool_)), (image, 3, (np.uint8,)))
    if arrays:
        out = np.empty(arrays[0].shape, np.float32)
        grids = pack_numpy(arrays[0].astype(np.float32, copy=False), arrays[1])
        backends.native().bilateral_solver(*grids, out.reshape(-1), *settings)
        return cast(Batch, out)
    packed = arrange(NAME, "target", target, 0, *FLOATING, torch.bool)
    pixels = expect_image(NAME, image, packed)
    rows = packed.rows.to(torch.float32).contiguous()
    return packed.restore(_solve(rows, pixels, packed.offsets, packed.shapes, *settings, backend))


def _number(name: str, value: float, expected: str, valid: Callable[[float], bool]) -> float:
    number = as_float(NAME, name, value)
    if not valid(number):
        raise ValueError(f"{NAME}: {name} must be {expected}, but is {value}")
    return number


def _in_range(confidence: float, smoothness: float) -> tuple[float, float]:
    """Brings extreme weights into the range of float32. The solution depends on their ratio alone."""
    if confidence * MOST_EXTREME >= 1 and smoothness <= MOST_EXTREME * confidence:
        return confidence, smoothness
    larger = max(confidence, smoothness)
    return max(confidence / larger, 1 / MOST_EXTREME), smoothness / larger


def _solve_reference(target: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings: float) -> Tensor:
    expect_finite(NAME, "target", target.isfinite(), offsets)
    return per_image(reference.bilateral_solver, numpy=True)(target, image, offsets, shapes, *settings)


_solve = register(
    f"{NAME}(Tensor target, Tensor image, Tensor offsets, Tensor shapes, float confidence, float sigma_spatial, "
    "float sigma_luma, float sigma_chroma, float smoothness, int iterations, float tolerance) -> Tensor",
    reference=_solve_reference,
    cuda_workspace=lambda pixels, images: 21 * pixels + 3 * images,
)
