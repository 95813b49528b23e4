# SPDX-License-Identifier: MIT
"""The fast bilateral solver in float64 numpy: the definition, for one image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BISTOCHASTIZATION_ROUNDS = 10
DIAGONAL_FLOOR = 1e-5  # of the preconditioner

# Full-range BT.601: luma, and two chroma planes around 128.
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
OFFSET = np.array([0.0, 128.0, 128.0])

Edges = list[tuple[np.ndarray, np.ndarray]]  # for each axis of the grid the vertices and their next neighbors


def cells(image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float) -> np.ndarray:
    """image uint8 [h, w, 3] -> int64 [h * w, 5]: each pixel's (y, x, luma, blue, red) / cell size, truncated."""
    h, w, _ = image.shape
    # A matrix product and not a sum of three terms: BLAS fuses multiply and add, and the last bit decides which side of
    # a cell border colors fall on that lie exactly on one (every gray does, with chroma 128). Products of few rows may
    # be computed without BLAS, hence at least 64.
    colors = np.zeros((max(64, h * w), 3))
    colors[: h * w] = image.reshape(-1, 3)
    planes = np.moveaxis((colors @ YCBCR.T + OFFSET)[: h * w].reshape(h, w, 3), -1, 0)
    y, x = np.mgrid[:h, :w]
    sizes = (sigma_spatial, sigma_spatial, sigma_luma, sigma_chroma, sigma_chroma)
    return np.stack([(p / s).astype(np.int64).ravel() for p, s in zip((y, x, *planes), sizes, strict=True)], axis=1)


def grid(cells: np.ndarray) -> tuple[np.ndarray, Edges]:
    """cells [p, 5] -> (the vertex of each pixel [p], the edges of the grid).

    The vertices are the occupied cells; two are neighbors if they are one step apart along one of the five axes.
    """
    steps = np.cumprod([1, *(cells.max(axis=0)[:0:-1] + 2)])[::-1]  # one spare cell per axis: a step never wraps around
    keys, vertex = np.unique(cells @ steps, return_inverse=True)
    edges = []
    for step in steps:
        at = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
        here = np.flatnonzero(keys[at] == keys + step)
        edges.append((here, at[here]))
    return vertex, edges


def neighbor_sums(edges: Edges, x: np.ndarray) -> np.ndarray:
    """x [v] -> [v], the sum of x over the neighbors of each vertex."""
    total = np.zeros_like(x)
    for here, there in edges:  # a vertex occurs at most once in each of the two arrays
        total[here] += x[there]
        total[there] += x[here]
    return total


def bistochastize(edges: Edges, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (m, n) such that n * blur(n * x), weighted by m, preserves constants."""

    def blur(x: np.ndarray) -> np.ndarray:
        return 10 * x + neighbor_sums(edges, x)

    n = np.ones_like(mass)
    for _ in range(BISTOCHASTIZATION_ROUNDS):
        n = np.sqrt(n * mass / blur(n))
    return n * blur(n), n


def conjugate_gradients(
    multiply: Callable[[np.ndarray], np.ndarray],
    b: np.ndarray,
    x: np.ndarray,
    diagonal: np.ndarray,
    iterations: int,
    tolerance: float,
) -> np.ndarray:
    """Solves multiply(x) = b, starting from x, preconditioned by 1 / diagonal."""
    residual = b - multiply(x)
    direction, rho = np.zeros_like(b), np.inf
    for _ in range(iterations):
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(b):
            break
        preconditioned = residual / diagonal
        rho, previous = residual @ preconditioned, rho
        direction = preconditioned + rho / previous * direction
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
    confidence: float | np.ndarray,
    sigma_spatial: float,
    sigma_luma: float,
    sigma_chroma: float,
    smoothness: float,
    iterations: int,
    tolerance: float,
) -> np.ndarray:
    """target float [h, w], image uint8 [h, w, 3], confidence a number or float [h, w] -> float64 [h, w]."""
    if target.size == 0:
        return np.zeros(target.shape)
    vertex, edges = grid(cells(image, sigma_spatial, sigma_luma, sigma_chroma))
    mass = np.bincount(vertex).astype(np.float64)
    m, n = bistochastize(edges, mass)
    values = target.ravel().astype(np.float64)
    weight: np.ndarray
    b: np.ndarray
    if isinstance(confidence, np.ndarray):
        per_pixel = confidence.ravel().astype(np.float64)
        weight, b = np.bincount(vertex, per_pixel), np.bincount(vertex, per_pixel * values)
    else:
        weight, b = confidence * mass, confidence * np.bincount(vertex, values)
    mean = b.sum() / weight.sum() if weight.any() else 0.0
    start = np.divide(b, weight, out=np.full_like(b, mean), where=weight > 0)

    def multiply(x: np.ndarray) -> np.ndarray:
        return smoothness * (m * x - n * (10 * n * x + neighbor_sums(edges, n * x))) + weight * x

    diagonal = np.maximum(smoothness * (m - 10 * n * n) + weight, DIAGONAL_FLOOR)
    solution = conjugate_gradients(multiply, b, start, diagonal, iterations, tolerance)
    largest = np.finfo(np.float32).max  # the solution may exceed the target's range
    return solution.clip(-largest, largest)[vertex].reshape(target.shape)
