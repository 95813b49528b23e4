# SPDX-License-Identifier: MIT
"""The fast bilateral solver: a mask that follows the edges of its photo."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, expect_same_grids, pack_numpy
from .reference import bilateral_solver as reference

NAME = "bilateral_solver"


def bilateral_solver(
    target: Ragged | Array,
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
) -> Ragged | Array:
    """Smooths a mask within the regions of its photo, so that its edges move to the photo's.

    target:        float32 or bool [H, W] (numpy or torch), or Ragged with rows [P]; usually a mask from 0 to 1, but any
                   finite values. The result is float32 and arranged like it: the soft mask, > 0.5 is the binary one.
    image:         uint8 [H, W, 3], RGB, or Ragged with rows [P, 3]; of the target's height and width
    confidence:    trust in the target, above 0 and at most 1, the same for every pixel
    sigma_spatial: side of the grid's cells in pixels; sigma_luma and sigma_chroma: in steps of full-range BT.601 YCbCr
                   (0 to 255). Each at least 1. Pixels of one cell get one value.
    smoothness:    weight of smoothness against faithfulness to the target, at least 0
    iterations:    steps of conjugate gradients at most. The defaults are the published ones, and photos need about 140
                   steps to converge: after 25 the result is within 0.02 of the solution.
    tolerance:     stops when the residual's norm is at most this share of the right-hand side's

    A constant target comes back as it is. The result depends neither on the batch nor on the number of threads nor on
    the CPU's instruction level, to the bit; on a GPU it is the same every time. The reference computes in float64, the
    others in float32: for targets from 0 to 1 they agree within 2e-8 * smoothness / confidence or so (1e-5 by default),
    the rounding of a stiffer system.
    Errors:  TypeError for a wrong dtype or kind; ValueError for shapes that do not match, a parameter out of range, a
             target that is not finite (the photo is named), a backend that cannot run. On a GPU, which is not waited
             for, a target that is not finite gives NaN for its photo.
    Cost:    on one core about 4 ms for a photo of 512 x 683; photos of a Ragged batch are spread over torch's threads.
             The CUDA version has not been run on a GPU yet, only in an emulator; it takes 84 bytes a pixel.
    Source:  J. T. Barron and B. Poole, The Fast Bilateral Solver, ECCV 2016; settings of SelfMask and NamedMask.
    """
    for name, value, low, high in (
        ("confidence", confidence, 0, 1),
        ("sigma_spatial", sigma_spatial, 1, math.inf),
        ("sigma_luma", sigma_luma, 1, math.inf),
        ("sigma_chroma", sigma_chroma, 1, math.inf),
        ("smoothness", smoothness, 0, math.inf),
        ("iterations", iterations, 0, math.inf),
        ("tolerance", tolerance, 0, math.inf),
    ):
        if not (low <= value <= high and value < math.inf) or (name == "confidence" and value == 0):
            expected = "above 0 and at most 1" if name == "confidence" else f"finite and at least {low}"
            raise ValueError(f"{NAME}: {name} must be {expected}, but is {value}")
    sigmas = float(sigma_spatial), float(sigma_luma), float(sigma_chroma)
    settings = float(confidence), *sigmas, float(smoothness), int(iterations), float(tolerance)
    if backends.without_torch(NAME, backend, target, image) and _are_plain(target, image):
        out = np.empty(target.shape, np.float32)
        packed = pack_numpy(target.astype(np.float32, copy=False), image)
        backends.native().bilateral_solver(*packed, out.reshape(-1), *settings)
        return out
    packed_target, restore = arrange(NAME, "target", target, 0)
    packed_image, _ = arrange(NAME, "image", image, 1)
    expect_dtype(NAME, "target", packed_target.rows, torch.float32, torch.bool)
    expect_dtype(NAME, "image", packed_image.rows, torch.uint8)
    if packed_image.rows.shape[1] != 3:
        raise ValueError(f"{NAME}: image must have 3 channels, but has {packed_image.rows.shape[1]}")
    if packed_image.rows.device != packed_target.rows.device:
        raise ValueError(
            f"{NAME}: image must be on the target's device, {packed_target.rows.device}, "
            f"but is on {packed_image.rows.device}"
        )
    if isinstance(target, Ragged) or isinstance(image, Ragged):
        expect_same_grids(NAME, "target", packed_target, "image", packed_image)
    elif tuple(target.shape) != tuple(image.shape[:2]):  # no tensor is read here, so torch.compile can trace it
        raise ValueError(
            f"{NAME}: target and image must be of the same height and width, "
            f"but are {list(target.shape)} and {list(image.shape[:2])}"
        )
    rows = _solve(
        packed_target.rows.to(torch.float32).contiguous(),
        packed_image.rows.contiguous(),
        packed_target.offsets,
        packed_target.shapes,
        *settings,
        backend,
    )
    return restore(rows)


def _are_plain(target: np.ndarray, image: np.ndarray) -> bool:
    """Whether there is nothing to refuse."""
    return (
        target.ndim == 2
        and target.dtype in (np.float32, bool)
        and image.dtype == np.uint8
        and image.shape == (*target.shape, 3)
    )


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


def _solve_reference(target: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    out = [target[:0].cpu()]
    photos = zip(Ragged(target, offsets, shapes).grids(), Ragged(image, offsets, shapes).grids(), strict=True)
    for b, (mask, photo) in enumerate(photos):
        if not mask.isfinite().all():
            raise ValueError(f"{NAME}: target of photo {b} has values that are not finite")
        solution = reference.bilateral_solver(mask.cpu().numpy(), photo.cpu().numpy(), *settings)
        out.append(torch.from_numpy(solution).to(torch.float32).flatten())
    return torch.cat(out).to(target.device)


def _solve_cpu(target: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    out = torch.empty_like(target)
    backends.native().bilateral_solver(target, image, offsets, shapes, out, *settings)
    return out


def _solve_cuda(target: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    out = torch.empty_like(target)
    scratch = torch.empty(21 * len(target) + 3 * len(shapes), dtype=torch.int32, device=target.device)
    stream = torch.cuda.current_stream(target.device).cuda_stream
    backends.native().cuda.bilateral_solver(target, image, offsets, shapes, out, scratch, *settings, stream)
    return out


backends.IMPLEMENTATIONS[NAME] = {"reference": _solve_reference, "cpu": _solve_cpu, "cuda": _solve_cuda}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _dispatch(target: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    *settings, backend = settings
    return backends.run(NAME, backend, target.device)(target, image, offsets, shapes, *settings)


_solve = register(
    f"{NAME}(Tensor target, Tensor image, Tensor offsets, Tensor shapes, float confidence, float sigma_spatial, "
    "float sigma_luma, float sigma_chroma, float smoothness, int iterations, float tolerance, str backend) -> Tensor",
    _dispatch,
    lambda target, *rest: torch.empty_like(target),
)
