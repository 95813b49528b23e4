# SPDX-License-Identifier: MIT
"""Random-walk refinement: each token takes the mean of the masks at tokens with similar features."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import like_first, per_image, register
from .ragged import (
    FLOATING,
    Array,
    Batch,
    Ragged,
    arrange,
    as_float,
    expect_finite,
    expect_int,
    expect_rows,
    expect_same_grids,
)
from .reference import random_walk as reference

NAME = "random_walk"
MOST_SHARPNESS = 1e6  # times the rounding error of a cosine it is about 1


def random_walk(
    masks: Batch,
    features: Ragged | Array,
    *,
    steps: int = 2,
    sharpness: float = 10.0,
    backend: str = "auto",
) -> Batch:
    """Refines soft masks by a few steps of a random walk over the tokens of each image.

    S_ij = exp(sharpness (cos_ij - 1)), with cos_ij the cosine of the features of tokens i and j; P is S with every row
    divided by its sum; the result is P^steps masks. With unit features, 1 - cos_ij is half their squared distance.

    Args:
        masks: Floating point grid [h, w, M] (numpy or torch), equal grids [B, h, w, M], or Ragged with rows [T, M]: M
            masks of any values, computed in float32.
        features: Floating point [h, w, C], [B, h, w, C] or Ragged with rows [T, C], on the grids of `masks`; computed
            in float32. A row of zeros has cosine 0 with every token.
        steps: Number of steps, at least 0. Each step blurs more; 0 returns the masks.
        sharpness: At least 0 and finite. A difference of 0.1 between two cosines changes the weight by a factor of
            e^(0.1 sharpness). 0 returns the mean of each mask. Values above 1e6 count as 1e6: cosines
            are rounded.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        The refined masks, float32, arranged like `masks`. Values stay in the range of the image's mask; NaN and Inf
        spread over the mask.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If shapes or devices do not match, a parameter is out of range, the features are not finite (the
            message names the image), or the backend cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Cost:
        For n tokens, n^2 C flops and n^2 / 2 exponentials, and n^2 2 M flops per step. On a CPU, half of S is kept from
        step to step while it fits 32 MB, 2 n^2 bytes of up to 4,032 tokens; what does not fit is computed again. The
        Triton version also computes half of the cosines, with 3 n^2 C flops of float16, and keeps S, 4 n^2 bytes, for
        as many images at a time as fit 1 GiB; it holds one tile of images of more than 16,384 tokens, and computes
        their cosines in each step. On an H100, 0.24 ms per image of 3,600 tokens with 20 masks and 2 steps, in a batch
        of 64, when it did so for all images; no GPU has run the present version.

    Determinism:
        Bit-identical for any batch and number of threads.

    Source:
        J. Ahn and S. Kwak, Learning Pixel-level Semantic Affinity, CVPR 2018, section 3.4, with affinities between all
        pairs of tokens instead of neighbors, squared distances of unit features instead of L1 distances, and the
        Hadamard power as the factor in the exponent.

    Examples:
        >>> features, masks = torch.randn(28, 28, 64), torch.rand(28, 28, 2)
        >>> random_walk(masks, features, steps=2).shape
        torch.Size([28, 28, 2])
    """
    packed = arrange(NAME, "masks", masks, 1, *FLOATING, batches=True)
    tokens = arrange(NAME, "features", features, 1, *FLOATING, batches=True)
    expect_same_grids(NAME, tokens, packed)
    number = as_float(NAME, "sharpness", sharpness)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{NAME}: sharpness must be at least 0 and finite, but is {sharpness}")
    walked = _walk(
        packed.rows.to(torch.float32).contiguous(),
        tokens.rows.to(torch.float32).contiguous(),
        packed.offsets,
        packed.shapes,
        expect_int(NAME, "steps", steps),
        min(number, MOST_SHARPNESS),
        backend,
    )
    return packed.restore(walked)


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------


def _walk_reference(
    masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, steps: int, sharpness: float
) -> Tensor:
    expect_finite(NAME, "features", features.isfinite(), offsets)
    batch = masks.double(), features.double(), offsets, shapes
    return per_image(reference.random_walk)(*batch, steps, sharpness).float()


def _walk_triton(
    masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, steps: int, sharpness: float
) -> Tensor:
    from .triton import random_walk as triton  # not at import: Triton is optional

    expect_rows(NAME, offsets, shapes, masks, features)
    out = like_first(masks)
    triton.random_walk(masks, features, offsets, out, steps, sharpness)
    return out


_walk = register(
    f"{NAME}(Tensor masks, Tensor features, Tensor offsets, Tensor shapes, int steps, float sharpness) -> Tensor",
    reference=_walk_reference,
    triton=_walk_triton,
)
