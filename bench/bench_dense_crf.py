# SPDX-License-Identifier: MIT
"""dense_crf compared with pydensecrf2 (`pip install pydensecrf2`, imported as pydensecrf), with the same two terms.

`pytest bench/bench_dense_crf.py --benchmark-only -s` prints the tables.
"""

import importlib

import numpy as np
import pytest
import torch
from bench_bilateral_solver import make_image

import namedmask_kernels as nk
from common import (
    Work,
    copy_bandwidth,
    device_copy_bandwidth,
    device_median,
    paired_medians,
    report,
    report_two_threads,
    require_gpu,
    threads,
)
from namedmask_kernels import Ragged

ITERATIONS = 10
SMALL = 128, 170

try:
    densecrf = importlib.import_module("pydensecrf.densecrf")
    ABSENT = None
except ImportError as error:
    densecrf, ABSENT = None, f"absent: {error}"


def scene(labels, seed=0, h=512, w=683):
    """(probabilities float32 [h, w, labels], image): random scores in squares, and the mask as label 1."""
    mask, image = make_image(seed, h, w)
    rng = np.random.default_rng(seed)
    scores = 3 * rng.random((h // 16 + 1, w // 16 + 1, labels), np.float32)
    scores = scores.repeat(16, 0).repeat(16, 1)[:h, :w]
    scores[..., 1] += 3 * mask
    return torch.from_numpy(scores).softmax(-1).numpy(), image


def pydensecrf(probabilities, image):
    h, w, labels = probabilities.shape
    crf = densecrf.DenseCRF2D(w, h, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities.clip(1e-5, 1)).reshape(-1, labels).T))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    return np.array(crf.inference(ITERATIONS)).T.reshape(h, w, labels)


def cost(h, w, labels):
    """(floating-point operations, bytes) of a mean-field update, without the filters of the lattice and the grid.

    Per pixel and channel: 2 * 6 operations for each of slice and splat, 2 * 4 twice along the rows of the grid,
    2 * 4 / 2 twice across them, about 20 for a softmax. Bytes: 6 vertices and weights of 4 bytes each, and the unary.
    """
    channels = 1 if labels == 2 else (labels + 7) // 8 * 8
    return h * w * channels * (2 * 12 + 2 * 8 + 2 * 4 + 20), h * w * (6 * 8 + 4 * (1 if labels == 2 else labels))


@pytest.mark.parametrize("labels", [2, 21])
def test_single_image(benchmark, labels, quick):
    probabilities, image = scene(labels, 0, *SMALL) if quick else scene(labels)
    marginals = nk.dense_crf(probabilities, image)
    calls = {
        "cpu": lambda: nk.dense_crf(probabilities, image),
        "no updates": lambda: nk.dense_crf(probabilities, image, iterations=0),
    }
    if densecrf:
        expected = pydensecrf(probabilities, image)
        assert np.abs(marginals - expected).mean() < 2e-3
        assert (marginals.argmax(-1) == expected.argmax(-1)).mean() >= (0.998 if labels == 2 else 0.995)
        calls["pydensecrf2"] = lambda: pydensecrf(probabilities, image)
    with threads(1):
        seconds = paired_medians(calls, rounds=11, seconds=25)
        benchmark.pedantic(nk.dense_crf, (probabilities, image), rounds=5, warmup_rounds=1)
        operations, moved = cost(*image.shape[:2], labels)
        update = (seconds["cpu"] - seconds["no updates"]) / ITERATIONS
        ceiling = copy_bandwidth(2 * moved)
    peer = seconds.get("pydensecrf2")
    report(
        f"dense_crf, {image.shape[0]} x {image.shape[1]}, {labels} labels, {ITERATIONS} updates, one core",
        [
            {"method": "pydensecrf2", "ms": 1e3 * peer if peer else ABSENT, "ratio": 1.0},
            {"method": "cpu", "ms": 1e3 * seconds["cpu"], "ratio": peer / seconds["cpu"] if peer else ""},
            {"method": "  lattice, grid and unary", "ms": 1e3 * seconds["no updates"]},
            {
                "method": "  one update",
                "ms": 1e3 * update,
                "Gflop/s": operations / update / 1e9,
                "MB": moved / 1e6,
                "GB/s": moved / update / 1e9,
                "share of a copy's": moved / update / ceiling,
            },
        ],
    )


@pytest.mark.parametrize("labels", [2, 21])
def test_batch_of_8(benchmark, labels, quick):
    h, w = SMALL if quick else (512, 683)
    scenes = [scene(labels, seed, h - h // 32 * seed, w - w // 17 * seed) for seed in range(8)]
    batch = [Ragged.pack([torch.from_numpy(s[i]) for s in scenes]) for i in (0, 1)]

    def call():
        return nk.dense_crf(*batch)

    results = []
    for count in (1, 2):
        with threads(count):
            results.append(call().rows)
    assert torch.equal(*results)
    title = f"dense_crf, batch of 8 images up to {h} x {w}, {labels} labels"
    report_two_threads(title, call, 8, benchmark, rounds=9, seconds=20)


@pytest.mark.parametrize("labels", [2, 21])
def test_batch_of_64_on_gpu(benchmark, labels):
    title = f"dense_crf, batch of 64 images, 400 x 403 to 512 x 683, {labels} labels, {ITERATIONS} updates, GPU"
    require_gpu(title)
    scenes = [scene(labels, seed, 512 - 16 * seed, 683 - 40 * seed) for seed in range(8)]
    batch = [Ragged.pack([torch.from_numpy(s[i]) for s in scenes] * 8) for i in (0, 1)]
    on_gpu = [ragged.with_rows(ragged.rows.cuda()) for ragged in batch]
    expected, marginals = nk.dense_crf(*batch, backend="cpu").rows, nk.dense_crf(*on_gpu).rows.cpu()
    assert (marginals - expected).abs().mean() < 1e-3
    assert (marginals.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.998
    seconds = device_median(lambda: nk.dense_crf(*on_gpu))
    no_updates = device_median(lambda: nk.dense_crf(*on_gpu, iterations=0))
    benchmark.pedantic(lambda: (nk.dense_crf(*on_gpu), torch.cuda.synchronize()), rounds=5)
    # An update moves per pixel: 36 bytes of weights and vertices, 4 per label of the unary, and for each channel 22 of
    # marginals and grid. These images have 0.05 vertices per pixel, each with 68 bytes per channel (take_sums and 6
    # blurs) and 48 of neighbors, and 0.31 vertices of tiles per pixel, each with 12 per channel. Other reads come from
    # caches.
    channels = 1 if labels == 2 else (labels + 3) // 4 * 4
    moved = (39 + 4 * labels + 29 * channels) * len(batch[0].rows)
    update = (seconds - no_updates) / ITERATIONS
    report(
        title,
        [
            {"method": "cuda", "ms": 1e3 * seconds, "ms per image": 1e3 * seconds / 64},
            {"method": "  lattice, grid and unary", "ms": 1e3 * no_updates, "ms per image": 1e3 * no_updates / 64},
            {
                "method": "  one update",
                "ms": 1e3 * update,
                "ms per image": 1e3 * update / 64,
            }
            | Work(bytes=moved).rates(update),
            {"method": "ceiling: a copy of 1 GiB", "GB/s": device_copy_bandwidth() / 1e9},
        ],
    )
