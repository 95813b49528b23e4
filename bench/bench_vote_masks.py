# SPDX-License-Identifier: MIT
"""vote_masks compared with implementations in torch, on 27 candidates of images of 375 x 500."""

import numpy as np
import pytest
import torch

import namedmask_kernels as nk
from common import Work, compare, report_gpu
from namedmask_kernels import Ragged

COUNT, HEIGHT, WIDTH = 27, 375, 500


def candidates(seed=0):
    """Ellipses of various sizes around one object, some of them inverted, bool [27, 375, 500]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for _ in range(COUNT):
        (cy, cx), (ry, rx) = rng.uniform([150, 200], [220, 300]), rng.uniform(40, 190, 2)
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    masks[3::9] = [~mask for mask in masks[3::9]]
    return np.stack(masks)


def framing(masks):
    """Which of the masks [n, h, w] span the full height or width, bool [n]."""
    rows, columns = masks.any(2), masks.any(1)
    return (rows[:, 0] & rows[:, -1]) | (columns[:, 0] & columns[:, -1])


def torch_vote(masks):
    """A loop over pairs, as in SelfMask."""
    kept = masks[~framing(masks)]
    scores = torch.stack([torch.stack([(a & b).sum() / ((a | b).sum() + 1e-7) for b in kept]).sum() for a in kept])
    return torch.nonzero(~framing(masks))[scores.argmax()].item()


def torch_product(masks):
    """All intersections by one float32 matrix product of the flattened masks."""
    index = torch.nonzero(~framing(masks)).squeeze(1)
    flat = masks[index].flatten(1).float()
    both = flat @ flat.T
    area = both.diagonal()
    return index[(both / (area[:, None] + area - both + 1e-7)).sum(1).argmax()].item()


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_single_image(benchmark, count):
    masks = torch.from_numpy(candidates())
    ours = nk.vote_masks(masks)
    unframed = masks.clone()
    unframed[:, [0, -1]] = unframed[:, :, [0, -1]] = False  # no mask is dropped: the largest number of pairs
    calls = {
        "cpu": lambda: nk.vote_masks(unframed),
        "torch, one pair at a time": lambda: torch_vote(unframed),
        "torch, one float32 product": lambda: torch_product(unframed),
    }
    assert torch_vote(masks) == torch_product(masks) == ours.winner
    assert 5 < ours.kept.sum() < COUNT and nk.vote_masks(unframed).kept.all()
    compare(
        f"vote_masks, {COUNT} masks of {HEIGHT} x {WIDTH}, all voting, {count} threads",
        calls,
        benchmark,
        same=lambda vote, winner: np.testing.assert_array_equal(vote.winner, winner),
        count=count,
        rounds=9,
        seconds=10,
        moved=masks.numel(),
    )


def test_batch_of_64_on_gpu(benchmark):
    """No GPU has run this yet."""
    images = [torch.from_numpy(candidates(seed)) for seed in range(8)] * 8
    batch = Ragged.pack([image.permute(1, 2, 0) for image in images])

    def calls():
        rows, planes = batch.with_rows(batch.rows.cuda()), torch.stack(images).cuda()
        expected = nk.vote_masks(batch)
        for masks in (rows, planes):
            assert all(torch.equal(x.cpu(), y) for x, y in zip(nk.vote_masks(masks), expected, strict=True))
        assert [torch_product(image) for image in planes] == expected.winner.tolist()
        work = Work(bytes=planes.numel())
        yield "rows P x n", lambda: nk.vote_masks(rows), work
        yield "masks n x h x w", lambda: nk.vote_masks(planes), work
        yield "torch, one float32 product", lambda: [torch_product(image) for image in planes], work

    report_gpu(f"vote_masks, 64 images, {COUNT} masks of {HEIGHT} x {WIDTH}, on a GPU", calls, 64, benchmark)
