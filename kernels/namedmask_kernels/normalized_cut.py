# SPDX-License-Identifier: MIT
"""TokenCut's normalized cut: which tokens of a photo are the object, from the affinity of its features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, expect_rows
from .reference import normalized_cut as reference

NAME = "normalized_cut"


class NormalizedCut(NamedTuple):
    """What `normalized_cut` found, for B photos. "Like the features": Ragged rows, a grid or a batch of grids. Arrays
    [B] are on the CPU, wherever the features are.

    vector:     float32 like the features, the second eigenvector v with v' D v = 1; positive at the seed
    value:      float64 [B], its eigenvalue: from 0 (falls apart) to about 1 (nothing to cut)
    residual:   float64 [B], |D^-1/2 ((D - A) v - value D v)|; above `tolerance` where max_iterations came first
    iterations: int32 [B], products with the affinity (0 from the reference)
    partition:  bool like the features, v above its mean
    seed:       int32 [B], the token of largest |v|, counted within its photo; -1 where there is none
    foreground: bool like the features, the 4-connected component of the partition that holds the seed
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
    """Splits the tokens of each photo in two by a normalized cut of their features, and picks the object.

    Two tokens have affinity A_ij = 1 where the cosine of their features exceeds tau, else eps; D is diagonal with A's
    row sums. v is the second smallest eigenvector of (D - A) v = lambda D v.

    features:       floating point grid [h, w, C], equal grids [B, h, w, C], or Ragged rows [T, C]; computed in float32.
                    Numpy in, numpy out.
    tau:            finite. Cosines of two backends or CPUs differ by 1e-6 or less: a pair that near tau may change.
    eps:            above 0, below 1.
    tolerance:      above 0, the residual at which the iteration stops. The value is then as good or better, the
                    vector good to tolerance / (gap to the next eigenvalue); gaps of 10 eps are usual where tokens
                    fall apart into several groups. The reference is exact and ignores it.
    max_iterations: at least 1.
    Ties:           entries of |v| within 1e-5 of the largest count as equal; the first is the seed. Where the next
                    eigenvalue is (nearly) equal, v is one of many: the same on every call, another on another backend.
    No cut:         a row of zeros is connected to nothing. Where all tokens are alike (constant features, no two tokens
                    connected) and for photos of 0 or 1 token: vector 0, partition and foreground empty, seed -1,
                    iterations 0, value 1 (for unconnected tokens their common eigenvalue, near 0).
    Errors:         TypeError for features that are not floating point; ValueError for a wrong shape, a setting out of
                    range, features that are not finite (the photo is named), a backend that cannot run.
    Cost:           n^2 C flops and n^2 / 8 lookups per iteration (4 to 14 are usual) for n tokens; n^2 bits of memory.
                    On a GPU 3 n^2 C flops of float16, then 16 n^2 of bytes per iteration, on its tensor cores; also
                    8 n max_iterations bytes for each of up to 64 photos at a time. No GPU has run it yet.
                    Deterministic; a photo's result has the same bits alone, in any batch and with any thread count.
    Source:         Y. Wang et al., Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut,
                    CVPR 2022; J. Shi and J. Malik, Normalized Cuts and Image Segmentation, PAMI 2000.
    """
    ragged, restore = arrange(NAME, "features", features, 1, batches=True)
    expect_dtype(NAME, "features", ragged.rows, torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for name, value, low, high in (
        ("tau", tau, -math.inf, math.inf),
        ("eps", eps, 0, 1),
        ("tolerance", tolerance, 0, math.inf),
    ):
        if not low < value < high:
            expected = "finite" if name == "tau" else f"above {low} and below {high}"
            raise ValueError(f"{NAME}: {name} must be {expected}, but is {value}")
    if max_iterations < 1:
        raise ValueError(f"{NAME}: max_iterations must be at least 1, but is {max_iterations}")
    vector, value, residual, iterations, partition, seed, foreground = _cut(
        ragged.rows.to(torch.float32).contiguous(),
        ragged.offsets,
        ragged.shapes,
        float(tau),
        float(eps),
        float(tolerance),
        int(max_iterations),
        backend,
    )
    per_photo = (value, residual, iterations, seed)
    if not isinstance(features, (Ragged, Tensor)):
        per_photo = tuple(x.numpy() for x in per_photo)
    value, residual, iterations, seed = per_photo
    return NormalizedCut(restore(vector), value, residual, iterations, restore(partition), seed, restore(foreground))


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _cut_reference(
    features: Tensor, offsets: Tensor, shapes: Tensor, tau: float, eps: float, tolerance: float, max_iterations: int
) -> Outputs:
    outputs = _fake_cut(features, offsets, shapes)
    vector, value, residual, iterations, partition, seed, foreground = outputs
    iterations.zero_()
    for b, (begin, end, shape) in enumerate(
        zip(offsets[:-1].tolist(), offsets[1:].tolist(), shapes.tolist(), strict=True)
    ):
        if not torch.isfinite(features[begin:end]).all():
            raise ValueError(f"{NAME}: features must be finite, but those of photo {b} hold NaN or Inf")
        cut, mask = reference.normalized_cut(features[begin:end], tuple(shape), tau, eps)
        value[b], residual[b], seed[b] = cut.value, cut.residual, cut.seed
        vector[begin:end] = torch.from_numpy(cut.vector)
        partition[begin:end] = torch.from_numpy(cut.partition)
        foreground[begin:end] = torch.from_numpy(mask).flatten()
    return outputs


def _cut_cpu(features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Outputs:
    outputs = _fake_cut(features, offsets, shapes)
    backends.native().normalized_cut(features, offsets, shapes, *outputs, *settings)
    return outputs


TOGETHER = 64  # photos whose bits and vectors a GPU holds at a time: some 350 MB for 3,600 tokens each


def _cut_cuda(
    features: Tensor, offsets: Tensor, shapes: Tensor, tau: float, eps: float, tolerance: float, max_iterations: int
) -> Outputs:
    """Bits by Triton, vectors by CUDA, foreground by connected_components; waits for the GPU."""
    from .triton import normalized_cut as triton  # not at import: not every machine has Triton
    from .triton.normalized_rows import normalized_rows, refuse_infinite

    expect_rows(NAME, offsets, shapes, features)
    vector, value, residual, iterations, partition, seed, foreground = _fake_cut(features, offsets, shapes)
    native, stream = backends.native().cuda, torch.cuda.current_stream(features.device).cuda_stream
    per_photo = [torch.empty_like(x, device=features.device) for x in (value, residual, iterations, seed)]
    with torch.cuda.device_of(features):
        for first in range(0, len(shapes), TOGETHER):
            grids = shapes[first : first + TOGETHER]
            begin, end = int(offsets[first]), int(offsets[first + len(grids)])
            mine = offsets[first : first + len(grids) + 1] - begin
            unit = normalized_rows(features[begin:end])
            refuse_infinite(NAME, unit.finite, mine, first)
            bits = triton.affinity_bits(unit, mine, tau)
            tokens = mine.diff().long()
            steps = (tokens - 1).clamp(0, max_iterations)
            doubles = ((steps + 4) * ((tokens + 127) // 128 * 128) + 6 * (steps + 1)).sum()
            workspace = torch.empty(int(doubles), dtype=torch.float64, device=features.device)
            values, residuals, counts, seeds = (x[first : first + len(grids)] for x in per_photo)
            native.normalized_cut(
                bits, mine, grids, vector[begin:end], values, residuals, counts, partition[begin:end], seeds, workspace,
                eps, tolerance, max_iterations, stream,
            )  # fmt: skip
        if len(features):
            labels, found = foreground.new_empty(len(features), dtype=torch.int32), torch.empty_like(per_photo[3])
            scratch = labels.new_empty(2 * len(features) + 4 * len(shapes))
            native.connected_components(partition, offsets, shapes, labels, found, scratch, stream)
            tokens, begins = (x.to(features.device) for x in (offsets.diff(), offsets[:-1]))
            seeded = labels[(begins + per_photo[3]).clamp(0, len(features) - 1)]
            seeded = seeded.repeat_interleave(tokens, output_size=len(features))
            torch.logical_and(partition, labels == seeded, out=foreground)
    for host, there in zip((value, residual, iterations, seed), per_photo, strict=True):
        host.copy_(there)
    return vector, value, residual, iterations, partition, seed, foreground


backends.IMPLEMENTATIONS[NAME] = {"reference": _cut_reference, "cpu": _cut_cpu, "cuda": _cut_cuda}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _fake_cut(features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Outputs:
    tokens, photos = features.shape[0], shapes.shape[0]
    return (
        features.new_empty(tokens),
        shapes.new_empty(photos, dtype=torch.float64),
        shapes.new_empty(photos, dtype=torch.float64),
        shapes.new_empty(photos),
        features.new_empty(tokens, dtype=torch.bool),
        shapes.new_empty(photos),
        features.new_empty(tokens, dtype=torch.bool),
    )


def _dispatch(features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Outputs:
    *settings, backend = settings
    return backends.run(NAME, backend, features.device)(features, offsets, shapes, *settings)


_cut = register(
    f"{NAME}(Tensor features, Tensor offsets, Tensor shapes, float tau, float eps, float tolerance, "
    "int max_iterations, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake_cut,
)
