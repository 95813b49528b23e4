# SPDX-License-Identifier: MIT
"""bilateral_solver compared with the published solver, written in numpy and scipy.

`pytest bench/bench_bilateral_solver.py --benchmark-only -s` prints the tables. We know of no other public
implementation for the CPU.

Time per image on one core of a Sapphire Rapids Xeon, in ms: keys of the colors 0.5, sums over vertices 0.9, neighbors
and order of the system 0.6, bistochastization 0.25, 25 iterations 1.05, slicing 0.2: 3.5 with warm caches. In this
bench the published solver evicts the caches between calls, which costs more than half a millisecond. An iteration is
bound by loads of single neighbor values from the second-level cache.
"""

import numpy as np
import torch
from scipy import sparse

import namedmask_kernels as nk
from common import Work, copy_bandwidth, paired_medians, report, report_gpu, report_two_threads, threads
from namedmask_kernels import Ragged
from namedmask_kernels.reference import bilateral_solver as reference

SETTINGS = (0.999, 16, 16, 8, 256.0, 25, 1e-5)


def make_image(seed=0, h=512, w=683):
    """(target, image of textured objects in slowly varying light, with noise)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / h
    image = np.empty((h, w, 3))
    image[:] = (150 + 60 * np.sin(2 * x + y) + 30 * np.cos(5 * y))[..., None] * [0.95, 1.0, 1.08]
    target = np.zeros((h, w), np.float32)
    for blob in range(24):
        cy, cx, radius, squash = rng.uniform([0, 0, 0.05, 0.4], [1, w / h, 0.3, 1.6])
        inside = ((y - cy) * squash) ** 2 + (x - cx) ** 2 < radius**2 * (
            1 + 0.2 * np.sin(9 * np.arctan2(y - cy, x - cx))
        )
        grain = np.sin(rng.uniform(20, 90) * x + rng.uniform(20, 90) * y) * rng.uniform(5, 30)
        shade = 1 - 0.5 * (x - cx + y - cy) / radius
        image[inside] = (rng.uniform(30, 220, 3) * shade[..., None] + grain[..., None])[inside]
        if blob >= 22:
            target[inside] = 1
    image += rng.normal(0, 5, (h, w, 1)) + rng.normal(0, 2, (h, w, 3))
    target[np.roll(target, (9, 14), (0, 1)) > 0] = 1  # the mask is not aligned to the edges of the object
    return target, image.clip(0, 255).astype(np.uint8)


def published_solver(target, image, scale=1.0):
    """The solver as published: sums over neighbors are products with a sparse matrix. `scale`: of the spatial sigma."""
    confidence, spatial, luma, chroma, smoothness, iterations, tolerance = SETTINGS
    vertex, edges = reference.grid(reference.cells(image, scale * spatial, luma, chroma))
    rows, columns = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    mass = np.bincount(vertex).astype(np.float64)
    half = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(mass), len(mass)))
    blur = (10 * sparse.eye_array(len(mass)) + half + half.T).tocsr()
    n = np.ones_like(mass)
    for _ in range(reference.BISTOCHASTIZATION_ROUNDS):
        n = np.sqrt(n * mass / (blur @ n))
    m, weight = n * (blur @ n), confidence * mass
    b = confidence * np.bincount(vertex, target.ravel().astype(np.float64))
    scaling = sparse.diags_array(n)
    system = (smoothness * (sparse.diags_array(m) - scaling @ blur @ scaling) + sparse.diags_array(weight)).tocsr()
    jacobi = sparse.diags_array(1 / np.maximum(system.diagonal(), reference.DIAGONAL_FLOOR))
    solution, _ = sparse.linalg.cg(system, b, b / weight, rtol=tolerance, maxiter=iterations, M=jacobi)
    return solution[vertex].reshape(target.shape)


def iteration_bytes(image):
    """(vertices, bytes that an iteration of conjugate gradients reads and writes, ignoring caches)."""
    vertex, edges = reference.grid(reference.cells(image, *SETTINGS[1:4]))
    count = int(vertex.max()) + 1
    # 15 reads or writes of a float per vertex; per neighbor its index and its value
    return count, 15 * 4 * count + 8 * sum(2 * len(here) for here, _ in edges)


def test_single_image(benchmark):
    target, image = make_image()
    soft = nk.bilateral_solver(target, image)
    expected = published_solver(target, image)
    np.testing.assert_allclose(soft, expected, atol=1e-4)
    assert 15_000 <= iteration_bytes(image)[0] <= 25_000
    with threads(1):
        seconds = paired_medians(
            {
                "cpu": lambda: nk.bilateral_solver(target, image),
                "no iterations": lambda: nk.bilateral_solver(target, image, iterations=0),
                "published": lambda: published_solver(target, image),
            },
            rounds=25,
        )
        benchmark.pedantic(nk.bilateral_solver, (target, image), rounds=20, warmup_rounds=2)
        vertices, moved = iteration_bytes(image)
        iteration = (seconds["cpu"] - seconds["no iterations"]) / 25
        ceiling = copy_bandwidth(1 << 20)
    report(
        f"bilateral_solver, 512 x 683, {vertices} vertices, one core",
        [
            {"method": "published, numpy and scipy", "ms": 1e3 * seconds["published"], "ratio": 1.0},
            {"method": "cpu", "ms": 1e3 * seconds["cpu"], "ratio": seconds["published"] / seconds["cpu"]},
            {"method": "  all but the iterations", "ms": 1e3 * seconds["no iterations"]},
            {
                "method": "  one of 25 iterations",
                "ms": 1e3 * iteration,
                "KB": moved / 1e3,
                "GB/s": moved / iteration / 1e9,
                "share of a 1 MB copy's": moved / iteration / ceiling,
            },
        ],
    )


def test_batch_of_8(benchmark, quick):
    h, w = (128, 170) if quick else (512, 683)
    pairs = [make_image(seed, h - h // 32 * seed, w - w // 17 * seed) for seed in range(8)]
    targets = Ragged.pack([torch.from_numpy(t) for t, _ in pairs])
    images = Ragged.pack([torch.from_numpy(i) for _, i in pairs])
    for soft, (target, image) in zip(nk.bilateral_solver(targets, images).grids(), pairs, strict=True):
        np.testing.assert_allclose(soft.numpy(), reference.bilateral_solver(target, image, *SETTINGS), atol=1e-4)

    title = f"bilateral_solver, batch of 8 images up to {h} x {w}"
    report_two_threads(title, lambda: nk.bilateral_solver(targets, images), 8, benchmark, rounds=15, seconds=60)


def test_batch_of_64_on_gpu(benchmark):
    """We know of no other implementation for a GPU."""
    pairs = [make_image(seed, 512 - 16 * seed, 683 - 40 * seed) for seed in range(8)]
    targets = Ragged.pack([torch.from_numpy(t) for t, _ in pairs] * 8)
    images = Ragged.pack([torch.from_numpy(i) for _, i in pairs] * 8)
    # Per pixel: 7 bytes are read and 24 of the grid written, about 40 to find its vertex, 8 to slice. Per vertex: 25
    # iterations, and 10 rounds of bistochastization, which count as 5.
    moved = [79 * target.size + 30 * iteration_bytes(image)[1] for target, image in pairs]

    def calls():
        on_gpu = [batch.with_rows(batch.rows.cuda()) for batch in (targets, images)]
        first = [batch.grids()[0] for batch in on_gpu]
        expected = nk.bilateral_solver(targets, images, backend="cpu").rows
        torch.testing.assert_close(nk.bilateral_solver(*on_gpu).rows.cpu(), expected, atol=1e-4, rtol=0)
        yield "cuda", lambda: nk.bilateral_solver(*on_gpu), Work(bytes=8 * sum(moved))
        yield "cuda, one image of 512 x 683", lambda: nk.bilateral_solver(*first), Work(bytes=moved[0], images=1)

    report_gpu("bilateral_solver, batch of 64 images, 400 x 403 to 512 x 683, GPU", calls, 64, benchmark)
