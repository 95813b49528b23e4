# SPDX-License-Identifier: MIT
"""Selection: several candidate masks per photo, and which of them is the object.

The candidates of a detector are the sides of a normalized cut, spectral clusters, and proposals of a network if it has
one. Each gets a score in two parts:

- its `prior`, from masks alone: the mean IoU with the other candidates, because the object is found by several ways of
  grouping the patches, minus the share of the photo's border that it covers, because backgrounds reach the border;
- with `--select name`, how likely CLIP finds the name of the category inside the mask (`namedmask.names`), times
  `NAME_WEIGHT`.

The weights are the same for all detectors. bench/ABLATIONS.md says what they were measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from namedmask_kernels import Ragged, normalized_cut, resize, spectral_clusters

from ..batches import Size, on_rows, runs
from . import Detections

COUNTS = (2, 3, 4)  # numbers of clusters; every cluster is a candidate
NAME_WEIGHT = 0.25  # of a probability, beside a mean IoU and a share of the border
SHORTLIST = 6  # candidates per photo for which the name is looked up, the best by their prior


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


def column(candidates: Ragged, numbers: Tensor) -> Ragged:
    """One candidate of each photo, float32 [T], by its number, int64 [B]."""
    return candidates.with_rows(candidates.rows.gather(1, on_rows(candidates, numbers)[:, None])[:, 0])


def chosen(candidates: Ragged, found: Prior, sizes: Sequence[Size], names: tuple[Tensor, Tensor] | None) -> Detections:
    """The best candidate of each photo.

    Args:
        candidates: float32 [T, K] in [0, 1] on grids that cover the photos.
        found: Their prior.
        sizes: Height and width of each mask.
        names: Numbers of candidates, int64 [B, n], and the probability of the name in them, float32 [B, n]; all other
            candidates are left out. None: the prior decides alone.

    Returns:
        The masks. The confidence is the agreement of the candidate; with names, the mean of it and of the probability,
        which has the weight `NAME_WEIGHT`.
    """
    merit, confidence = found.score, found.agreement
    if names is None:
        best = merit.argmax(1, keepdim=True)
    else:
        numbers, bonus = names[0], NAME_WEIGHT * names[1]
        best = numbers.gather(1, (merit.gather(1, numbers) + bonus).argmax(1, keepdim=True))
        confidence = confidence.scatter_add(1, numbers, bonus) / (1 + NAME_WEIGHT)
    masks = resize(column(candidates, best[:, 0]), sizes)
    return Detections(masks, confidence.gather(1, best)[:, 0].double())


def quality(confidence: float, border: float, certain: float) -> float:
    """Score of a mask that was selected, in [0, 1].

    It is the mean of two numbers in [0, 1]: twice the difference of confidence and border, and the certainty. Twice,
    since backgrounds and parts of objects are among the candidates: even perfect masks agree with half of them only.

    Args:
        confidence: Confidence of the selected candidate (`chosen`).
        border: Share of the photo's border that the refined mask covers.
        certain: `certainty` of the refined mask.
    """
    return (min(1.0, max(0.0, 2 * (confidence - border))) + certain) / 2
