# SPDX-License-Identifier: MIT
"""The fully connected CRF with Gaussian edge potentials: soft labels that follow the edges of their image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, like_first, per_image, register
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
    is_sequence,
    not_finite,
)
from .reference import dense_crf as reference

NAME = "dense_crf"
MOST_WEIGHT = 1e20  # messages times it stay in the range of float32


def dense_crf(
    probabilities: Batch,
    image: Ragged | Array,
    *,
    iterations: int = 10,
    gaussian: tuple[float | Sequence[float], float] = (3.0, 3.0),
    bilateral: tuple[float | Sequence[float], float, float] = (80.0, 13.0, 10.0),
    backend: str = "auto",
) -> Batch:
    """Computes mean-field marginals of a fully connected CRF.

    The unary term is -log(clip(p, 1e-5, 1)). Each kernel matrix K, its diagonal included, is normalized as
    N^-1/2 K N^-1/2 with N = diag(K 1), which pydensecrf calls DIAG_KERNEL and NORMALIZE_SYMMETRIC. The updates start
    from softmax(-unary).

    Args:
        probabilities: Floating point [H, W, L] (numpy or torch), or Ragged with rows [P, L]: the probability of each of
            L labels at each pixel, usually a softmax; computed in float32.
        image: uint8 RGB [H, W, 3], or Ragged with rows [P, 3], with the height and width of `probabilities`.
        iterations: Number of mean-field updates, at least 0; 0 returns softmax(-unary).
        gaussian: (sigma_xy, weight) of the smoothness kernel; sigma in pixels, above 0.
        bilateral: (sigma_xy, sigma_rgb, weight) of the appearance kernel; sigmas in pixels and in levels of 0 to 255,
            above 0. A weight is the gain of two equal labels (a Potts model), from -1e20 to 1e20; 0 disables a kernel.
            For a Ragged batch, sigma_xy of either kernel may be a sequence, or a 1-D array or tensor, of one number per
            image.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        The marginals, float32, arranged like `probabilities`. They sum to 1 at every pixel; the argmax over L is the
        labeling.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, a parameter is out of range, the probabilities are not finite
            (the message names the image), there is not one sigma_xy per image, the bilateral sigma_xy is below about
            1/3000 of the longer side of an image (1/2200 of a square one), sigma_rgb is below 0.1, or the backend
            cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Accuracy:
        The reference evaluates the kernels exactly, between all pairs of pixels, in float64. The other backends compute
        the smoothness kernel within 0.002 of exact and the appearance kernel with pydensecrf's permutohedral lattice.
        For photos and probabilities without noise, marginals differ from pydensecrf's by less than 0.002 on average,
        and labels at 0.2% of the pixels or fewer; for probabilities of pure noise, at up to 2.5%.

    Cost:
        On one core of a Zen 4, 42 ms for an image of 512 x 683 with 2 labels and 163 ms with 21; the images of a Ragged
        batch are distributed over torch's threads. Proportional to pixels times labels, whatever the sigmas, except in
        images that are many times taller than wide, where a gaussian sigma_xy above the width costs more. On an H100,
        an earlier version took 1.1 ms per image with 2 labels and 4.1 ms with 21, in a batch of 64 of up to that size;
        no GPU has run this one. The CUDA version waits for the GPU once, to learn the number of lattice vertices, and
        allocates about 155 bytes per pixel and 10 more per label for photos, several times as much for noise.

    Determinism:
        On the CPU, bit-identical for any batch and number of threads. On a GPU, bit-identical on every call and for any
        batch.

    Source:
        P. Kraehenbuehl and V. Koltun, Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NIPS
        2011; A. Adams, J. Baek, M. A. Davis, Fast High-Dimensional Filtering Using the Permutohedral Lattice,
        Eurographics 2010.

    Examples:
        >>> image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
        >>> probabilities = torch.rand(60, 80, 2).softmax(-1)
        >>> dense_crf(probabilities, image).argmax(-1).shape  # one label per pixel
        torch.Size([60, 80])
    """
    packed = arrange(NAME, "probabilities", probabilities, 1, *FLOATING)
    pixels = expect_image(NAME, image, packed)
    rows = _infer(
        packed.rows.to(torch.float32).contiguous(),
        pixels,
        packed.offsets,
        packed.shapes,
        expect_int(NAME, "iterations", iterations),
        *_kernel("gaussian", gaussian, probabilities, ("sigma_xy", "weight")),
        *_kernel("bilateral", bilateral, probabilities, ("sigma_xy", "sigma_rgb", "weight")),
        backend,
    )
    return packed.restore(rows)


def _kernel(name: str, value: Sequence[Any], batch: Ragged | Array, names: tuple[str, ...]) -> list[Any]:
    """The checked parameters of a kernel: sigma_xy as a list of one or all values, then numbers, the weight last."""
    if not is_sequence(value) or len(value) != len(names):
        raise ValueError(f"{NAME}: {name} must be ({', '.join(names)}), but is {value}")
    spatial = expect_per_image(NAME, f"sigma_xy of {name}", value[0], batch)
    numbers = [as_float(NAME, name, number) for number in (*spatial, *value[1:])]
    if not (all(abs(number) < math.inf for number in numbers) and all(sigma > 0 for sigma in numbers[:-1])):
        raise ValueError(f"{NAME}: {name} must be finite with sigmas above 0, but is {value}")
    if abs(numbers[-1]) > MOST_WEIGHT:
        raise ValueError(
            f"{NAME}: the weight of {name} must be from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}, but is {value}"
        )
    return [numbers[: len(spatial)], *numbers[len(spatial) :]]


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------


def _infer_reference(probabilities: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings: Any) -> Tensor:
    expect_finite(NAME, "probabilities", probabilities.isfinite(), offsets)
    run = per_image(reference.dense_crf, varying=(1, 3))
    return run(probabilities.double(), image, offsets, shapes, *settings).float()


def _infer_cuda(probabilities: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings: Any) -> Tensor:
    native, stream = backends.native().cuda, cuda_stream(probabilities)
    out = like_first(probabilities)
    status = torch.empty(2, len(shapes), dtype=torch.int32, device=out.device)
    corners = torch.empty(37 * len(out), dtype=torch.int32, device=out.device)
    native.dense_crf_lattice(probabilities, image, offsets, shapes, out, status, corners, *settings, stream)
    counts, invalid = status.cpu()  # waits for the device
    if invalid.any():
        raise not_finite(NAME, "probabilities", int(invalid.argmax()))
    size = native.dense_crf_workspace(offsets, shapes, counts, out.shape[1], *settings)
    scratch = torch.empty(size, dtype=torch.int32, device=out.device)
    native.dense_crf(offsets, shapes, out, counts, corners, scratch, *settings, stream)
    return out


_infer = register(
    f"{NAME}(Tensor probabilities, Tensor image, Tensor offsets, Tensor shapes, int iterations, "
    "float[] gaussian_sigma, float gaussian_weight, float[] bilateral_sigma, float bilateral_sigma_rgb, "
    "float bilateral_weight) -> Tensor",
    reference=_infer_reference,
    cuda=_infer_cuda,
)
