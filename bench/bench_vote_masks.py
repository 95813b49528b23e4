# SPDX-License-Identifier: MIT
"""vote_masks beside the same vote in torch and in numpy, on 27 candidates of a photo of 375 x 500."""

import numpy as np
import pytest
import torch

import namedmask_kernels as nk
from common import copy_bandwidth, paired_medians, report, threads

COUNT, HEIGHT, WIDTH = 27, 375, 500


def candidates(seed=0):
    """bool [27, 375, 500]: ellipses of one object, larger and smaller, whole bands, and their complements."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for _ in range(COUNT):
        (cy, cx), (ry, rx) = rng.uniform([150, 200], [220, 300]), rng.uniform(40, 190, 2)
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    masks[3::9] = [~mask for mask in masks[3::9]]
    return np.stack(masks)


def framing(masks):
    """Which masks [n, h, w] span the full height or width."""
    rows, columns = masks.any(2), masks.any(1)
    return (rows[:, 0] & rows[:, -1]) | (columns[:, 0] & columns[:, -1])


def torch_vote(masks):
    """The loop over pairs that one writes in torch, as SelfMask does."""
    kept = masks[~framing(masks)]
    scores = torch.stack([torch.stack([(a & b).sum() / ((a | b).sum() + 1e-7) for b in kept]).sum() for a in kept])
    return torch.nonzero(~framing(masks))[scores.argmax()].item()


def torch_product(masks):
    """All intersections from one float32 product of the masks as vectors."""
    index = torch.nonzero(~framing(masks)).squeeze(1)
    flat = masks[index].flatten(1).float()
    both = flat @ flat.T
    area = both.diagonal()
    return index[(both / (area[:, None] + area - both + 1e-7)).sum(1).argmax()].item()


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_one_photo(benchmark, count):
    masks = torch.from_numpy(candidates())
    ours = nk.vote_masks(masks)
    everyone = masks.clone()
    everyone[:, [0, -1]] = everyone[:, :, [0, -1]] = False  # nothing is dropped: the most pairs
    calls = {
        "cpu": lambda: nk.vote_masks(everyone),
        "torch, pair by pair": lambda: torch_vote(everyone),
        "torch, one float32 product": lambda: torch_product(everyone),
    }
    for masked, vote in ((masks, ours), (everyone, nk.vote_masks(everyone))):
        assert torch_vote(masked) == torch_product(masked) == vote.winner
    assert 5 < ours.kept.sum() < COUNT and nk.vote_masks(everyone).kept.all()
    with threads(count):
        seconds = paired_medians(calls, rounds=9, seconds=10)
        benchmark.pedantic(calls["cpu"], rounds=20, warmup_rounds=2)
        ceiling = copy_bandwidth(2 * masks.numel()) * count
    rows = [{"who": who, "ms": 1e3 * s, "times cpu's": s / seconds["cpu"]} for who, s in seconds.items()]
    read = masks.numel() / seconds["cpu"]
    rows[0] |= {"GB/s of masks": read / 1e9, "share of a copy's": read / ceiling}
    report(f"vote_masks, {COUNT} masks of {HEIGHT} x {WIDTH}, all voting, {count} threads", rows)
