# SPDX-License-Identifier: MIT
"""bilateral_solver beside its numpy reference, which computes what the published numpy/scipy solver does.

`pytest bench/bench_bilateral_solver.py --benchmark-only -s` prints the tables. Another public implementation on the CPU
is not known to us.

Where one photo's time goes on a core of a Sapphire Rapids Xeon, in ms: colors' keys 0.5, sums of vertices 0.9, their
neighbors and the order of the system 0.6, bistochastization 0.25, 25 steps 1.05, slices 0.2: 3.5 when all is warm.
The reference leaves nothing of it in the caches, which costs more than half a millisecond. A step is bound by the loads
of its neighbors' values, one by one from the second-level cache.
"""

import numpy as np
import torch

import namedmask_kernels as nk
from common import (
    copy_bandwidth,
    device_copy_bandwidth,
    device_median,
    needs_gpu,
    one_thread,
    paired_medians,
    report,
    report_two_threads,
)
from namedmask_kernels import Ragged
from namedmask_kernels.reference import bilateral_solver as reference

SETTINGS = (0.999, 16, 16, 8, 256.0, 25, 1e-5)


def photo(seed=0, h=512, w=683):
    """(target, image): light that varies slowly, textured objects with their own colors, a little noise."""
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
    target[np.roll(target, (9, 14), (0, 1)) > 0] = 1  # the mask is off its object's edges
    return target, image.clip(0, 255).astype(np.uint8)


def bytes_of_a_step(image):
    """(vertices, bytes that a step of conjugate gradients reads and writes, caches aside)."""
    vertex, edges = reference.grid(reference.cells(image, *SETTINGS[1:4]))
    count = int(vertex.max()) + 1
    # 15 reads or writes of a float per vertex; per neighbor its index and its value
    return count, 15 * 4 * count + 8 * sum(2 * len(here) for here, _ in edges)


def test_one_photo_on_one_core(benchmark):
    target, image = photo()
    soft = nk.bilateral_solver(target, image)
    expected = reference.bilateral_solver(target, image, *SETTINGS)
    np.testing.assert_allclose(soft, expected, atol=1e-4)
    assert 15_000 <= bytes_of_a_step(image)[0] <= 25_000
    with one_thread():
        seconds = paired_medians(
            {
                "cpu": lambda: nk.bilateral_solver(target, image),
                "no steps": lambda: nk.bilateral_solver(target, image, iterations=0),
                "reference": lambda: reference.bilateral_solver(target, image, *SETTINGS),
            },
            rounds=25,
        )
        benchmark.pedantic(nk.bilateral_solver, (target, image), rounds=20, warmup_rounds=2)
        vertices, moved = bytes_of_a_step(image)
        step = (seconds["cpu"] - seconds["no steps"]) / 25
        ceiling = copy_bandwidth(1 << 20)
    report(
        f"bilateral_solver, 512 x 683, {vertices} vertices, one core",
        [
            {"who": "numpy reference", "ms": 1e3 * seconds["reference"], "ratio": 1.0},
            {"who": "cpu", "ms": 1e3 * seconds["cpu"], "ratio": seconds["reference"] / seconds["cpu"]},
            {"who": "  of it all but the steps", "ms": 1e3 * seconds["no steps"]},
            {
                "who": "  one of 25 steps",
                "ms": 1e3 * step,
                "KB": moved / 1e3,
                "GB/s": moved / step / 1e9,
                "share of a 1 MB copy's": moved / step / ceiling,
            },
        ],
    )


def test_a_batch_of_eight(benchmark):
    photos = [photo(seed, 512 - 16 * seed, 683 - 40 * seed) for seed in range(8)]
    targets = Ragged.pack([torch.from_numpy(t) for t, _ in photos])
    images = Ragged.pack([torch.from_numpy(i) for _, i in photos])
    for soft, (target, image) in zip(nk.bilateral_solver(targets, images).grids(), photos, strict=True):
        np.testing.assert_allclose(soft.numpy(), reference.bilateral_solver(target, image, *SETTINGS), atol=1e-4)

    title = "bilateral_solver, batch of 8 photos, 400 x 403 to 512 x 683"
    report_two_threads(title, lambda: nk.bilateral_solver(targets, images), 8, benchmark, rounds=15, seconds=60)


def test_a_batch_of_64_on_a_gpu(benchmark):
    title = "bilateral_solver, batch of 64 photos, 400 x 403 to 512 x 683, GPU"
    needs_gpu(title)
    photos = [photo(seed, 512 - 16 * seed, 683 - 40 * seed) for seed in range(8)]
    targets = Ragged.pack([torch.from_numpy(t) for t, _ in photos] * 8)
    images = Ragged.pack([torch.from_numpy(i) for _, i in photos] * 8)
    on_gpu = [batch.with_rows(batch.rows.cuda()) for batch in (targets, images)]
    expected = nk.bilateral_solver(targets, images, backend="cpu").rows
    torch.testing.assert_close(nk.bilateral_solver(*on_gpu).rows.cpu(), expected, atol=1e-4, rtol=0)
    seconds = device_median(lambda: nk.bilateral_solver(*on_gpu))
    benchmark.pedantic(lambda: (nk.bilateral_solver(*on_gpu), torch.cuda.synchronize()), rounds=10)
    # Per pixel: 7 bytes read and 24 of the grid's written, some 40 to find its vertex, 8 to slice. Per vertex 25 steps,
    # and 10 rounds of bistochastization as 5.
    steps = sum(bytes_of_a_step(image)[1] for _, image in photos) * 8
    moved = 79 * len(targets.rows) + 30 * steps
    report(
        title,
        [
            {
                "who": "cuda",
                "ms": 1e3 * seconds,
                "ms a photo": 1e3 * seconds / 64,
                "MB": moved / 1e6,
                "GB/s": moved / seconds / 1e9,
                "share of a 1 GiB copy's": moved / seconds / device_copy_bandwidth(),
            }
        ],
    )
