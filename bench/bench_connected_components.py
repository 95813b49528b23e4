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


def peers():
    """name -> f(mask) with 4-connectivity, labels alone and with areas and boxes; absent ones say why."""

    def scipy_stats(mask):
        labels, count = ndimage.label(mask)
        return labels, np.bincount(labels.ravel(), minlength=count + 1), ndimage.find_objects(labels)

    calls, absent = {"scipy.ndimage.label": ndimage.label, "  with areas, boxes": scipy_stats}, []
    try:
        import cc3d

        label = functools.partial(cc3d.connected_components, connectivity=4)
        calls["cc3d"] = lambda mask: label(mask.view(np.uint8))
        calls["  with statistics"] = lambda mask: cc3d.statistics(label(mask.view(np.uint8)), no_slice_conversion=True)
    except ImportError as error:
        absent.append({"who": f"cc3d: absent ({error})"})
    try:
        import cv2

        cv2.setNumThreads(1)
        calls["OpenCV"] = lambda mask: cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
        calls["  with stats"] = lambda mask: cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    except ImportError as error:
        absent.append({"who": f"OpenCV: absent ({error})"})
    return calls, absent


@pytest.mark.parametrize("kind", [blobs, maze])
def test_one_mask_after_another(benchmark, kind):
    """What a loop over files sees, and what a call alone does, whose code and memory others have pushed out of the
    caches. New labels, allocated and filled with one value, are the least that any contestant writes."""
    masks = [kind(np.random.default_rng(seed)) for seed in range(16)]
    for mask in masks:
        np.testing.assert_array_equal(nk.connected_components(mask).labels, ndimage.label(mask)[0])
    others, absent = peers()
    fill = {"labels allocated and filled": lambda mask: np.empty(mask.shape, np.int32).fill(1)}
    calls = {"cpu, with areas and boxes": nk.connected_components, **fill, **others}

    def in_turns(masks, rounds):
        """Median seconds a mask; each contestant has all masks, one after another, at its turn."""

        def row(call):
            for mask in masks:
                call(mask)

        taken = paired_medians({who: functools.partial(row, call) for who, call in calls.items()}, rounds=rounds)
        return {who: s / len(masks) for who, s in taken.items()}

    with one_thread():
        rows, alone = in_turns(masks, 15), in_turns(masks[:1], 60)
        tiny = in_turns([mask[:2, :2].copy() for mask in masks], 20)
        benchmark.pedantic(nk.connected_components, masks[:1], rounds=20, warmup_rounds=2)
        ceiling = copy_bandwidth(1 << 20)
    ours, first = next(iter(rows.values())), next(iter(alone.values()))
    table = [
        {
            "who": who,
            "us a mask": 1e6 * rows[who],
            "time / ours": rows[who] / ours,
            "us, one call": 1e6 * alone[who],
            "one call / ours": alone[who] / first,
            "us, 2 x 2": 1e6 * tiny[who],
        }
        for who in calls
    ]
    moved = masks[0].nbytes + 4 * masks[0].size  # the least: read the mask, write the labels
    table[0] |= {"GB/s": moved / ours / 1e9, "share of a 1 MB copy's": moved / ours / ceiling}
    report(
        f"connected_components, {SIZE} x {SIZE}, {kind.__name__}, 16 masks in a row at each turn, one core",
        table + absent,
    )


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
    """Batches one after another, as from a loop: OpenMP's second thread falls asleep while the other contestant is at
    its turn, and to wake it takes up to a quarter of a single batch's time."""
    masks = [kind(np.random.default_rng(seed)) for seed in range(32)]
    batches = [Ragged.pack([torch.from_numpy(mask) for mask in masks[i : i + 8]]) for i in range(0, len(masks), 8)]
    for batch in batches:
        for mask, labels in zip(batch.grids(), nk.connected_components(batch).labels.grids(), strict=True):
            np.testing.assert_array_equal(labels, ndimage.label(mask)[0])

    def label():
        for batch in batches:
            nk.connected_components(batch)

    with threads(2):
        seconds = paired_medians({f"{n} threads": on_threads(n, label) for n in (1, 2)}, rounds=40)
        benchmark.pedantic(label, rounds=10)
    report(
        f"connected_components, batches of 8 masks of {SIZE} x {SIZE}, {kind.__name__}, 4 in a row at each turn",
        [
            {
                "who": who,
                "us a batch": 1e6 * s / len(batches),
                "masks/s": len(masks) / s,
                "speedup": seconds["1 threads"] / s,
            }
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
