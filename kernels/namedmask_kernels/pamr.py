# SPDX-License-Identifier: MIT
"""Pixel-adaptive mask refinement: masks diffuse within regions of similar color."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import like_first, per_image, register
from .ragged import (
    FLOATING,
    Array,
    Batch,
    Ragged,
    arrange,
    expect_image,
    expect_int,
    expect_ints,
    expect_one_per_image,
    expect_rows,
    image_count,
    is_sequence,
)
from .reference import pamr as reference

NAME = "pamr"
MAX_DILATIONS = 16


def pamr(
    masks: Batch,
    image: Ragged | Array,
    *,
    dilations: Sequence[int] | Sequence[Sequence[int]] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    backend: str = "auto",
) -> Batch:
    """Repeatedly replaces the masks at every pixel by the mean over its neighbors, weighted by color similarity.

    The weights are the softmax over all neighbors of the mean over the color channels of
    -|difference| / (1e-8 + 0.1 s), with colors from 0 to 1 and s the standard deviation of the channel over the windows
    around the pixel. A pixel is not its own neighbor; the border is padded by replication.

    Args:
        masks: Floating point [H, W, L] or [H, W] (numpy or torch), or Ragged with rows [P, L] or [P]: a value per pixel
            and label, usually a probability; computed in float32.
        image: uint8 RGB [H, W, 3], or Ragged with rows [P, 3], with the height and width of `masks`.
        dilations: Distances in pixels from a pixel to its 8 neighbors, each at least 1; 1 to 16 of them. For a Ragged
            batch, also one such list for each image; their lengths may differ.
        iterations: Number of iterations, at least 0.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        The refined masks, float32, arranged like `masks`. Labels do not influence each other. Constant masks remain
        constant, values stay in the range of the input, and labels that sum to 1 still do.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, a parameter is out of range, or the backend cannot run.
        RuntimeError: On a backward pass or a forward-mode derivative, since there is no gradient.

    Accuracy:
        Within 5e-5 of float64 for masks from 0 to 1 and the default settings, usually within 1e-6: the square roots of
        the weights are stored with 16 bits (the reference computes in float64). NaN and Inf spread within their label;
        finite masks stay finite.

    Cost:
        2 flops per neighbor (8 per dilation), label, pixel and iteration. 100 bytes per pixel for the weights of the
        default dilations, and twice the masks (of 24 labels at most) per thread. The images of a Ragged batch are
        distributed over torch's threads. On a GPU, the weights of all images and up to two copies of the masks, padded
        to 4 labels. On an H100, 0.27 ms per image of 375 x 500 with 2 labels and 2.1 ms with 21, in a batch of 16, with
        an earlier version; no GPU has run the present one.

    Determinism:
        Bit-identical for any batch, number of labels and number of threads.

    Source:
        N. Araslanov and S. Roth, Single-Stage Semantic Segmentation from Image Labels, CVPR 2020, section 3.3.

    Examples:
        >>> image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
        >>> masks = torch.rand(60, 80, 21).softmax(-1)
        >>> pamr(masks, image).shape
        torch.Size([60, 80, 21])
    """
    dims = masks.rows.ndim if isinstance(masks, Ragged) else getattr(masks, "ndim", 0) - 1
    packed = arrange(NAME, "masks", masks, 0 if dims == 1 else 1, *FLOATING)
    pixels = expect_image(NAME, image, packed)
    lists = _dilation_lists(dilations, masks)
    rows = packed.rows[:, None] if dims == 1 else packed.rows
    refined = _refine(
        rows.to(torch.float32).contiguous(),
        pixels,
        packed.offsets,
        packed.shapes,
        [distance for distances in lists for distance in distances],
        [len(distances) for distances in lists],
        expect_int(NAME, "iterations", iterations),
        backend,
    )
    return packed.restore(refined[:, 0] if dims == 1 else refined)


def _dilation_lists(dilations: Any, masks: Ragged | Array) -> list[list[int]]:
    """The checked dilations: one list for all images, or one for each."""
    if is_sequence(dilations) and (is_sequence(dilations[0]) if len(dilations) else image_count(masks) == 0):
        lists = expect_one_per_image(NAME, "dilations", dilations, masks, "list")
    else:
        lists = [dilations]
    checked = [expect_ints(NAME, "dilations", d, low=1, high=2**63 - 1, most=MAX_DILATIONS) for d in lists]
    if not all(checked):
        raise ValueError(f"{NAME}: dilations must not be empty")
    return checked


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------
# `dilations` are the lists one after another, and `counts` their lengths.


def _refine_reference(
    masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, dilations: list[int], counts: list[int],
    iterations: int,
) -> Tensor:  # fmt: skip
    longest = max(shapes.flatten().tolist(), default=1)
    near = iter([min(d, longest) for d in dilations])  # the rest reach the border as well
    lists = [list(itertools.islice(near, count)) for count in counts]
    run = per_image(reference.pamr, varying=(0,))
    return run(masks.double(), image, offsets, shapes, lists, iterations).float()


def _refine_triton(
    masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, dilations: list[int], counts: list[int],
    iterations: int,
) -> Tensor:  # fmt: skip
    from .triton import pamr as triton  # not at import: Triton is optional

    expect_rows(NAME, offsets, shapes, masks)
    out = like_first(masks)
    triton.pamr(masks, image, offsets, shapes, out, dilations, counts, iterations)
    return out


_refine = register(
    f"{NAME}(Tensor masks, Tensor image, Tensor offsets, Tensor shapes, int[] dilations, int[] counts, "
    "int iterations) -> Tensor",
    reference=_refine_reference,
    triton=_refine_triton,
)
