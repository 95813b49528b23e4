# SPDX-License-Identifier: MIT
"""CutLER's MaskCut: segments several objects of an image by repeated normalized cuts of its token features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import register
from .normalized_cut import expect_settings
from .ragged import FLOATING, Array, Ragged, arrange, expect_finite, expect_int, expect_rows
from .reference import mask_cut as reference

NAME = "mask_cut"
MOST_OBJECTS = 1000


class MaskCut(NamedTuple):
    """Result of `mask_cut` for B images and N objects. `value` and `seed` are on the CPU, wherever the features are.

    Attributes:
        masks: bool, arranged like the features with N instead of C; disjoint masks of the objects in the order in which
            they were found. The mask of an object that was not found is empty.
        value: float64 [B, N], the eigenvalue of each cut: from 0 (separate components) to about 1 (nothing to cut); 1
            after the last cut.
        seed: int32 [B, N], index within the image of the seed of each object; -1 if there is none.
    """

    masks: Ragged | Array
    value: Array
    seed: Array


def mask_cut(
    features: Ragged | Array,
    *,
    objects: int = 3,
    tau: float = 0.15,
    eps: float = 1e-5,
    tolerance: float = 1e-8,
    max_iterations: int = 128,
    backend: str = "auto",
) -> MaskCut:
    """Segments up to `objects` objects of each image: cuts its tokens, masks out the object found, and cuts again.

    Each cut is a `normalized_cut`, in which the affinity of the tokens of earlier objects to all tokens, themselves
    included, is eps, as published: their features are set to 0. The cut divides the tokens at the mean of its vector v.
    The foreground is the side with fewer of the image's four corners; if both have equally many, the side that contains
    the largest |v|. This is the published rule in a form that does not depend on the sign of v, which an eigensolver
    chooses: published, the side above the mean is reversed if it contains more than two corners, or two corners and not
    the largest |v|. Tokens of earlier objects are not counted as corners or as the largest |v|, and never become
    foreground.

    The seed is the token of the foreground that is farthest above the mean, if v is oriented so that the foreground is
    above it (of several within 1e-5, the first). The object is the 4-connected component of the foreground that
    contains the seed, as in TokenCut. The search ends when there is no cut (see `normalized_cut`) or no foreground.

    Args:
        features: Floating point grid [h, w, C] (numpy or torch), equal grids [B, h, w, C], or Ragged with rows [T, C];
            computed in float32. Published: keys of the last block of DINO's ViT-S/8 or ViT-B/8 for 480 x 480 pixels.
        objects: Maximum number of objects N, from 1 to 1000.
        tau: Threshold of the cosine, finite and at least 0.
        eps: Affinity of unconnected tokens, at least 1e-60 and below 1.
        tolerance: As in `normalized_cut`.
        max_iterations: As in `normalized_cut`.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        A `MaskCut`, with arrays of the kind of `features`.

    Raises:
        TypeError: If the features are not floating point.
        ValueError: If a shape is wrong, a parameter is out of range, the features are not finite (the message names the
            image), or the backend cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Cost:
        N times that of `normalized_cut`.

    Determinism:
        Bit-identical for any batch and number of threads.

    Source:
        X. Wang, R. Girdhar, S. X. Yu, I. Misra, Cut and Learn for Unsupervised Object Detection and Instance
        Segmentation, CVPR 2023, section 3.2. The paper refines the masks with `dense_crf`.

    Examples:
        >>> features = torch.randn(28, 37, 384) * 0.3 + torch.randn(384)
        >>> features[8:20, 4:14] = torch.randn(12, 10, 384) * 0.3 + torch.randn(384)  # two objects
        >>> features[8:20, 22:33] = torch.randn(12, 11, 384) * 0.3 + torch.randn(384)
        >>> sorted(mask_cut(features, objects=2).masks.sum((0, 1)).tolist())
        [120, 132]
    """
    packed = arrange(NAME, "features", features, 1, *FLOATING, batches=True)
    count = expect_int(NAME, "objects", objects, 1, MOST_OBJECTS)
    settings = expect_settings(NAME, tau, eps, tolerance, max_iterations, least_tau=0)
    rows = packed.rows.to(torch.float32).contiguous()
    masks, value, seed = _mask_cut(rows, packed.offsets, packed.shapes, count, *settings, backend)
    if isinstance(features, np.ndarray):
        value, seed = value.numpy(), seed.numpy()
    return MaskCut(packed.restore(masks), value, seed)


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------

Outputs = tuple[Tensor, ...]  # the fields of MaskCut


def _outputs(features: Tensor, offsets: Tensor, shapes: Tensor, objects: int, *settings: float) -> Outputs:
    return (
        features.new_empty(features.shape[0], objects, dtype=torch.bool),
        shapes.new_empty(shapes.shape[0], objects, dtype=torch.float64),
        shapes.new_empty(shapes.shape[0], objects),
    )


def _reference(
    features: Tensor, offsets: Tensor, shapes: Tensor, objects: int, tau: float, eps: float, *settings: float
) -> Outputs:
    expect_finite(NAME, "features", features.isfinite(), offsets)
    masks, value, seed = _outputs(features, offsets, shapes, objects)
    for b, grid in enumerate(Ragged(features, offsets, shapes).grids()):
        found = [torch.from_numpy(part) for part in reference.mask_cut(grid, objects, tau, eps)]
        masks[int(offsets[b]) : int(offsets[b + 1])] = found[0].flatten(0, 1).to(masks.device)
        value[b], seed[b] = found[1], found[2]
    return masks, value, seed


def _repeated_cuts(backend: str) -> Callable[..., Outputs]:
    """The implementation by `normalized_cut` and `connected_components` of a backend."""

    def run(features: Tensor, offsets: Tensor, shapes: Tensor, objects: int, *settings: Any) -> Outputs:
        expect_rows(NAME, offsets, shapes, features)
        expect_finite(NAME, "features", features.isfinite(), offsets)
        cut = backends.IMPLEMENTATIONS["normalized_cut"][backend]
        label = backends.IMPLEMENTATIONS["connected_components"][backend]
        masks, value, seed = _outputs(features, offsets, shapes, objects)
        masks.fill_(False)
        value.fill_(1)
        seed.fill_(-1)
        device = features.device
        sizes, begins = offsets.diff().long().to(device), offsets[:-1].long().to(device)
        image = torch.arange(len(shapes), device=device).repeat_interleave(sizes, output_size=len(features))
        row = torch.arange(len(features), device=device)
        left = torch.ones(len(features), dtype=torch.bool, device=device)  # tokens that belong to no object
        h, w = shapes.long().to(device).unbind(1)
        corners = begins[:, None] + torch.stack([0 * h, w - 1, (h - 1) * w, h * w - 1], 1)
        corners = corners[sizes > 0]
        searching = sizes > 0

        def largest(numbers: Tensor) -> Tensor:
            """The maximum of each image, [B]."""
            return numbers.new_full((len(shapes),), -math.inf).scatter_reduce(0, image, numbers, "amax")

        def first(chosen: Tensor) -> Tensor:
            """The first chosen row of each image, [B]; the number of rows if there is none."""
            rows = torch.where(chosen, row, len(row))
            return row.new_full((len(shapes),), len(row)).scatter_reduce(0, image, rows, "amin")

        for k in range(objects):
            if not searching.any():
                break
            vector, values, _, _, side, seeds, _ = cut(features * left[:, None], offsets, shapes, *settings)
            value[:, k] = torch.where(searching.cpu(), values, 1.0)
            searching &= seeds.to(device) >= 0
            size = vector.abs().masked_fill(~left, -math.inf)
            strongest = first(size >= (1 - 1e-5) * largest(size)[image]).clamp(max=len(row) - 1)
            inside = torch.zeros_like(sizes)
            inside[sizes > 0] = ((2 * side[corners].long() - 1) * left[corners]).sum(1)
            reverse = ((inside > 0) | ((inside == 0) & ~side[strongest]))[image]
            side = (side != reverse) & left & searching[image]
            height = torch.where(reverse, -vector, vector).masked_fill(~side, -math.inf)
            top = largest(height)
            tops = first(height >= (top - 1e-5 * top.abs())[image])
            searching &= top > -math.inf
            labels = label(side, offsets, shapes, 4)[0]
            own = labels[tops.clamp(max=len(row) - 1)]
            masks[:, k] = side & (labels == own[image]) & searching[image]
            seed[:, k] = torch.where(searching, tops - begins, -1).cpu()
            left &= ~masks[:, k]
        return masks, value, seed

    return run


_mask_cut = register(
    f"{NAME}(Tensor features, Tensor offsets, Tensor shapes, int objects, float tau, float eps, float tolerance, "
    "int max_iterations) -> (Tensor, Tensor, Tensor)",
    outputs=_outputs,
    reference=_reference,
    cpu=_repeated_cuts("cpu"),
    cuda=_repeated_cuts("cuda"),
    cuda_needs_triton=True,
)
