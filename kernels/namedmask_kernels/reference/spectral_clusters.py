# SPDX-License-Identifier: MIT
"""SelfMask's spectral clustering with a dense float64 eigensolver: the definition, for one image."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .normalized_cut import generalized_eigh, unit_rows

RESTARTS, ROUNDS = 10, 100
MASK = 2**64 - 1


def affinity(features: Tensor) -> np.ndarray | None:
    """features float32 [n, C] -> float64 [n, n], cosines scaled to [0, 1]; None where all tokens are alike."""
    unit = unit_rows(features)
    cosines = (unit @ unit.T).cpu().numpy()
    if len(cosines) < 2 or np.ptp(cosines) < 1e-6:
        return None
    return (cosines - cosines.min()) / np.ptp(cosines)


def embedding(affinity: np.ndarray, count: int) -> np.ndarray:
    """The generalized eigenvectors v_2, v_3, ... of (D - A, D), columns [n, count]; rows without affinity are 0."""
    degrees = affinity.sum(1)
    connected = degrees > 1e-6
    last = min(count, int(connected.sum()) - 1)
    points = np.zeros((len(degrees), max(last, 0)))
    if last > 0:
        _, vectors = generalized_eigh(affinity[np.ix_(connected, connected)], degrees[connected])
        points[connected] = vectors[:, 1 : last + 1]
    return points


class Random:
    """splitmix64, uniform in [0, 1)."""

    def __init__(self, seed: int, k: int, run: int) -> None:
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
    """points [n, d] -> labels [n], numbered in order of first occurrence."""
    smallest, best = np.inf, np.zeros(len(points), np.int64)
    for run in range(RESTARTS):
        centers = _choose_centers(points, k, Random(seed, k, run))
        squares = _squares(points, centers)
        labels = squares.argmin(1)
        for _ in range(ROUNDS):
            for c in np.unique(labels):
                centers[c] = points[labels == c].mean(0)
            squares, previous = _squares(points, centers), labels
            labels = squares.argmin(1)
            if np.array_equal(previous, labels):
                break
        if squares.min(1).sum() < smallest:
            smallest, best = squares.min(1).sum(), labels
    _, first, inverse = np.unique(best, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def spectral_clusters(features: Tensor, counts: list[int], seed: int) -> np.ndarray:
    """features float32 [h, w, C], finite -> labels int32 [h * w, len(counts)]."""
    rows = features.flatten(0, 1)
    labels = np.zeros((len(rows), len(counts)), np.int32)
    a = affinity(rows)
    if a is None or max(counts, default=1) < 2:
        return labels
    points = embedding(a, max(counts) - 1)
    for column, k in enumerate(counts):
        if k > 1 and points.shape[1]:
            labels[:, column] = kmeans(points[:, : k - 1], k, seed)
    return labels
