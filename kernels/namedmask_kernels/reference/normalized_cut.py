# SPDX-License-Identifier: MIT
"""TokenCut's normalized cut with a dense float64 eigensolver: the definition, for one image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .connected_components import connected_components


class Cut(NamedTuple):
    vector: np.ndarray  # float64 [n]
    value: float
    residual: float
    partition: np.ndarray  # bool [n]
    seed: int


def unit_rows(features: Tensor) -> Tensor:
    """features [n, C] -> float64 [n, C]: unit vectors, rounded to float32; a row of zeros stays zero."""
    rows = features.double()
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).float().double()


def edges(features: Tensor, tau: float) -> np.ndarray:
    """features float32 [n, C] -> bool [n, n]: whether the cosine exceeds tau."""
    unit = unit_rows(features)
    return ((unit @ unit.T).clamp(max=1) > tau).cpu().numpy()


def generalized_eigh(affinity: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """affinity A [n, n], degrees [n] -> ascending eigenvalues [n], eigenvectors [n, n] of (D - A) v = lambda D v."""
    scale = 1 / np.sqrt(degrees)
    symmetric = scale[:, None] * (np.diag(degrees) - affinity) * scale
    values, vectors = torch.linalg.eigh(torch.from_numpy(symmetric))
    return values.numpy(), scale[:, None] * vectors.numpy()


def cut(connected: np.ndarray, eps: float) -> Cut:
    """connected bool [n, n], symmetric -> the second smallest generalized eigenpair and what follows from it."""
    n = len(connected)
    affinity = np.where(connected, 1.0, eps)
    none = Cut(np.zeros(n), 1.0, 0.0, np.zeros(n, bool), -1)
    if n < 2:
        return none
    others = affinity[~np.eye(n, dtype=bool)]
    if np.ptp(others) == 0 and np.ptp(affinity.diagonal()) == 0:  # all tokens are alike
        return none._replace(value=float(1 - (affinity[0, 0] - others[0]) / affinity[0].sum()))
    degrees = affinity.sum(1)
    values, vectors = generalized_eigh(affinity, degrees)
    value, v = values[1], vectors[:, 1]
    residual = np.linalg.norm((degrees * v - affinity @ v - value * degrees * v) / np.sqrt(degrees))
    size = np.abs(v)
    seed = int(np.argmax(size >= (1 - 1e-5) * size.max()))
    v = v * np.sign(v[seed])
    return Cut(v, float(value), float(residual), v > v.mean(), seed)


def seed_component(partition: np.ndarray, seed: int) -> np.ndarray:
    """partition bool [h, w] -> bool [h, w]: its 4-connected component that contains the seed; empty for seed -1."""
    labels = connected_components(partition)
    return labels == labels.flat[seed] if seed >= 0 else np.zeros_like(partition)


def normalized_cut(
    features: Tensor, tau: float, eps: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, float, float, int, np.ndarray, int, np.ndarray]:
    """features float32 [h, w, C], finite -> the fields of NormalizedCut. Exact: the last two arguments are unused."""
    vector, value, residual, partition, seed = cut(edges(features.flatten(0, 1), tau), eps)
    foreground = seed_component(partition.reshape(features.shape[:2]), seed)
    return vector, value, residual, 0, partition, seed, foreground
