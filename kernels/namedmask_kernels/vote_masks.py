# SPDX-License-Identifier: MIT
"""SelfMask's vote: which of several candidate masks of a photo the others agree with most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, as_tensor, expect_dtype
from .reference import vote_masks as reference

NAME = "vote_masks"


class Vote(NamedTuple):
    """What `vote_masks` found. "Lead" is nothing for one photo and [B] for a batch.

    winner:  int32 [*lead], the candidate chosen; -1 where there is none. One photo: `masks[vote.winner]` is its mask
    kept:    bool [*lead, n], which candidates voted
    scores:  float64 [*lead, n], summed IoU with those that voted, itself included; 0 for those that did not
    reasons: uint8 [*lead, n], why a candidate should not vote: a sum of 1, it is empty; 2, it spans the full height;
             4, it spans the full width. 0 for those that should
    """

    winner: Array
    kept: Array
    scores: Array
    reasons: Array


def vote_masks(masks: Ragged | Array, *, backend: str = "auto") -> Vote:
    """Picks, of the candidate masks of each photo, the one that the others overlap with most.

    A candidate that is empty, or that spans the full height or the full width of the photo (it holds pixels of both of
    those borders, as backgrounds do), does not vote. Where none is left, all vote. The winner has the highest sum of
    IoUs with the voting candidates, |a and b| / (|a or b| + 1e-7); of equals, the first.

    masks:   bool [n, h, w], a batch [B, n, h, w] of equal sizes, or Ragged rows [P, n] with a column per candidate,
             which are copied once. Numpy in, numpy out.
    Errors:  TypeError for masks that are not bool; ValueError for a wrong shape or a backend that cannot run.
    Cost:    a pass over the masks' bytes and n^2 / 2 over their bits; 1 / 8 of the masks' memory. Deterministic:
             exact counts, added in order; the same on every backend, batch and thread count.
    Source:  G. Shin, S. Albanie, W. Xie, Unsupervised Salient Object Detection with Spectral Cluster Voting, CVPR
             Workshops 2022, section 3.2.
    """
    flat, offsets, shapes, n, lead = _flatten(masks)
    winner, kept, reasons, scores = _vote(flat, offsets, shapes, n, backend)
    winner = winner.reshape(lead)
    kept, reasons, scores = (x.reshape(*lead, n) for x in (kept, reasons, scores))
    if isinstance(masks, np.ndarray):
        winner, kept, reasons, scores = (x.numpy() for x in (winner, kept, reasons, scores))
    return Vote(winner, kept, scores, reasons)


def _flatten(masks: Ragged | Array) -> tuple[Tensor, Tensor, Tensor, int, tuple[int, ...]]:
    """-> each photo's masks [n, h, w] one after another, offsets and shapes of the photos, n, and "lead"."""
    if isinstance(masks, Ragged):
        ragged, _ = arrange(NAME, "masks", masks, 1)
        expect_dtype(NAME, "masks", ragged.rows, torch.bool)
        columns = [part.T.flatten() for part in ragged.rows.tensor_split(ragged.offsets[1:-1].tolist())]
        flat = torch.cat([ragged.rows.new_empty(0), *columns])
        return flat, ragged.offsets, ragged.shapes, ragged.rows.shape[1], (len(ragged.shapes),)
    if not isinstance(masks, (np.ndarray, Tensor)):
        raise TypeError(
            f"{NAME}: masks must be a numpy array, a torch tensor or a Ragged, but is {type(masks).__name__}"
        )
    given = as_tensor(masks) if isinstance(masks, np.ndarray) else masks
    if given.ndim not in (3, 4):
        raise ValueError(f"{NAME}: masks must have 3 or 4 dimensions, but is {list(given.shape)}")
    expect_dtype(NAME, "masks", given, torch.bool)
    *lead, n, h, w = given.shape
    count = lead[0] if lead else 1
    offsets = torch.arange(count + 1, dtype=torch.int32) * (h * w)
    shapes = torch.tensor([[h, w]] * count, dtype=torch.int32).reshape(-1, 2)
    return given.reshape(-1), offsets, shapes, n, tuple(lead)


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _vote_reference(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    outputs = winner, kept, reasons, scores = _fake_vote(masks, offsets, shapes, candidates)
    begins = (candidates * offsets).tolist()
    for b, (begin, end, (h, w)) in enumerate(zip(begins[:-1], begins[1:], shapes.tolist(), strict=True)):
        photo = masks[begin:end].reshape(candidates, h, w).cpu().numpy()
        found = reference.vote_masks(photo)
        winner[b] = found[0]
        for out, values in zip((kept, reasons, scores), found[1:], strict=True):
            out[b] = torch.from_numpy(values)
    return outputs


def _vote_cpu(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int) -> Outputs:
    outputs = _fake_vote(masks, offsets, shapes, candidates)
    backends.native().vote_masks(masks, offsets, shapes, *outputs)
    return outputs


backends.IMPLEMENTATIONS[NAME] = {"reference": _vote_reference, "cpu": _vote_cpu}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _fake_vote(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int, *backend: str) -> Outputs:
    photos = shapes.shape[0]
    return (
        masks.new_empty(photos, dtype=torch.int32),
        masks.new_empty(photos, candidates),
        masks.new_empty(photos, candidates, dtype=torch.uint8),
        masks.new_empty(photos, candidates, dtype=torch.float64),
    )


def _dispatch(masks: Tensor, offsets: Tensor, shapes: Tensor, candidates: int, backend: str) -> Outputs:
    return backends.run(NAME, backend, masks.device)(masks, offsets, shapes, candidates)


_vote = register(
    f"{NAME}(Tensor masks, Tensor offsets, Tensor shapes, int candidates, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake_vote,
)
