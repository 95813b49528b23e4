# SPDX-License-Identifier: MIT
"""connected_components beside scipy.ndimage, cc3d and OpenCV, on blobs and a thin maze; hole filling beside scipy."""

import numpy as np
import pytest
from scipy import ndimage

import namedmask_kernels as nk
from common import copy_bandwidth, one_thread, paired_medians, report

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
    """name -> a call that labels the mask with 4-connectivity; absent ones say why."""
    calls, absent = {"scipy.ndimage.label": lambda: ndimage.label(mask)}, []
    image = mask.astype(np.uint8)
    try:
        import cc3d

        calls["cc3d"] = lambda: cc3d.connected_components(image, connectivity=4)
    except ImportError as error:
        absent.append({"who": f"cc3d: absent ({error})"})
    try:
        import cv2

        cv2.setNumThreads(1)
        calls["OpenCV"] = lambda: cv2.connectedComponents(image, connectivity=4)
    except ImportError as error:
        absent.append({"who": f"OpenCV: absent ({error})"})
    return calls, absent


@pytest.mark.parametrize("kind", [blobs, maze])
def test_one_mask(benchmark, kind):
    mask = kind(np.random.default_rng(0))
    np.testing.assert_array_equal(nk.connected_components(mask).labels, ndimage.label(mask)[0])
    calls, absent = peers(mask)
    with one_thread():
        seconds = paired_medians(
            {"cpu, with areas and boxes": lambda: nk.connected_components(mask), **calls}, rounds=60
        )
        benchmark.pedantic(nk.connected_components, (mask,), rounds=20, warmup_rounds=2)
        ours = seconds["cpu, with areas and boxes"]
        moved = mask.nbytes + 2 * 4 * mask.size  # read the mask, write the labels, read them for areas and boxes
        ceiling = copy_bandwidth(1 << 21)
    rows = [{"who": who, "us": 1e6 * s, "time / ours": s / ours} for who, s in seconds.items()]
    rows[0] |= {"GB/s": moved / ours / 1e9, "share of a 2 MB copy's": moved / ours / ceiling}
    report(f"connected_components, {SIZE} x {SIZE}, {kind.__name__}, one core", rows + absent)


def test_fill_holes(benchmark):
    mask = maze(np.random.default_rng(0))
    np.testing.assert_array_equal(nk.fill_holes(mask), ndimage.binary_fill_holes(mask))
    calls = {"cpu": lambda: nk.fill_holes(mask), "scipy.ndimage": lambda: ndimage.binary_fill_holes(mask)}
    with one_thread():
        seconds = paired_medians(calls, rounds=30)
        benchmark.pedantic(nk.fill_holes, (mask,), rounds=20, warmup_rounds=2)
    report(
        f"fill_holes, {SIZE} x {SIZE}, maze, one core",
        [{"who": who, "us": 1e6 * s, "time / ours": s / seconds["cpu"]} for who, s in seconds.items()],
    )
