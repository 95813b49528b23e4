# SPDX-License-Identifier: MIT
"""Pixel-adaptive mask refinement: masks that spread within the regions of like color around each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, expect_rows, expect_same_grids
from .reference import pamr as reference

NAME = "pamr"
MAX_DILATIONS = 16


def pamr(
    masks: Ragged | Array,
    image: Ragged | Array,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    backend: str = "auto",
) -> Ragged | Array:
    """Makes every pixel's mask, again and again, the mean of its neighbors' masks, weighted by likeness of color.

    masks:      float32 [H, W, L] or [H, W] (numpy or torch), or Ragged with rows [P, L] or [P]: a value per pixel and
                label, usually probabilities. The result is arranged like it. Labels do not influence each other; what
                is constant stays, nothing leaves the range of its input, labels that sum to 1 go on doing so.
    image:      uint8 [H, W, 3], RGB, or Ragged with rows [P, 3]; of the masks' height and width
    dilations:  steps in pixels from a pixel to its 8 neighbors, one ring of them for each; 1 to 16 of them, from 1 up.
                Beyond the border stands the nearest pixel. A pixel is not its own neighbor.
    iterations: how often, at least 0

    The weights are the softmax over all neighbors of the mean over the colors of -|difference| / (1e-8 + 0.1 s), with
    colors from 0 to 1 and s the color's standard deviation in all windows around the pixel.
    Accuracy: within 5e-5 of float64 for masks from 0 to 1 and the default settings, 1e-6 as a rule; the roots of the
             weights are kept with 16 bits (the reference: weights in float32). NaN and Inf spread within their label.
    Errors:  TypeError for a wrong dtype or kind; ValueError for shapes that do not match, a parameter out of range, a
             backend that cannot run. There is no gradient: RuntimeError.
    Cost:    2 flops for each of 8 neighbors a dilation, label, pixel and iteration; memory 100 bytes a pixel for the
             weights of the default dilations, and twice the masks (of 24 labels at most) per thread. Photos of a Ragged
             batch are spread over torch's threads. Deterministic: the same bits alone, in any batch, beside any other
             labels and with any number of threads.
    Source:  N. Araslanov and S. Roth, Single-Stage Semantic Segmentation from Image Labels, CVPR 2020, section 3.3.
    """
    dims = masks.rows.ndim if isinstance(masks, Ragged) else getattr(masks, "ndim", 0) - 1
    packed_masks, restore = arrange(NAME, "masks", masks, 0 if dims == 1 else 1)
    packed_image, _ = arrange(NAME, "image", image, 1)
    expect_dtype(NAME, "masks", packed_masks.rows, torch.float32)
    expect_dtype(NAME, "image", packed_image.rows, torch.uint8)
    if packed_image.rows.shape[1] != 3:
        raise ValueError(f"{NAME}: image must have 3 channels, but has {packed_image.rows.shape[1]}")
    if packed_image.rows.device != packed_masks.rows.device:
        raise ValueError(
            f"{NAME}: image must be on the masks' device, {packed_masks.rows.device}, "
            f"but is on {packed_image.rows.device}"
        )
    if isinstance(masks, Ragged) or isinstance(image, Ragged):
        expect_same_grids(NAME, "masks", packed_masks, "image", packed_image)
    elif tuple(masks.shape[:2]) != tuple(image.shape[:2]):  # no tensor is read here, so torch.compile can trace it
        raise ValueError(
            f"{NAME}: masks and image must be of the same height and width, "
            f"but are {list(masks.shape[:2])} and {list(image.shape[:2])}"
        )
    dilations = [int(d) for d in dilations]
    if not 1 <= len(dilations) <= MAX_DILATIONS or min(dilations) < 1:
        raise ValueError(f"{NAME}: dilations must be 1 to {MAX_DILATIONS} numbers of at least 1, but are {dilations}")
    if iterations < 0:
        raise ValueError(f"{NAME}: iterations must be at least 0, but is {iterations}")
    rows = _refine(
        (packed_masks.rows[:, None] if dims == 1 else packed_masks.rows).contiguous(),
        packed_image.rows.contiguous(),
        packed_masks.offsets,
        packed_masks.shapes,
        dilations,
        int(iterations),
        backend,
    )
    return restore(rows[:, 0] if dims == 1 else rows)


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


def _refine_reference(
    masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, dilations: list[int], iterations: int
) -> Tensor:
    photos = zip(Ragged(masks, offsets, shapes).grids(), Ragged(image, offsets, shapes).grids(), strict=True)
    refined = [reference.pamr(mask, photo, dilations, iterations).flatten(0, 1) for mask, photo in photos]
    return torch.cat([masks[:0], *refined])


def _refine_cpu(masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    out = torch.empty_like(masks)
    backends.native().pamr(masks, image, offsets, shapes, out, *settings)
    return out


def _refine_triton(masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    from .triton import pamr as triton  # not at import: not every machine has Triton

    expect_rows(NAME, offsets, shapes, masks)
    out = torch.empty_like(masks)
    triton.pamr(masks, image, offsets, shapes, out, *settings)
    return out


backends.IMPLEMENTATIONS[NAME] = {"reference": _refine_reference, "cpu": _refine_cpu, "triton": _refine_triton}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _dispatch(masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, *settings) -> Tensor:
    *settings, backend = settings
    return backends.run(NAME, backend, masks.device)(masks, image, offsets, shapes, *settings)


_refine = register(
    f"{NAME}(Tensor masks, Tensor image, Tensor offsets, Tensor shapes, int[] dilations, int iterations, str backend) "
    "-> Tensor",
    _dispatch,
    lambda masks, *rest: torch.empty_like(masks),
)
