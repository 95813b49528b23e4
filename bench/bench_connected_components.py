# SPDX-License-Identifier: MIT
"""connected_components beside scipy.ndimage, cc3d and OpenCV, on blobs and a thin maze; its siblings beside scipy.

Ours always gives areas and boxes too; peers are timed for labels alone and for as much as ours gives.
"""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage

import namedmask_kernels as nk
from common import copy_bandwidth, on_gpu, on_threads, one_thread, paired_medians, report, threads
from namedmask_kernels import Ragged

SIZE = 480


def blobs(rng):
    noise = ndimage.gaussian_filter(rng.random((SIZE, SIZE)), 6)
    return noise > np.median(noise)


def maze(rng):
    """Corridors one pixel wide: as many short runs and late unions as a mask of this size can have."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[::2, ::2] = True
    mask[1::2, ::2] = rng.random((SIZE // 2, SIZE // 2)) < 0.5
    mask[::2, 1::2] = rng.random((SIZE // 2, SIZE // 2)) < 0.5
    return mask


def peers(mask):
    """name -> a call on the mask with 4-connectivity, labels alone and with areas and boxes; absent ones say why."""

    def scipy_stats():
        labels, count = ndimage.label(mask)
        return labels, np.bincount(labels.ravel(), minlength=count + 1), ndimage.find_objects(labels)

    calls, absent = {"scipy.ndimage.label": lambda: ndimage.label(mask), "  with areas, boxes": scipy_stats}, []
    image = mask.astype(np.uint8)
    try:
        import cc3d

        label = functools.partial(cc3d.connected_components, image, connectivity=4)
        calls["cc3d"] = label
        calls["  with statistics"] = lambda: cc3d.statistics(label(), no_slice_conversion=True)
    except ImportError as error:
        absent.append({"who": f"cc3d: absent ({error})"})
    try:
        import cv2

        cv2.setNumThreads(1)
        calls["OpenCV"] = lambda: cv2.connectedComponents(image, connectivity=4)
        calls["  with stats"] = lambda: cv2.connectedComponentsWithStats(image, connectivity=4)
    except ImportError as error:
        absent.append({"who": f"OpenCV: absent ({error})"})
    return calls, absent


@pytest.mark.parametrize("kind", [blobs, maze])
def test_one_mask(benchmark, kind):
    mask = kind(np.random.default_rng(0))
    tiny = mask[:2, :2].copy()
    np.testing.assert_array_equal(nk.connected_components(mask).labels, ndimage.label(mask)[0])
    calls, absent = peers(mask)
    with one_thread():
        seconds = paired_medians(
            {
                "cpu, with areas and boxes": lambda: nk.connected_components(mask),
                "  of it the call alone": lambda: nk.connected_components(tiny),
                **calls,
            },
            rounds=60,
        )
        benchmark.pedantic(nk.connected_components, (mask,), rounds=20, warmup_rounds=2)
        ours = seconds["cpu, with areas and boxes"]
        moved = mask.nbytes + 4 * mask.size  # the least: read the mask, write the labels
        ceiling = copy_bandwidth(1 << 20)
    rows = [{"who": who, "us": 1e6 * s, "time / ours": s / ours} for who, s in seconds.items()]
    rows[0] |= {"GB/s": moved / ours / 1e9, "share of a 1 MB copy's": moved / ours / ceiling}
    report(f"connected_components, {SIZE} x {SIZE}, {kind.__name__}, one core", rows + absent)


def largest_by_scipy(mask):
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return labels == areas.argmax()


@pytest.mark.parametrize("kind", [blobs, maze])
def test_largest_component_and_fill_holes(benchmark, kind):
    mask = kind(np.random.default_rng(0))
    pairs = [(nk.largest_component, largest_by_scipy), (nk.fill_holes, ndimage.binary_fill_holes)]
    rows = []
    for ours, peer in pairs:
        np.testing.assert_array_equal(ours(mask), peer(mask))
        with one_thread():
            seconds = paired_medians({"cpu": lambda f=ours: f(mask), "scipy": lambda f=peer: f(mask)}, rounds=30)
        rows.append(
            {"operator": ours.__name__, "us": 1e6 * seconds["cpu"], "scipy.ndimage us": 1e6 * seconds["scipy"]}
            | {"time / ours": seconds["scipy"] / seconds["cpu"]}
        )
    with one_thread():
        benchmark.pedantic(nk.fill_holes, (mask,), rounds=20, warmup_rounds=2)
    report(f"largest_component and fill_holes, {SIZE} x {SIZE}, {kind.__name__}, one core", rows)


@pytest.mark.parametrize("kind", [blobs, maze])
def test_a_batch_of_eight(benchmark, kind):
    masks = [kind(np.random.default_rng(seed)) for seed in range(8)]
    batch = Ragged.pack([torch.from_numpy(mask) for mask in masks])
    for mask, labels in zip(masks, nk.connected_components(batch).labels.grids(), strict=True):
        np.testing.assert_array_equal(labels, ndimage.label(mask)[0])

    def label():
        nk.connected_components(batch)

    with threads(2):
        seconds = paired_medians({f"{n} threads": on_threads(n, label) for n in (1, 2)}, rounds=40)
        benchmark.pedantic(label, rounds=10)
    report(
        f"connected_components, batch of 8 masks of {SIZE} x {SIZE}, {kind.__name__}",
        [
            {"who": who, "us": 1e6 * s, "masks/s": 8 / s, "speedup": seconds["1 threads"] / s}
            for who, s in seconds.items()
        ],
    )


@pytest.mark.parametrize("kind", [blobs, maze])
def test_a_batch_of_64_on_a_gpu(benchmark, kind):
    """No GPU has run this yet."""
    batch = Ragged.pack([torch.from_numpy(kind(np.random.default_rng(seed))) for seed in range(8)] * 8)
    operators = nk.connected_components, nk.largest_component, nk.fill_holes

    def calls():
        there = batch.with_rows(batch.rows.cuda())
        assert torch.equal(nk.connected_components(there).labels.rows.cpu(), nk.connected_components(batch).labels.rows)
        for operator in operators[1:]:
            assert torch.equal(operator(there).rows.cpu(), operator(batch).rows)
        yield from ((operator.__name__, functools.partial(operator, there)) for operator in operators)

    on_gpu(f"components, 64 masks of {SIZE} x {SIZE}, {kind.__name__}, on a GPU", calls, 64, benchmark)
