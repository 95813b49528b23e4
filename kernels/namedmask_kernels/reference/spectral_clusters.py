# SPDX-License-Identifier: MIT
"""SelfMask's spectral clustering with a dense float64 eigensolver, the definition. One photo: features [n, C]."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from torch import Tensor

RESTARTS, ROUNDS = 10, 100
MASK = 2**64 - 1


def affinity(features: Tensor) -> np.ndarray | None:
    """features float32 [n, C] -> float64 [n, n], cosines scaled to [0, 1]; None where all tokens are alike."""
    unit = (features.double() / features.double().norm(dim=1, keepdim=True).clamp(min=1e-12)).float().double()
    products = (unit @ unit.T).cpu().numpy()
    if len(products) < 2 or np.ptp(products) < 1e-6:
        return None
    return (products - products.min()) / np.ptp(products)


def embedding(affinity: np.ndarray, vectors: int) -> np.ndarray:
    """The generalized eigenvectors v_2, v_3, ... of (D - A, D), columns [n, vectors]; rows without affinity are 0."""
    degrees = affinity.sum(1)
    joined = degrees > 1e-6
    a, d = affinity[np.ix_(joined, joined)], degrees[joined]
    last = min(vectors, len(d) - 1)
    found = np.zeros((len(degrees), last))
    if last > 0:
        found[joined] = scipy.linalg.eigh(np.diag(d) - a, np.diag(d), subset_by_index=[1, last])[1]
    return found


class Random:
    """splitmix64, uniform in [0, 1)."""

    def __init__(self, seed: int, k: int, run: int):
        self.state = self._mix((self._mix(seed & MASK) + k * RESTARTS + run + 0x9E3779B97F4A7C15) & MASK)

    @staticmethod
    def _mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    def next(self) -> float:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return (self._mix(self.state) >> 11) * 2.0**-53


def _squares(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """[n, d], [c, d] -> squared distances [n, c]."""
    return ((points[:, None] - centers) ** 2).sum(2)


def _choose_centers(points: np.ndarray, k: int, random: Random) -> np.ndarray:
    chosen = [int(random.next() * len(points))]
    while len(chosen) < k:
        distance = _squares(points, points[chosen]).min(1)
        if not distance.sum() > 0:
            break
        threshold = random.next() * np.cumsum(distance)[-1]
        chosen.append(min(int(np.searchsorted(np.cumsum(distance), threshold, side="right")), len(points) - 1))
    return points[chosen]


def kmeans(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """points [n, d] -> labels [n], numbered in the order in which they first occur."""
    least, best = np.inf, None
    for run in range(RESTARTS):
        centers = _choose_centers(points, k, Random(seed, k, run))
        labels = None
        for _ in range(ROUNDS + 1):
            before, squares = labels, _squares(points, centers)
            labels = squares.argmin(1)
            if before is not None and np.array_equal(before, labels):
                break
            for c in np.unique(labels):
                centers[c] = points[labels == c].mean(0)
        if squares.min(1).sum() < least:
            least, best = squares.min(1).sum(), labels
    _, first, inverse = np.unique(best, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def spectral_clusters(features: Tensor, counts: list[int], seed: int) -> np.ndarray:
    """features float32 [n, C], finite -> labels int32 [n, len(counts)]."""
    labels = np.zeros((len(features), len(counts)), np.int32)
    a = affinity(features)
    if a is None or max(counts, default=1) < 2:
        return labels
    points = embedding(a, max(counts) - 1)
    for column, k in enumerate(counts):
        if k > 1 and points.shape[1]:
            labels[:, column] = kmeans(points[:, : k - 1], k, seed)
    return labels
