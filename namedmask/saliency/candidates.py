# SPDX-License-Identifier: MIT
"""Selection: several candidate masks per photo, and which of them is the object.

The candidates of a detector are the sides of a normalized cut, spectral clusters, and proposals of a network if it has
one. Each gets a score in two parts:

- its `prior`, from masks alone: the mean IoU with the other candidates, because the object is found by several ways of
  grouping the patches, minus the share of the photo's border that it covers, because backgrounds reach the border;
- with `--select name`, how likely CLIP finds the name of the category inside the mask (`namedmask.names`), times
  `NAME_WEIGHT`.

The mask that is selected and refined has another score, its `quality`: what the other good candidates say about it, and
how clear its outline is.

The weights are the same for all detectors. bench/ABLATIONS.md says what they were measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from namedmask_kernels import Ragged, normalized_cut, resize, spectral_clusters

from ..batches import Size, on_rows, runs, sizes_of

COUNTS = (2, 3, 4)  # numbers of clusters; every cluster is a candidate
NAME_WEIGHT = 0.25  # of a probability, beside a mean IoU and a share of the border
SHORTLIST = 6  # candidates per photo, the best by their prior, that names are looked up in and that masks are scored by
STRIP = 1 / 64  # width of the strips along an outline, relative to the short side of a photo


class Prior(NamedTuple):
    """What masks alone say about the candidates of each photo.

    Attributes:
        agreement: float32 [B, K], mean IoU with the other candidates.
        border: float32 [B, K], share of the border of the photo that the candidate covers.
    """

    agreement: Tensor
    border: Tensor

    @property
    def score(self) -> Tensor:
        """The agreement minus the share of the border, float32 [B, K] in [-1, 1]."""
        return self.agreement - self.border


def clusters(features: Ragged) -> Ragged:
    """All spectral clusters of features [T, C], for `COUNTS` clusters: bool [T, sum(COUNTS)]."""
    labels = spectral_clusters(features, COUNTS)
    counts = torch.tensor(COUNTS)
    columns = torch.arange(len(COUNTS)).repeat_interleave(counts)  # 0 0 1 1 1 2 2 2 2
    numbers = torch.cat([torch.arange(count) for count in COUNTS])  # 0 1 0 1 2 0 1 2 3
    device = labels.rows.device
    return labels.with_rows(labels.rows[:, columns.to(device)] == numbers.to(device))


def groups(features: Ragged, tau: float) -> Ragged:
    """Candidates of features [T, C]: foreground and background of a normalized cut, and all `clusters`.

    Args:
        features: The features, which need not be normalized.
        tau: Cosine similarity above which the cut connects two patches.

    Returns:
        bool [T, K] with K = 2 + sum(COUNTS).
    """
    foreground = normalized_cut(features, tau=tau).foreground
    assert isinstance(foreground, Ragged)
    sides = torch.stack([foreground.rows, ~foreground.rows], 1)
    return foreground.with_rows(torch.cat([sides, clusters(features).rows], 1))


def prior(candidates: Ragged) -> Prior:
    """Compares the candidates of each photo with one another and with the border.

    Args:
        candidates: float32 [T, K] in [0, 1] on grids that cover the photos; above 0.5 is object.
    """
    count = candidates.rows.shape[1]
    agreements, borders = [candidates.rows.new_zeros(0, count)], [candidates.rows.new_zeros(0, count)]
    for grids in runs(candidates):
        masks = (grids > 0.5).float()  # [n, h, w, K]
        rim = torch.ones(masks.shape[1:3], dtype=torch.bool, device=masks.device)
        rim[1:-1, 1:-1] = False
        borders.append(masks[:, rim].mean(1))
        flat = masks.flatten(1, 2)
        overlap = flat.mT @ flat  # [n, K, K]; whole numbers, so it does not depend on the order of summation
        area = overlap.diagonal(dim1=1, dim2=2)
        union = area[:, :, None] + area[:, None] - overlap
        ious = overlap / union.clamp_min(1)
        others = ious.sum(2) - ious.diagonal(dim1=1, dim2=2)
        agreements.append(others / max(1, count - 1))
    return Prior(torch.cat(agreements), torch.cat(borders))


def shortlist(found: Prior) -> Tensor:
    """The candidates of each photo with the best prior, best first, int64 [B, min(K, SHORTLIST)]."""
    return found.score.sort(dim=1, descending=True, stable=True).indices[:, :SHORTLIST]


def merit(found: Prior, numbers: Tensor, probabilities: Tensor | float) -> Tensor:
    """The value of each candidate, float32 [B, n]; the candidate with the highest one is selected.

    Args:
        found: The prior of all candidates.
        numbers: Candidates, int64 [B, n].
        probabilities: Probability of the name in each, float32 [B, n].
    """
    return found.score.gather(1, numbers) + NAME_WEIGHT * probabilities


def column(candidates: Ragged, numbers: Tensor) -> Ragged:
    """One candidate of each photo, float32 [T], by its number, int64 [B]."""
    return candidates.with_rows(candidates.rows.gather(1, on_rows(candidates, numbers)[:, None])[:, 0])


class Choice(NamedTuple):
    """The mask that is selected for each photo, and the candidates that it is scored by.

    Attributes:
        masks: float32 [P] in [0, 1]; above 0.5 is object.
        witnesses: The shortlist of each photo, float32 [T, n] in [0, 1] on grids that cover the photos.
        weights: Weight of each in `support`, float32 [B, n]. Those that cover half of the border or more do not count;
            those in which the name is found count up to twice.
    """

    masks: Ragged
    witnesses: Ragged
    weights: Tensor


def chosen(candidates: Ragged, found: Prior, sizes: Sequence[Size], names: tuple[Tensor, Tensor] | None) -> Choice:
    """The best candidate of each photo.

    Args:
        candidates: float32 [T, K] in [0, 1] on grids that cover the photos.
        found: Their prior.
        sizes: Height and width of each mask.
        names: The `shortlist`, int64 [B, n], and the probability of the name in its masks, float32 [B, n]. None: the
            prior decides alone.
    """
    numbers, probabilities = names or (shortlist(found), 0.0)
    best = numbers.gather(1, merit(found, numbers, probabilities).argmax(1, keepdim=True))[:, 0]
    weights = (1 - 2 * found.border.gather(1, numbers)).clamp_min(0) * (1 + probabilities)
    witnesses = candidates.with_rows(candidates.rows.gather(1, on_rows(candidates, numbers)))
    return Choice(resize(column(candidates, best), sizes), witnesses, weights)


def quality(choice: Choice, refined: Ragged) -> Tensor:
    """Scores of the refined masks: (2 `support` + `clearness`) / 3.

    Args:
        choice: The masks before refinement.
        refined: float32 [P] in [0, 1]; above 0.5 is object.

    Returns:
        float64 [B] in [0, 1].
    """
    return (2 * support(choice, refined) + clearness(refined)) / 3


def support(choice: Choice, refined: Ragged) -> Tensor:
    """Mean IoU of the refined masks [P] with the witnesses of a choice, by their weights, float64 [B] in [0, 1]."""
    sizes, inside = sizes_of(refined), refined.rows > 0.5
    ious = torch.zeros_like(choice.weights, dtype=torch.float64)
    for place, rows in enumerate(choice.witnesses.rows.unbind(1)):
        other = resize(choice.witnesses.with_rows(rows.contiguous()), sizes).rows > 0.5
        ious[:, place] = _counts(refined, inside & other) / _counts(refined, inside | other).clamp_min(1)
    weights = choice.weights.double()
    return (weights * ious).sum(1) / weights.sum(1).clamp_min(1e-9)


def _counts(batch: Ragged, mask: Tensor) -> Tensor:
    """Number of pixels of a mask, bool [P], in each photo of a batch, float64 [B]."""
    counts = [images.sum((1, 2)) for images in runs(batch.with_rows(mask))]
    return torch.cat([mask.new_zeros(0, dtype=torch.int64), *counts]).double()


def clearness(softs: Ragged) -> Tensor:
    """How clear the outline of each soft mask [P] is, float64 [B] in [0, 1].

    It is the mean of the mask along the inner side of its outline minus that along the outer side, in strips that are
    `STRIP` wide. 0 without an outline: for an empty mask, and for one that covers the photo.
    """
    values = [softs.rows.new_zeros(0, dtype=torch.float64)]
    for soft in runs(softs):
        hard, width = soft > 0.5, max(1, round(STRIP * min(soft.shape[1:])))
        inner, outer = hard & _near(~hard, width), ~hard & _near(hard, width)
        sums = ((soft * strip).sum((1, 2), dtype=torch.float64) for strip in (inner, outer))
        counts = (strip.sum((1, 2)).clamp_min(1) for strip in (inner, outer))
        inside, outside = (total / count for total, count in zip(sums, counts, strict=True))
        values.append(inside - outside)
    return torch.cat(values)


def _near(masks: Tensor, width: int) -> Tensor:
    """The pixels of masks, bool [n, H, W], and those up to `width` rows and columns away."""
    for dim in (1, 2):
        reach, length = 0, masks.shape[dim]
        while reach < width:
            step = min(2 * reach + 1, width - reach, length)
            near, rest = masks.clone(), length - step
            near.narrow(dim, step, rest).logical_or_(masks.narrow(dim, 0, rest))
            near.narrow(dim, 0, rest).logical_or_(masks.narrow(dim, step, rest))
            masks, reach = near, reach + step
    return masks
