# SPDX-License-Identifier: MIT
"""pamr compared with torch's unfold: all neighbors are unfolded, multiplied by the weights and summed.

`pytest bench/bench_pamr.py --benchmark-only -s` prints the tables. We know of no other implementation for the CPU.
"""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import namedmask_kernels as nk
from common import Work, paired_medians, report, report_gpu, report_two_threads, resident_memory, threads
from namedmask_kernels import Ragged

DILATIONS = (1, 2, 4, 8, 12, 24)
NEIGHBORS = 8 * len(DILATIONS)


def unfolded(x: Tensor) -> Tensor:
    """[C, H, W] -> the 3 x 3 windows of every dilation, [C, dilations, 9, H, W]."""
    windows = [F.unfold(F.pad(x[None], (d, d, d, d), "replicate"), 3, dilation=d) for d in DILATIONS]
    return torch.stack(windows, 1).reshape(len(DILATIONS), x.shape[0], 9, *x.shape[1:]).transpose(0, 1)


def torch_pamr(masks: Tensor, image: Tensor, iterations: int = 10) -> Tensor:
    """masks float32 [H, W, L], image uint8 [H, W, 3] -> refined masks float32 [H, W, L]."""
    neighbors = [0, 1, 2, 3, 5, 6, 7, 8]
    colors = image.permute(2, 0, 1).float() / 255
    windows = unfolded(colors)
    spread = windows.flatten(1, 2).std(1)[:, None, None]
    weights = -(windows[:, :, neighbors] - colors[:, None, None]).abs() / (1e-8 + 0.1 * spread)
    weights = weights.mean(0).flatten(0, 1).softmax(0)  # [48, H, W]
    refined = masks.permute(2, 0, 1)
    for _ in range(iterations):
        refined = (unfolded(refined)[:, :, neighbors].flatten(1, 2) * weights).sum(1)
    return refined.permute(1, 2, 0)


def make_image(h=375, w=500, labels=21, seed=0):
    """(masks that sum to 1, image of uniform regions in slowly varying light, with noise)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / h
    image = (150 + 60 * np.sin(2 * x + y))[..., None] * [0.95, 1.0, 1.08]
    for _ in range(12):
        cy, cx, radius = rng.uniform([0, 0, 0.05], [1, w / h, 0.3])
        image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.uniform(30, 220, 3)
    image += rng.normal(0, 5, (h, w, 3))
    masks = torch.from_numpy(rng.random((h, w, labels), np.float32) ** 4)
    return masks / masks.sum(-1, keepdim=True), torch.from_numpy(image.clip(0, 255).astype(np.uint8))


@functools.cache
def peak_memory(method: str, labels: int) -> float:
    """Peak memory that one call adds in a new process, in MiB."""
    command = [sys.executable, __file__, method, str(labels)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.parametrize("labels", [1, 2, 21])
def test_single_image(benchmark, labels, quick):
    masks, image = make_image(*((60, 80) if quick else (375, 500)), labels)
    torch.testing.assert_close(nk.pamr(masks, image), torch_pamr(masks, image), rtol=0, atol=5e-5)
    a = torch.randn(1024, 1024)
    calls = {
        "cpu": lambda: nk.pamr(masks, image),
        "no iterations": lambda: nk.pamr(masks, image, iterations=0),
        "float32 product 1024^3": lambda: a @ a,
        "torch, unfolded": lambda: torch_pamr(masks, image),
    }
    with threads(1):
        seconds = paired_medians(calls, rounds=5, seconds=60)
        benchmark.pedantic(nk.pamr, (masks, image), rounds=5)
    ceiling = 2 * 1024**3 / seconds["float32 product 1024^3"]
    flops = 2.0 * NEIGHBORS * masks.numel() * 10
    iterating = seconds["cpu"] - seconds["no iterations"]
    memory = {method: peak_memory(method, 2 if quick else labels) for method in ("cpu", "torch, unfolded")}
    rows = [
        {
            "method": method,
            "ms": 1e3 * seconds[method],
            "time / cpu's": seconds[method] / seconds["cpu"],
            "peak MiB": memory[method],
        }
        for method in ("torch, unfolded", "cpu")
    ]
    rows += [
        {"method": "  weights, and masks in and out", "ms": 1e3 * seconds["no iterations"]},
        {"method": "  10 iterations", "ms": 1e3 * iterating, "GFLOP/s": flops / iterating / 1e9,
         "share of the ceiling": flops / iterating / ceiling, "GB/s of weights": 20 * masks[..., 0].numel() *
         NEIGHBORS / iterating / 1e9},
        {"method": "  10 iterations at the ceiling, torch's float32 product", "ms": 1e3 * flops / ceiling,
         "GFLOP/s": ceiling / 1e9},
    ]  # fmt: skip
    report(f"pamr, {'x'.join(map(str, image.shape[:2]))}, {labels} labels, 10 iterations, one core", rows)


def test_batch_of_8(benchmark, quick):
    pairs = [make_image(60 if quick else 375 - 16 * s, 80 if quick else 500 - 30 * s, 2, s) for s in range(8)]
    masks, images = Ragged.pack([m for m, _ in pairs]), Ragged.pack([i for _, i in pairs])
    for refined, (mask, image) in zip(nk.pamr(masks, images).grids(), pairs, strict=True):
        assert torch.equal(refined, nk.pamr(mask, image))

    title = "pamr, batch of 8 images, 263 x 290 to 375 x 500, 2 labels"
    report_two_threads(title, lambda: nk.pamr(masks, images), 8, benchmark, rounds=15, seconds=60)


@pytest.mark.parametrize("labels", [2, 21])
def test_batch_of_16_on_gpu(benchmark, labels, quick):
    """The bytes are those of the weights, and of the masks once in and once out, per iteration."""
    masks, image = make_image(*((60, 80) if quick else (375, 500)), labels)
    batch = [Ragged.pack([x] * 16) for x in (masks, image)]

    def calls():
        on_gpu, single = [x.with_rows(x.rows.cuda()) for x in batch], (masks.cuda(), image.cuda())
        expected = nk.pamr(masks, image)
        for call in (nk.pamr, torch_pamr):
            torch.testing.assert_close(call(*single).cpu(), expected, rtol=0, atol=5e-5)
        pixels = len(batch[0].rows)
        moved = pixels * (10.0 * (2 * NEIGHBORS + 8 * labels) + 3 + 2 * NEIGHBORS)
        work = Work(bytes=moved, flops=20.0 * NEIGHBORS * labels * pixels, dtype=torch.float32)
        yield "triton", lambda: nk.pamr(*on_gpu), work
        yield "torch, unfolded", lambda: [torch_pamr(*single) for _ in range(16)], work

    size = "x".join(map(str, image.shape[:2]))
    report_gpu(f"pamr, 16 images of {size}, {labels} labels, 10 iterations, on a GPU", calls, 16, benchmark)


if __name__ == "__main__":  # the process that peak_memory starts
    torch.set_num_threads(1)
    masks, image = make_image(labels=int(sys.argv[2]))
    call = nk.pamr if sys.argv[1] == "cpu" else torch_pamr
    call(masks[:3, :3], image[:3, :3])  # loads libraries
    before = resident_memory()
    call(masks, image)
    print(resident_memory() - before)
