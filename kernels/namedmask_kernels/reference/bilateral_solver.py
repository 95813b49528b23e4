# SPDX-License-Identifier: MIT
"""The fast bilateral solver in numpy and scipy, float64, the definition. One photo at a time."""

from __future__ import annotations

import numpy as np
from scipy import sparse

BISTOCHASTISATION_ROUNDS = 10
DIAGONAL_FLOOR = 1e-5  # of the preconditioner

# Full-range BT.601: luma, and two chroma planes around 128.
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
OFFSET = np.array([0.0, 128.0, 128.0])


def cells(image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float) -> np.ndarray:
    """image uint8 [h, w, 3] -> int64 [h * w, 5]: each pixel's (y, x, luma, blue, red) / cell size, truncated."""
    h, w, _ = image.shape
    # A matrix product, not a sum of three terms: BLAS fuses multiply and add, and the last bit of that decides to which
    # side of a border the colors fall that lie on one (every gray does, with chroma 128 exactly).
    planes = np.moveaxis(image.astype(np.float64) @ YCBCR.T + OFFSET, -1, 0)
    y, x = np.mgrid[:h, :w]
    sizes = (sigma_spatial, sigma_spatial, sigma_luma, sigma_chroma, sigma_chroma)
    return np.stack([(p / s).astype(np.int64).ravel() for p, s in zip((y, x, *planes), sizes, strict=True)], axis=1)


def grid(cells: np.ndarray) -> tuple[np.ndarray, sparse.csr_array]:
    """cells [p, 5] -> (vertex of each pixel [p], which vertices are neighbors: 0/1 matrix [v, v]).

    The occupied cells are the vertices; neighbors are one step apart along one of the five axes.
    """
    steps = np.cumprod([1, *(cells.max(axis=0)[:0:-1] + 2)])[::-1]  # one spare cell per axis: a step never wraps around
    keys, vertex = np.unique(cells @ steps, return_inverse=True)
    rows, columns = [], []
    for step in steps:
        at = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
        here = np.flatnonzero(keys[at] == keys + step)
        rows += [here, at[here]]
        columns += [at[here], here]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    shape = (len(keys), len(keys))
    return vertex, sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def bistochastize(neighbors: sparse.csr_array, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, n) such that n * blur(n * x) is a blur that keeps a constant, weighted by m, as it is."""

    def blur(x):
        return 10 * x + neighbors @ x

    n = np.ones_like(mass)
    for _ in range(BISTOCHASTISATION_ROUNDS):
        n = np.sqrt(n * mass / blur(n))
    return n * blur(n), n


def conjugate_gradients(multiply, b, x, diagonal, iterations, tolerance):
    """Solves multiply(x) = b from the given x, preconditioned by 1 / diagonal."""
    residual = b - multiply(x)
    direction, rho = np.zeros_like(b), np.inf
    for _ in range(iterations):
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(b):
            break
        preconditioned = residual / diagonal
        rho, before = residual @ preconditioned, rho
        direction = preconditioned + rho / before * direction
        change = multiply(direction)
        curvature = direction @ change
        if curvature == 0:  # the residual has underflowed
            break
        step = rho / curvature
        x = x + step * direction
        residual = residual - step * change
    return x


def bilateral_solver(
    target: np.ndarray,
    image: np.ndarray,
    confidence: float,
    sigma_spatial: float,
    sigma_luma: float,
    sigma_chroma: float,
    smoothness: float,
    iterations: int,
    tolerance: float,
) -> np.ndarray:
    """target float [h, w], image uint8 [h, w, 3] -> float64 [h, w]."""
    if target.size == 0:
        return np.zeros(target.shape)
    vertex, neighbors = grid(cells(image, sigma_spatial, sigma_luma, sigma_chroma))
    mass = np.bincount(vertex).astype(np.float64)
    m, n = bistochastize(neighbors, mass)
    weight = confidence * mass
    b = confidence * np.bincount(vertex, target.ravel().astype(np.float64))

    def multiply(x):
        return smoothness * (m * x - n * (10 * n * x + neighbors @ (n * x))) + weight * x

    diagonal = np.maximum(smoothness * (m - 10 * n * n) + weight, DIAGONAL_FLOOR)
    solution = conjugate_gradients(multiply, b, b / weight, diagonal, iterations, tolerance)
    return solution[vertex].reshape(target.shape)
