# SPDX-License-Identifier: MIT
"""random_walk compared with dense torch and torch's fused attention: time and memory for 20 masks, 3,600 tokens.

`python bench/bench_random_walk.py ours|dense|attention` prints by how much a call raises the peak memory.
"""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import namedmask_kernels as nk
from common import (
    CHANNELS,
    Work,
    matrix_rate,
    paired_medians,
    report,
    report_gpu,
    reset_peak_memory,
    resident_memory,
    scene,
    threads,
)
from namedmask_kernels.reference.random_walk import random_walk as definition

SIDE, MASKS, STEPS, SHARPNESS = 60, 20, 2, 10.0


def inputs(side=SIDE):
    """masks float32 [side, side, 20], features float32 [side, side, 384]."""
    masks = torch.rand(side, side, MASKS, generator=torch.Generator().manual_seed(0))
    return masks, torch.from_numpy(scene(side))


def ours(masks, features):
    return nk.random_walk(masks, features, steps=STEPS, sharpness=SHARPNESS)


def dense(masks, features):
    """Computes the transition matrix, then multiplies by it."""
    unit = F.normalize(features.flatten(0, 1), dim=1)
    transition = (SHARPNESS * (unit @ unit.T)).softmax(1)
    masks = masks.flatten(0, 1)
    for _ in range(STEPS):
        masks = transition @ masks
    return masks.unflatten(0, features.shape[:2])


def attention(masks, features):
    """A step is attention with normalized queries and keys; the fused kernel does not store the matrix either."""
    unit = F.normalize(features.flatten(0, 1), dim=1)[None, None]
    masks = F.pad(masks.flatten(0, 1), (0, CHANNELS - MASKS))[None, None]  # the fused kernel requires equal dimensions
    for _ in range(STEPS):
        masks = F.scaled_dot_product_attention(unit, unit, masks, scale=SHARPNESS)
    return masks[0, 0, :, :MASKS].unflatten(0, features.shape[:2])


CALLS = {"ours": ours, "dense": dense, "attention": attention}


@functools.cache
def added_memory(method):
    """MiB by which a call raises the peak memory of a new process."""
    done = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_single_image(benchmark, count, quick):
    masks, features = inputs(24 if quick else SIDE)
    exact = definition(masks.flatten(0, 1).double(), features.flatten(0, 1).double(), STEPS, SHARPNESS)
    for call in CALLS.values():
        assert (call(masks, features).flatten(0, 1) - exact).abs().max() < 1e-5
    with threads(count):
        calls = {method: lambda call=call: call(masks, features) for method, call in CALLS.items()}
        seconds = paired_medians(calls, rounds=7, seconds=12)
        benchmark.pedantic(ours, (masks, features), rounds=3)
        ceiling = matrix_rate()
    memory = {method: added_memory(method) for method in CALLS}
    tokens = masks[..., 0].numel()
    flops = tokens**2 * (CHANNELS + STEPS * 2 * MASKS)
    rows = [
        {
            "method": {"ours": "cpu", "dense": "torch, dense", "attention": "torch, fused attention"}[method],
            "ms": 1e3 * seconds[method],
            "time / cpu's": seconds[method] / seconds["ours"],
            "MiB": memory[method],
            "MiB / cpu's": memory[method] / memory["ours"],
        }
        for method in CALLS
    ]
    rows[0] |= {"GFLOP/s": flops / seconds["ours"] / 1e9, "share of a product's": flops / seconds["ours"] / ceiling}
    title = f"random_walk, {tokens} tokens, {MASKS} masks, {STEPS} steps, {count} threads"
    report(title + "; flops counted: half of the cosines, which are symmetric, and all of the steps", rows)


def test_batch_of_64_on_gpu(benchmark, quick):
    """The flops of `triton` are three products of float16 for half of the cosines; the bytes, all weights in float32,
    written once and read in each step."""
    masks, features = (torch.stack([x] * (4 if quick else 64)) for x in inputs())

    def calls():
        on_device = masks.cuda(), features.cuda()
        exact = ours(masks[0], features[0])
        for call in (ours, lambda m, f: dense(m[0], f[0])[None]):
            torch.testing.assert_close(call(*on_device)[0].cpu(), exact, rtol=0, atol=1e-5)
        pairs = float(len(masks) * masks[0, ..., 0].numel() ** 2)
        yield "triton", lambda: ours(*on_device), Work(flops=3 * CHANNELS * pairs, bytes=4 * (1 + STEPS) * pairs)
        work = Work(flops=2 * (CHANNELS + STEPS * MASKS) * pairs, dtype=torch.float32)
        for method, peer in (("torch, dense", dense), ("torch, fused attention", attention)):
            call = lambda peer=peer: [peer(*image) for image in zip(*on_device, strict=True)]  # noqa: E731
            yield method, call, work

    title = f"random_walk, {len(masks)} images of {SIDE * SIDE} tokens, {MASKS} masks, {STEPS} steps, on a GPU"
    report_gpu(title, calls, len(masks), benchmark)


if __name__ == "__main__":
    arguments = inputs()
    small = arguments[0][:2, :2], arguments[1][:2, :2]
    nk.random_walk(*small)
    torch.rand(64, 64) @ torch.rand(64, 64)  # loads libraries and starts threads
    reset_peak_memory()
    before = resident_memory()
    CALLS[sys.argv[1]](*arguments)
    print(resident_memory() - before)
