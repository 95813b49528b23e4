# SPDX-License-Identifier: MIT
"""SelfMask's vote: selects the candidate mask of an image that agrees most with the others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, register
from .ragged import MASK, Array, Ragged, arrange, as_mask, as_tensor, expect_dtype, expect_int, packed_shapes
from .reference import vote_masks as reference

NAME = "vote_masks"


class Vote(NamedTuple):
    """Result of `vote_masks`. Shapes are for one image; a batch has a leading dimension B.

    Attributes:
        winner: int32 [], the index of the selected candidate; -1 if there are no candidates. For one image
            ``masks[vote.winner]`` is its mask.
        kept: bool [n], which candidates voted.
        scores: float64 [n], sum of IoUs with the voting candidates, itself included; 0 for those that did not vote.
        reasons: uint8 [n], why a candidate is excluded, as a sum of 1 (empty), 2 (spans the full height) and 4 (spans
            the full width); 0 for a valid candidate.
    """

    winner: Array
    kept: Array
    scores: Array
    reasons: Array


def vote_masks(masks: Ragged | Array, *, backend: str = "auto") -> Vote:
    """Selects the candidate mask of each image that overlaps most with the other candidates.

    A candidate does not vote if it is empty, or if it spans the full height or width of the image, as backgrounds do
    (it has pixels on both of those borders). If no candidate remains, all of them vote. The winner has the highest sum
    of IoUs with the voting candidates, |a and b| / (|a or b| + 1e-7); of several equal ones, the first.

    Args:
        masks: bool or uint8 [n, h, w] (numpy or torch), a batch [B, n, h, w], or Ragged with rows [P, n], one column
            per candidate. In uint8 masks (0 and 1, or OpenCV's 0 and 255) any nonzero value is true.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        A `Vote`, with arrays of the kind of `masks` and on their device.

    Raises:
        TypeError: If the masks are not a bool or uint8 array, tensor or Ragged.
        ValueError: If a shape is wrong or the backend cannot run.

    Cost:
        One pass over the bytes of the masks and n^2 / 2 passes over their bits; memory 1/8 of the masks. On the CPU a
        Ragged is copied once. The CUDA version reads the bytes once for up to 28 candidates, keeps n^2 counts per image
        and does not wait for the GPU; no GPU has run it yet.

    Determinism:
        Identical on "cuda" and "cpu", in any batch and with any number of threads: counts are exact, and IoUs are added
        in order. The reference adds them in another order.

    Source:
        G. Shin, S. Albanie, W. Xie, Unsupervised Salient Object Detection with Spectral Cluster Voting, CVPR Workshops
        2022, section 3.2.

    Examples:
        >>> candidates = torch.zeros(3, 40, 60, dtype=torch.bool)
        >>> candidates[0, 10:30, 10:30] = candidates[1, 11:30, 10:31] = True
        >>> candidates[2, :, 30:] = True  # spans the full height, as backgrounds do
        >>> vote = vote_masks(candidates)
        >>> int(vote.winner), vote.kept.tolist()
        (0, [True, True, False])
    """
    flat, offsets, shapes, n, leading = _flatten(masks)
    winner, kept, reasons, scores = _vote(flat, offsets, shapes, n, backend)
    winner = winner.reshape(leading)
    kept, reasons, scores = (x.reshape(*leading, n) for x in (kept, reasons, scores))
    if isinstance(masks, np.ndarray):
        winner, kept, reasons, scores = (x.numpy() for x in (winner, kept, reasons, scores))
    return Vote(winner, kept, scores, reasons)


def _flatten(masks: Ragged | Array) -> tuple[Tensor, Tensor, Tensor, int, tuple[int, ...]]:
    """Returns the operator's arguments and the results' leading shape."""
    if isinstance(masks, Ragged):
        packed = arrange(NAME, "masks", masks, 1, *MASK)
        return as_mask(packed.rows), packed.offsets, packed.shapes, packed.rows.shape[1], (len(packed.shapes),)
    grids = as_tensor(NAME, "masks", masks)
    if grids.ndim not in (3, 4):
        raise ValueError(f"{NAME}: masks must have 3 or 4 dimensions, but has shape {list(grids.shape)}")
    expect_dtype(NAME, "masks", grids, *MASK)
    *leading, n, h, w = grids.shape
    count = leading[0] if leading else 1
    offsets, shapes = packed_shapes([(expect_int(NAME, "height", h), expect_int(NAME, "width", w))] * count)
    return as_mask(grids.reshape(-1)).contiguous(), offsets, shapes, n, tuple(leading)


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------

# `masks` is bool [n P], in which every image is [n, h, w], or bool [P, n].
Outputs = tuple[Tensor, ...]  # winner [B], kept [B, n], reasons [B, n], scores [B, n]


def _outputs(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    images = shapes.shape[0]
    return (
        masks.new_empty(images, dtype=torch.int32),
        masks.new_empty(images, candidates),
        masks.new_empty(images, candidates, dtype=torch.uint8),
        masks.new_empty(images, candidates, dtype=torch.float64),
    )


def _planes(masks: Tensor, offsets: Tensor) -> Tensor:
    """The masks as [n, h, w] per image, concatenated."""
    if masks.ndim == 1:
        return masks
    parts = [part.T.flatten() for part in masks.tensor_split(offsets[1:-1].tolist())]
    return torch.cat([masks.new_empty(0), *parts])


def _vote_reference(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    outputs = _outputs(masks, offsets, shapes, candidates)
    planes, begins = _planes(masks, offsets), (candidates * offsets.long()).tolist()
    for b, (begin, end, (h, w)) in enumerate(zip(begins[:-1], begins[1:], shapes.tolist(), strict=True)):
        vote = reference.vote_masks(planes[begin:end].reshape(candidates, h, w).cpu().numpy())
        for out, values in zip(outputs, vote, strict=True):
            out[b] = torch.from_numpy(np.asarray(values))
    return outputs


def _vote_cpu(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    outputs = _outputs(masks, offsets, shapes, candidates)
    backends.native().vote_masks(_planes(masks, offsets), offsets, shapes, *outputs)
    return outputs


def _vote_cuda(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    outputs = _outputs(masks, offsets, shapes, candidates)
    size = candidates + 4
    scratch = torch.empty(len(shapes), size, size, dtype=torch.int32, device=masks.device)
    native = backends.native().cuda
    native.vote_masks(masks.contiguous(), offsets, shapes, *outputs, scratch, cuda_stream(masks))
    return outputs


_vote = register(
    f"{NAME}(Tensor masks, Tensor offsets, Tensor shapes, int candidates) -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs,
    packed=lambda masks, *_: (masks,) if masks.ndim == 2 else (),
    reference=_vote_reference,
    cpu=_vote_cpu,
    cuda=_vote_cuda,
    capturable=True,
    differentiable=False,
)
