# SPDX-License-Identifier: MIT
"""TokenCut's normalized cut: segments the object of an image by the affinity of its token features."""

from __future__ import annotations

import itertools
import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, per_image, register
from .ragged import FLOATING, Array, Ragged, arrange, as_float, expect_finite, expect_int, expect_rows
from .reference import normalized_cut as reference

NAME = "normalized_cut"


class NormalizedCut(NamedTuple):
    """Result of `normalized_cut` for B images. Arrays [B] are on the CPU, wherever the features are.

    Attributes:
        vector: float32, arranged like the features without C; the second eigenvector v, with v' D v = 1 and a positive
            entry at the seed.
        value: float64 [B], its eigenvalue: from 0 (separate components) to about 1 (nothing to cut).
        residual: float64 [B], |D^-1/2 ((D - A) v - value D v)|; above `tolerance` if `max_iterations` was reached.
        iterations: int32 [B], number of products with the affinity (0 from the reference).
        partition: bool, arranged like the vector; v above its mean.
        seed: int32 [B], index within the image of the token with the largest |v|; -1 if there is none.
        foreground: bool, arranged like the vector; the 4-connected component of the partition that contains the seed.
    """

    vector: Ragged | Array
    value: Array
    residual: Array
    iterations: Array
    partition: Ragged | Array
    seed: Array
    foreground: Ragged | Array


def normalized_cut(
    features: Ragged | Array,
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    tolerance: float = 1e-8,
    max_iterations: int = 128,
    backend: str = "auto",
) -> NormalizedCut:
    """Bipartitions the tokens of each image by a normalized cut of their features, and selects the foreground.

    Two tokens have affinity A_ij = 1 if the cosine of their features exceeds tau, and eps otherwise; D is diagonal with
    the row sums of A. v is the second smallest eigenvector of (D - A) v = lambda D v.

    Several entries |v| within 1e-5 of the largest count as equal; the first is the seed. If the next eigenvalue is
    (nearly) equal, v is not unique: it is the same on every call, but differs between backends.

    A row of zeros is connected to nothing. If all tokens are alike (constant features, or no two tokens connected), or
    the image has 0 or 1 tokens, there is no cut: vector 0, partition and foreground empty, seed -1, iterations 0, value
    1 (for unconnected tokens their common eigenvalue, near 0).

    Args:
        features: Floating point grid [h, w, C] (numpy or torch), equal grids [B, h, w, C], or Ragged with rows [T, C];
            computed in float32.
        tau: Threshold of the cosine, finite. Cosines differ between backends or CPUs by up to 1e-6: a pair that close
            to tau may be classified differently.
        eps: Affinity of unconnected tokens, at least 1e-60 (so that the vector is finite in float32) and below 1.
        tolerance: Residual at which the iteration stops, above 0. The value is then at least as accurate, and the
            vector is accurate to tolerance / (gap to the next eigenvalue); gaps of 10 eps are common if the tokens
            separate into several groups. The reference is exact and ignores it.
        max_iterations: Maximum number of Lanczos iterations, at least 1.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        A `NormalizedCut`, with arrays of the kind of `features`.

    Raises:
        TypeError: If the features are not floating point.
        ValueError: If a shape is wrong, a parameter is out of range, the features are not finite (the message names the
            image), or the backend cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Cost:
        n^2 C flops, and n^2 / 8 lookups per iteration (4 to 14 are common) for n tokens; n^2 bits of memory. On a GPU
        3 n^2 C flops of float16, then 16 n^2 byte operations on the tensor cores per iteration, and 8 n max_iterations
        bytes for each of up to 64 images at a time. On an H100, 0.023 ms per image of 784 tokens and 0.094 ms per image
        of 3,600, in a batch of 64; it waits for the GPU.

    Determinism:
        Bit-identical for any batch and number of threads.

    Source:
        Y. Wang et al., Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut, CVPR 2022;
        J. Shi and J. Malik, Normalized Cuts and Image Segmentation, PAMI 2000.

    Examples:
        >>> features = torch.randn(28, 37, 384) * 0.3
        >>> features[8:20, 10:25] += torch.randn(384)  # an object
        >>> normalized_cut(features).foreground.shape
        torch.Size([28, 37])
    """
    packed = arrange(NAME, "features", features, 1, *FLOATING, batches=True)
    settings = expect_settings(NAME, tau, eps, tolerance, max_iterations)
    vector, value, residual, iterations, partition, seed, foreground = _cut(
        packed.rows.to(torch.float32).contiguous(),
        packed.offsets,
        packed.shapes,
        *settings,
        backend,
    )
    if isinstance(features, np.ndarray):
        value, residual, iterations, seed = (x.numpy() for x in (value, residual, iterations, seed))
    return NormalizedCut(
        packed.restore(vector), value, residual, iterations, packed.restore(partition), seed, packed.restore(foreground)
    )


def expect_settings(
    op: str, tau: float, eps: float, tolerance: float, max_iterations: int, least_tau: float = -sys.float_info.max
) -> tuple[float, float, float, int]:
    """Returns the settings of a cut as numbers.

    Raises:
        TypeError: If one is not a number, or `max_iterations` not an integer.
        ValueError: If one is out of range.
    """
    numbers = []
    for name, value, low, high, expected in (
        ("tau", tau, least_tau, math.inf, "finite and at least 0" if least_tau == 0 else "finite"),
        ("eps", eps, 1e-60, 1, "at least 1e-60 and below 1"),
        ("tolerance", tolerance, math.ulp(0), math.inf, "above 0 and finite"),
    ):
        number = as_float(op, name, value)
        if not low <= number < high:
            raise ValueError(f"{op}: {name} must be {expected}, but is {value}")
        numbers.append(number)
    return numbers[0], numbers[1], numbers[2], expect_int(op, "max_iterations", max_iterations, 1)


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------

Outputs = tuple[Tensor, ...]  # the fields of NormalizedCut


def _outputs(features: Tensor, offsets: Tensor, shapes: Tensor, *settings: float) -> Outputs:
    tokens, images = features.shape[0], shapes.shape[0]
    return (
        features.new_empty(tokens),
        shapes.new_empty(images, dtype=torch.float64),
        shapes.new_empty(images, dtype=torch.float64),
        shapes.new_empty(images),
        features.new_empty(tokens, dtype=torch.bool),
        shapes.new_empty(images),
        features.new_empty(tokens, dtype=torch.bool),
    )


def _cut_reference(features: Tensor, offsets: Tensor, shapes: Tensor, *settings: float) -> Outputs:
    expect_finite(NAME, "features", features.isfinite(), offsets)
    return per_image(reference.normalized_cut, outputs=_outputs)(features, offsets, shapes, *settings)


TOGETHER = 64  # images whose bits and vectors a GPU holds at a time: about 350 MB for 3,600 tokens each


def _cut_cuda(
    features: Tensor, offsets: Tensor, shapes: Tensor, tau: float, eps: float, tolerance: float, max_iterations: int
) -> Outputs:
    """Affinity bits by Triton, eigenvectors and foreground by CUDA; waits for the GPU once, at the end."""
    from .triton.normalized_cut import affinity_bits  # not at import: Triton is optional
    from .triton.normalized_rows import chunks

    expect_rows(NAME, offsets, shapes, features)
    vector, value, residual, iterations, partition, seed, foreground = _outputs(features, offsets, shapes)
    native, stream = backends.native().cuda, cuda_stream(features)
    # What the host needs, copied at once: the fields of each image, and whether the features of each chunk are finite.
    numbers = torch.empty(5, len(shapes), dtype=torch.float64, device=features.device)
    on_device, all_finite = _fields(numbers), numbers[4].view(torch.bool)
    checks: list[tuple[Tensor, Tensor, int]] = []
    with torch.cuda.device_of(features):
        for part in chunks(features, offsets, shapes, TOGETHER):
            torch.all(part.unit.finite, 0, out=all_finite[len(checks)])
            checks.append((part.unit.finite, part.offsets, part.images.start))
            bits = affinity_bits(part.unit, part.offsets, tau)
            bounds = itertools.pairwise(part.offsets.tolist())
            doubles = sum(_work_size(end - begin, max_iterations) for begin, end in bounds)
            workspace = torch.empty(doubles, dtype=torch.float64, device=features.device)
            values, residuals, counts, seeds = (x[part.images] for x in on_device)
            native.normalized_cut(
                bits, part.offsets, part.shapes, vector[part.rows], values, residuals, counts, partition[part.rows],
                seeds, workspace, eps, tolerance, max_iterations, stream,
            )  # fmt: skip
        scratch = seed.new_empty(2 * len(features) + 4 * len(shapes), device=features.device)
        native.seeded_component(partition, on_device[3], offsets, shapes, foreground, scratch, 4, stream)
    numbers = numbers.cpu()
    if not numbers[4].view(torch.bool)[: len(checks)].all():
        for check in checks:
            expect_finite(NAME, "features", *check)
    for field, copied in zip((value, residual, iterations, seed), _fields(numbers), strict=True):
        field.copy_(copied)
    return vector, value, residual, iterations, partition, seed, foreground


def _work_size(tokens: int, max_iterations: int) -> int:
    """The number of doubles of an image in the workspace of normalized_cut.h."""
    steps = min(max(tokens - 1, 0), max_iterations)
    return (steps + 4) * -(-tokens // 128) * 128 + 5 * steps + 2 + 64 * (steps + 2)


def _fields(numbers: Tensor) -> list[Tensor]:
    """Views of float64 [5, B]: value and residual float64 [B], iterations and seed int32 [B]."""
    value, residual, *integers = numbers.unbind()[:4]
    return [value, residual, *(row.view(torch.int32)[: len(row)] for row in integers)]


_cut = register(
    f"{NAME}(Tensor features, Tensor offsets, Tensor shapes, float tau, float eps, float tolerance, "
    "int max_iterations) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs,
    reference=_cut_reference,
    cuda=_cut_cuda,
    cuda_needs_triton=True,
)
