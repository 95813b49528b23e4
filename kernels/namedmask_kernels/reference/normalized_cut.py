# SPDX-License-Identifier: MIT
"""TokenCut's normalized cut with a dense float64 eigensolver, the definition. One photo: features float32 [n, C]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
from torch import Tensor

from .connected_components import connected_components


class Cut(NamedTuple):
    vector: np.ndarray  # float64 [n]
    value: float
    residual: float
    partition: np.ndarray  # bool [n]
    seed: int


def edges(features: Tensor, tau: float) -> np.ndarray:
    """features float32 [n, C] -> bool [n, n]: the cosine exceeds tau. Rows are unit vectors in float32."""
    unit = (features.double() / features.double().norm(dim=1, keepdim=True).clamp(min=1e-12)).float().double()
    return ((unit @ unit.T).clamp(max=1) > tau).cpu().numpy()


def cut(connected: np.ndarray, eps: float) -> Cut:
    """connected bool [n, n], symmetric -> the second smallest generalized eigenpair and what follows from it."""
    n = len(connected)
    affinity = np.where(connected, 1.0, eps)
    nothing = np.zeros(n), 1.0, 0.0, np.zeros(n, bool), -1
    if n < 2:
        return Cut(*nothing)
    others = affinity[~np.eye(n, dtype=bool)]
    if np.ptp(others) == 0 and np.ptp(affinity.diagonal()) == 0:  # all tokens are alike
        return Cut(*nothing)._replace(value=1 - (affinity[0, 0] - others[0]) / affinity[0].sum())
    degrees = affinity.sum(1)
    laplacian = np.diag(degrees) - affinity
    (value,), v = scipy.linalg.eigh(laplacian, np.diag(degrees), subset_by_index=[1, 1])
    v = v[:, 0]
    residual = np.linalg.norm((laplacian @ v - value * degrees * v) / np.sqrt(degrees))
    size = np.abs(v)
    seed = int(np.argmax(size >= (1 - 1e-5) * size.max()))
    v = v * np.sign(v[seed])
    return Cut(v, float(value), float(residual), v > v.mean(), seed)


def seed_component(partition: np.ndarray, seed: int) -> np.ndarray:
    """partition bool [h, w] -> bool [h, w]: its 4-connected component that holds the seed; all false for seed -1."""
    labels = connected_components(partition)
    return labels == labels.flat[seed] if seed >= 0 else np.zeros_like(partition)


def normalized_cut(features: Tensor, shape: tuple[int, int], tau: float, eps: float) -> tuple[Cut, np.ndarray]:
    """features float32 [h * w, C], finite -> the cut, and the foreground bool [h, w]."""
    found = cut(edges(features, tau), eps)
    return found, seed_component(found.partition.reshape(shape), found.seed)
