# SPDX-License-Identifier: MIT
"""random_walk beside the dense torch expression and torch's fused attention, 20 masks over 3,600 tokens: time, memory.

`python bench/bench_random_walk.py ours|dense|attention` prints the growth of this process' peak memory during a call.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import namedmask_kernels as nk
from common import CHANNELS, forget_peak, on_gpu, paired_medians, report, resident, scene, threads
from namedmask_kernels.reference.random_walk import random_walk as definition

SIDE, MASKS, STEPS, SHARPNESS = 60, 20, 2, 10.0


def given():
    """masks float32 [60, 60, 20], features [60, 60, 384]"""
    masks = torch.rand(SIDE, SIDE, MASKS, generator=torch.Generator().manual_seed(0))
    return masks, torch.from_numpy(scene(SIDE))


def ours(masks, features):
    return nk.random_walk(masks, features, steps=STEPS, sharpness=SHARPNESS)


def dense(masks, features):
    """The transition matrix once, then products with it."""
    unit = F.normalize(features.flatten(0, 1), dim=1)
    transition = (SHARPNESS * (unit @ unit.T)).softmax(1)
    masks = masks.flatten(0, 1)
    for _ in range(STEPS):
        masks = transition @ masks
    return masks.unflatten(0, (SIDE, SIDE))


def attention(masks, features):
    """A step is attention with unit queries and keys: the fused kernel holds no matrix either."""
    unit = F.normalize(features.flatten(0, 1), dim=1)[None, None]
    masks = F.pad(masks.flatten(0, 1), (0, CHANNELS - MASKS))[None, None]  # the fused kernel wants equal widths
    for _ in range(STEPS):
        masks = F.scaled_dot_product_attention(unit, unit, masks, scale=SHARPNESS)
    return masks[0, 0, :, :MASKS].unflatten(0, (SIDE, SIDE))


CALLS = {"ours": ours, "dense": dense, "attention": attention}


def growth(who):
    """MiB by which a call raises the peak memory, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, who], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_one_photo(benchmark, count):
    masks, features = given()
    exact = definition(masks.flatten(0, 1).double(), features.flatten(0, 1).double(), STEPS, SHARPNESS)
    for call in CALLS.values():
        assert (call(masks, features).flatten(0, 1) - exact).abs().max() < 1e-5
    with threads(count):
        calls = {who: lambda call=call: call(masks, features) for who, call in CALLS.items()}
        seconds = paired_medians(calls, rounds=7, seconds=12)
        benchmark.pedantic(ours, (masks, features), rounds=3)
    memory = {who: growth(who) for who in CALLS}
    flops = STEPS * (SIDE * SIDE) ** 2 * (CHANNELS + 2 * MASKS)
    rows = [
        {
            "who": {"ours": "cpu", "dense": "torch, dense", "attention": "torch, fused attention"}[who],
            "ms": 1e3 * seconds[who],
            "times cpu's": seconds[who] / seconds["ours"],
            "MiB": memory[who],
            "times cpu's MiB": memory[who] / memory["ours"],
        }
        for who in CALLS
    ]
    rows[0]["GFLOP/s"] = flops / seconds["ours"] / 1e9
    report(f"random_walk, {SIDE * SIDE} tokens, {MASKS} masks, {STEPS} steps, {count} threads", rows)


def test_a_batch_of_64_on_a_gpu(benchmark, quick):
    """No GPU has run this yet."""
    masks, features = (torch.stack([x] * (4 if quick else 64)) for x in given())

    def calls():
        on_device = masks.cuda(), features.cuda()
        exact = ours(masks[0], features[0])
        for call in (ours, lambda m, f: dense(m[0], f[0])[None]):
            torch.testing.assert_close(call(*on_device)[0].cpu(), exact, rtol=0, atol=1e-5)
        yield "triton", lambda: ours(*on_device)
        yield "torch, dense", lambda: [dense(*photo) for photo in zip(*on_device, strict=True)]

    title = f"random_walk, {len(masks)} photos of {SIDE * SIDE} tokens, {MASKS} masks, {STEPS} steps, on a GPU"
    on_gpu(title, calls, len(masks), benchmark)


if __name__ == "__main__":
    arguments = given()
    small = arguments[0][:2, :2], arguments[1][:2, :2]
    nk.random_walk(*small)
    torch.rand(64, 64) @ torch.rand(64, 64)  # libraries are loaded, threads started
    forget_peak()
    before = resident()
    CALLS[sys.argv[1]](*arguments)
    print(resident() - before)
