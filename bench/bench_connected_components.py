# SPDX-License-Identifier: MIT
"""connected_components compared with scipy.ndimage, cc3d and OpenCV; largest_component and fill_holes with scipy.

The masks are blobs or a maze. Our labels include areas and boxes; peers are timed for labels only and with statistics.
"""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage

import namedmask_kernels as nk
from common import Work, blob_mask, copy_bandwidth, on_threads, paired_medians, report, report_gpu, threads
from namedmask_kernels import Ragged

SIZE = 480


def blobs(rng):
    return blob_mask(SIZE, SIZE, rng)


def maze(rng):
    """Corridors one pixel wide: the maximum number of short runs and late unions for this size."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[::2, ::2] = True
    mask[1::2, ::2] = rng.random((SIZE // 2, SIZE // 2)) < 0.5
    mask[::2, 1::2] = rng.random((SIZE // 2, SIZE // 2)) < 0.5
    return mask


def peers():
    """Functions of a mask by name, with 4-connectivity, and rows for packages that are not installed."""

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
        absent.append({"method": f"cc3d: absent ({error})"})
    try:
        import cv2

        calls["OpenCV"] = lambda mask: cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
        calls["  with stats"] = lambda mask: cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    except ImportError as error:
        absent.append({"method": f"OpenCV: absent ({error})"})
    return calls, absent


@pytest.mark.parametrize("pattern", [blobs, maze])
def test_single_masks(benchmark, pattern):
    """Times consecutive calls, as in a loop over files, and single calls.

    Before a single call, the other methods evict its code and data from the caches. Allocating and filling the labels
    is the lower bound for every method.
    """
    masks = [pattern(np.random.default_rng(seed)) for seed in range(16)]
    for mask in masks:
        np.testing.assert_array_equal(nk.connected_components(mask).labels, ndimage.label(mask)[0])
    others, absent = peers()
    fill = {"labels allocated and filled": lambda mask: np.empty(mask.shape, np.int32).fill(1)}
    calls = {"cpu, with areas and boxes": nk.connected_components, **fill, **others}

    def time_calls(masks, rounds):
        """Median seconds per mask; in every round, each method processes all masks."""

        def process(call):
            for mask in masks:
                call(mask)

        medians = paired_medians({m: functools.partial(process, call) for m, call in calls.items()}, rounds=rounds)
        return {method: s / len(masks) for method, s in medians.items()}

    with threads(1):
        consecutive, single = time_calls(masks, 15), time_calls(masks[:1], 60)
        tiny = time_calls([mask[:2, :2].copy() for mask in masks], 20)
        benchmark.pedantic(nk.connected_components, masks[:1], rounds=20, warmup_rounds=2)
        ceiling = copy_bandwidth(1 << 20)
    ours, ours_single = next(iter(consecutive.values())), next(iter(single.values()))
    table = [
        {
            "method": method,
            "us per mask": 1e6 * consecutive[method],
            "time / ours": consecutive[method] / ours,
            "us, one call": 1e6 * single[method],
            "one call / ours": single[method] / ours_single,
            "us, 2 x 2": 1e6 * tiny[method],
        }
        for method in calls
    ]
    moved = masks[0].nbytes + 4 * masks[0].size  # minimum: read the mask, write the labels
    table[0] |= {"GB/s": moved / ours / 1e9, "share of a 1 MB copy's": moved / ours / ceiling}
    report(
        f"connected_components, {SIZE} x {SIZE}, {pattern.__name__}, 16 consecutive masks per round, one core",
        table + absent,
    )


def largest_by_scipy(mask):
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return labels == areas.argmax()


@pytest.mark.parametrize("pattern", [blobs, maze])
def test_largest_component_and_fill_holes(benchmark, pattern):
    mask = pattern(np.random.default_rng(0))
    pairs = [(nk.largest_component, largest_by_scipy), (nk.fill_holes, ndimage.binary_fill_holes)]
    rows = []
    for ours, peer in pairs:
        np.testing.assert_array_equal(ours(mask), peer(mask))
        with threads(1):
            seconds = paired_medians({"cpu": lambda f=ours: f(mask), "scipy": lambda f=peer: f(mask)}, rounds=30)
        rows.append(
            {"operator": ours.__name__, "us": 1e6 * seconds["cpu"], "scipy.ndimage us": 1e6 * seconds["scipy"]}
            | {"time / ours": seconds["scipy"] / seconds["cpu"]}
        )
    with threads(1):
        benchmark.pedantic(nk.fill_holes, (mask,), rounds=20, warmup_rounds=2)
    report(f"largest_component and fill_holes, {SIZE} x {SIZE}, {pattern.__name__}, one core", rows)


@pytest.mark.parametrize("pattern", [blobs, maze])
def test_batch_of_8(benchmark, pattern):
    """Times consecutive batches.

    OpenMP's second thread sleeps while the other variant runs, and waking it takes up to a quarter of the time of a
    single batch.
    """
    masks = [pattern(np.random.default_rng(seed)) for seed in range(32)]
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
        f"connected_components, batches of 8 masks of {SIZE} x {SIZE}, {pattern.__name__}, 4 batches per round",
        [
            {
                "method": method,
                "us per batch": 1e6 * s / len(batches),
                "masks/s": len(masks) / s,
                "speedup": seconds["1 threads"] / s,
            }
            for method, s in seconds.items()
        ],
    )


def cupy_labels(masks):
    """Labels by cupy, one mask at a time: (name, call), or None where it is not installed."""
    method = "cupyx.scipy.ndimage.label, one mask at a time"
    try:
        import cupy
        from cupyx.scipy import ndimage as cupy_ndimage
    except ImportError:
        return method, None
    arrays = [cupy.from_dlpack(mask.byte()) for mask in masks]
    return method, lambda: [cupy_ndimage.label(array) for array in arrays]


@pytest.mark.parametrize("pattern", [blobs, maze])
def test_batch_of_64_on_gpu(benchmark, pattern):
    """The bytes are those of the masks, and of labels or masks."""
    batch = Ragged.pack([torch.from_numpy(pattern(np.random.default_rng(seed))) for seed in range(8)] * 8)
    operators = nk.connected_components, nk.largest_component, nk.fill_holes

    def calls():
        on_gpu = batch.with_rows(batch.rows.cuda())
        labels, expected = nk.connected_components(on_gpu).labels, nk.connected_components(batch).labels
        assert torch.equal(labels.rows.cpu(), expected.rows)
        for operator in operators[1:]:
            assert torch.equal(operator(on_gpu).rows.cpu(), operator(batch).rows)
        for operator, bytes_per_pixel in zip(operators, (5, 2, 2), strict=True):
            work = Work(bytes=bytes_per_pixel * len(on_gpu.rows))
            yield operator.__name__, functools.partial(operator, on_gpu), work
        yield cupy_labels(on_gpu.grids())

    report_gpu(f"components, 64 masks of {SIZE} x {SIZE}, {pattern.__name__}, on a GPU", calls, 64, benchmark)
