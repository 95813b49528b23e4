# SPDX-License-Identifier: MIT
"""run_lengths compared with pycocotools, one mask at a time, as masks come: in row-major order."""

import numpy as np
import pytest
import torch

import namedmask_kernels as nk
from common import Work, blob_mask, compare, report_gpu
from namedmask_kernels import Ragged

SIZE = 480, 640
BATCH = 32


def masks_of(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "noise":
        return [rng.random(SIZE) < 0.5 for _ in range(BATCH)]
    return [blob_mask(*SIZE, rng) for _ in range(BATCH)]


def with_pycocotools(masks: list[np.ndarray]) -> list[tuple]:
    """String, area and box of each mask, as a mask record has them."""
    from pycocotools import mask as coco

    encoded = [coco.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    return [(rle["counts"], int(coco.area(rle)), coco.toBbox(rle).astype(int).tolist()) for rle in encoded]


def with_ours(masks) -> list[tuple]:
    runs = nk.run_lengths(masks)
    return list(zip(runs.counts(), runs.areas.tolist(), runs.boxes.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["blobs", "noise"])
@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
def test_batch(benchmark, kind, count):
    pytest.importorskip("pycocotools")
    masks = masks_of(kind)
    batch = Ragged.pack([torch.from_numpy(mask) for mask in masks])
    compare(
        f"run_lengths with areas and boxes, {BATCH} masks of {SIZE[0]} x {SIZE[1]}, {kind}, {count} threads",
        {"cpu": lambda: with_ours(batch), "pycocotools": lambda: with_pycocotools(masks)},
        benchmark,
        same=lambda ours, other: np.testing.assert_equal(ours, other),
        count=count,
        moved=batch.rows.nbytes,
    )


def starts_of_runs(masks):
    """[runs, 2]: mask and position, in columns, of equal masks [B, h, w]."""
    flat = masks.mT.flatten(1)
    return (flat[:, 1:] != flat[:, :-1]).nonzero()


@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_batch_on_gpu(benchmark, kind):
    """No GPU has run this yet."""
    batch = Ragged.pack([torch.from_numpy(mask) for mask in masks_of(kind)])

    def calls():
        on_gpu = batch.with_rows(batch.rows.cuda())
        assert nk.run_lengths(on_gpu).counts() == nk.run_lengths(batch).counts()
        work = Work(bytes=batch.rows.nbytes)
        yield "run_lengths", lambda: nk.run_lengths(on_gpu), work
        stacked = torch.stack(on_gpu.grids())
        yield "torch, only where runs begin", lambda: starts_of_runs(stacked), work

    report_gpu(f"run_lengths, {BATCH} masks of {SIZE[0]} x {SIZE[1]}, {kind}, on a GPU", calls, BATCH, benchmark)
