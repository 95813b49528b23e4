# SPDX-License-Identifier: MIT
"""Masks refined by a random walk: each token takes the mean of the tokens that look like it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, expect_rows, expect_same_grids
from .reference import random_walk as reference

NAME = "random_walk"


def random_walk(
    masks: Ragged | Array,
    features: Ragged | Array,
    *,
    steps: int = 2,
    sharpness: float = 10.0,
    backend: str = "auto",
) -> Ragged | Array:
    """Refines soft masks by a few steps of a random walk over the tokens of each photo.

    S_ij = exp(sharpness (cos_ij - 1)), with cos_ij the cosine of the features of tokens i and j; P is S with every row
    divided by its sum; the result is P^steps masks. With unit features, 1 - cos_ij is half their squared distance.

    masks:     floating point grid [h, w, M], equal grids [B, h, w, M] or Ragged rows [T, M], M masks of any values;
               computed in float32. Numpy in, numpy out.
    features:  floating point, on the same grids, [h, w, C] and so on; computed in float32. A row of zeros has cosine 0
               with every token.
    steps:     at least 0; each blurs more, 0 gives the masks back.
    sharpness: at least 0, finite; how much more a token that looks alike counts: cosines that differ by 0.1 make a
               factor e^(0.1 sharpness). 0 gives the mean of each mask.
    Returns:   float32, arranged like the masks. Values stay within those of the photo's mask.
    Errors:    TypeError for arrays that are not floating point; ValueError for a wrong shape, a setting out of range,
               masks and features that are not of the same grids or device, features that are not finite (the photo is
               named), a backend that cannot run.
    Cost:      n^2 (C + 2 M) flops and n^2 / 2 exponentials for n tokens and a step; a tile of S is all that is ever
               held. With Triton 6 n^2 C flops of float16 for a step; no GPU has run it yet. Deterministic; a photo's
               result has the same bits alone, in any batch and with any thread count.
    Source:    J. Ahn and S. Kwak, Learning Pixel-level Semantic Affinity, CVPR 2018, section 3.4 (affinities of all
               pairs in place of neighbors', squared distances of unit features in place of L1, their Hadamard power
               as the factor in the exponent).
    """
    ragged, restore = arrange(NAME, "masks", masks, 1, batches=True)
    tokens, _ = arrange(NAME, "features", features, 1, batches=True)
    for name, rows in (("masks", ragged.rows), ("features", tokens.rows)):
        expect_dtype(NAME, name, rows, torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if isinstance(masks, Ragged) or isinstance(features, Ragged):
        expect_same_grids(NAME, "features", tokens, "masks", ragged)
    elif tuple(features.shape[:-1]) != tuple(masks.shape[:-1]):  # no tensor is read, so torch.compile can trace it
        raise ValueError(
            f"{NAME}: features and masks must be of the same height and width, "
            f"but are {list(features.shape)} and {list(masks.shape)}"
        )
    if ragged.rows.device != tokens.rows.device:
        raise ValueError(
            f"{NAME}: features must be on {ragged.rows.device} like masks, but are on {tokens.rows.device}"
        )
    if steps < 0:
        raise ValueError(f"{NAME}: steps must be at least 0, but is {steps}")
    if not 0 <= sharpness < math.inf:
        raise ValueError(f"{NAME}: sharpness must be at least 0 and finite, but is {sharpness}")
    walked = _walk(
        ragged.rows.to(torch.float32).contiguous(),
        tokens.rows.to(torch.float32).contiguous(),
        ragged.offsets,
        ragged.shapes,
        steps,
        float(sharpness),
        backend,
    )
    return restore(walked)


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


def _walk_reference(
    masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, steps: int, sharpness: float
) -> Tensor:
    out = torch.empty_like(masks)
    for b, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if not torch.isfinite(features[begin:end]).all():
            raise ValueError(f"{NAME}: features must be finite, but those of photo {b} hold NaN or Inf")
        photo = masks[begin:end].double(), features[begin:end].double()
        out[begin:end] = reference.random_walk(*photo, steps, sharpness).float()
    return out


def _walk_cpu(masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    out = torch.empty_like(masks)
    backends.native().random_walk(masks, features, offsets, shapes, out, *settings)
    return out


def _walk_triton(masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    from .triton import random_walk as triton  # not at import: not every machine has Triton

    expect_rows(NAME, offsets, shapes, masks, features)
    out = torch.empty_like(masks)
    triton.random_walk(masks, features, offsets, out, *settings)
    return out


backends.IMPLEMENTATIONS[NAME] = {"reference": _walk_reference, "cpu": _walk_cpu, "triton": _walk_triton}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _dispatch(masks: Tensor, features: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    *settings, backend = settings
    return backends.run(NAME, backend, masks.device)(masks, features, offsets, shapes, *settings)


_walk = register(
    f"{NAME}(Tensor masks, Tensor features, Tensor offsets, Tensor shapes, int steps, float sharpness, str backend) "
    "-> Tensor",
    _dispatch,
    lambda masks, *rest: torch.empty_like(masks),
)
