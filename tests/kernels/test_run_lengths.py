# SPDX-License-Identifier: MIT
"""run_lengths against pycocotools, byte for byte, and against its reference where pycocotools is not installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.reference import run_lengths as reference

BACKENDS = ("cpu", "cuda", "reference")
SIZES = [(1, 1), (1, 9), (9, 1), (5, 7), (33, 64), (64, 65), (40, 129), (0, 4), (3, 0), (31, 200), (100, 31)]
PATTERNS = {
    "empty": lambda rng, h, w: np.zeros((h, w), bool),
    "full": lambda rng, h, w: np.ones((h, w), bool),
    "noise": lambda rng, h, w: rng.random((h, w)) < 0.5,
    "sparse": lambda rng, h, w: rng.random((h, w)) < 0.02,
    "blob": lambda rng, h, w: np.hypot(*np.mgrid[-h:h:2, -w:w:2]) < max(h, w) / 2,
    "columns": lambda rng, h, w: np.tile(np.arange(w) % 3 > 0, (h, 1)),
    "last": lambda rng, h, w: np.arange(h * w).reshape(h, w) == h * w - 1,
}


def masks_of(pattern):
    rng = np.random.default_rng(3)
    return [np.ascontiguousarray(PATTERNS[pattern](rng, h, w)) for h, w in SIZES]


def expect_equal(mask, lengths, area, box, string):
    np.testing.assert_array_equal(lengths, reference.run_lengths(mask))
    assert string == reference.compress_runs(reference.run_lengths(mask)) and area == mask.sum()
    y, x = np.nonzero(mask)
    assert list(box) == ([x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1] if len(x) else [0, 0, 0, 0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_batches_equal_the_definition(pattern, backend, device):
    masks = masks_of(pattern)
    batch = Ragged.pack([torch.from_numpy(mask) for mask in masks])
    runs = nk.run_lengths(Ragged(batch.rows.to(device), batch.offsets, batch.shapes), backend=backend)
    assert all(tensor.device.type == "cpu" for tensor in runs)
    offsets = runs.offsets.tolist()
    for b, (mask, string) in enumerate(zip(masks, runs.counts(), strict=True)):
        expect_equal(mask, runs.lengths[offsets[b] : offsets[b + 1]], runs.areas[b], runs.boxes[b].tolist(), string)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_pycocotools(pattern):
    coco = pytest.importorskip("pycocotools.mask")
    for mask in masks_of(pattern):
        expected = coco.encode(np.asfortranarray(mask.view(np.uint8)))
        runs = nk.run_lengths(mask)
        assert runs.counts() == [expected["counts"]] and runs.areas[0] == coco.area(expected)
        assert runs.boxes[0].tolist() == coco.toBbox(expected).tolist()
        if mask.size:
            np.testing.assert_array_equal(coco.decode({"size": list(mask.shape), "counts": runs.counts()[0]}), mask)


@settings(max_examples=60)
@given(h=st.integers(1, 80), w=st.integers(1, 200), share=st.sampled_from([0.01, 0.3, 0.9]), seed=st.integers(0, 99))
def test_any_size(h, w, share, seed):
    mask = np.random.default_rng(seed).random((h, w)) < share
    runs = nk.run_lengths(mask)
    expect_equal(mask, runs.lengths, runs.areas[0], runs.boxes[0], runs.counts()[0])


def test_long_runs_have_strings_of_several_groups():
    mask = np.zeros((2000, 3000), bool)
    mask[7, 5] = mask[100:1900, 2000] = True
    runs = nk.run_lengths(mask)
    assert runs.lengths.tolist() == [10007, 1, 2000 * 1995 + 93 - 1, 1800, 2000 * 999 + 100]
    expect_equal(mask, runs.lengths, runs.areas[0], runs.boxes[0], runs.counts()[0])


def test_more_images_than_one_launch(backend, device):
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(1 + b % 3, 1 + b % 5, generator=generator) > 0.5 for b in range(150)]
    batch = Ragged.pack(masks)
    runs = nk.run_lengths(Ragged(batch.rows.to(device), batch.offsets, batch.shapes), backend=backend)
    assert runs.counts() == [reference.compress_runs(reference.run_lengths(mask.numpy())) for mask in masks]


def test_empty_batch(backend, device):
    runs = nk.run_lengths(Ragged.of_shapes(torch.zeros(0, dtype=torch.bool, device=device), []), backend=backend)
    assert [len(array) for array in runs] == [0, 1, 0, 0, 0, 1] and runs.counts() == []


def test_offsets_of_compress_runs_are_checked():
    native = nk.backends.native()
    shapes, area, box, ends = np.array([[1, 1]], np.int32), *(np.empty(n, np.int32) for n in (1, (1, 4), 2))
    for first in ([0, 3], [1, 2], [0, -1], [0, 1]):
        with pytest.raises(ValueError, match="first must ascend from 0 to the number of lengths"):
            native.compress_runs(np.array([0, 1], np.int32), np.array(first, np.int32), shapes, area, box, ends)


def test_uint8_and_views():
    mask = (np.arange(60).reshape(6, 10) % 7 == 0).astype(np.uint8) * 255
    assert (
        nk.run_lengths(mask[::-1, ::2]).counts() == nk.run_lengths(np.ascontiguousarray(mask[::-1, ::2]) > 0).counts()
    )
