# SPDX-License-Identifier: MIT
"""normalized_cut, from features to foreground, compared with general eigensolvers.

`pytest bench/bench_normalized_cut.py --benchmark-only -s` prints the tables. TokenCut's dense eigh takes seconds for
3,600 tokens; it is omitted there unless NMK_BENCH_DENSE=1.
"""

import os

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import ndimage
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

import namedmask_kernels as nk
from common import CHANNELS, Work, paired_medians, report, report_gpu, scene, threads


def affinity(features, dtype):
    unit = features.reshape(-1, CHANNELS)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return np.where(unit @ unit.T > 0.2, dtype(1), dtype(1e-5))


def dense(features):
    """Like TokenCut: the generalized problem with dense float64 matrices."""
    a = affinity(features, np.float64)
    degrees = np.diag(a.sum(1))
    return scipy.linalg.eigh(degrees - a, degrees, subset_by_index=[1, 2])[1][:, 0]


def arpack(features):
    a = affinity(features, np.float32)
    root = np.sqrt(a.sum(1))
    a /= root[:, None]
    a /= root
    return eigsh(a, k=2, which="LA", tol=1e-4, v0=np.ones(len(a), np.float32))[1][:, 0] / root


def block(features):
    """LOBPCG with the first eigenvector as a constraint."""
    a = affinity(features, np.float32)
    root = np.sqrt(a.sum(1))
    start = np.random.default_rng(0).normal(size=(len(a), 2)).astype(np.float32)
    operator = LinearOperator(a.shape, matvec=lambda x: a @ (x.T / root).T.squeeze() / root, dtype=np.float32,
                              matmat=lambda x: a @ (x / root[:, None]) / root[:, None])  # fmt: skip
    return lobpcg(operator, start, Y=root[:, None], tol=1e-4, maxiter=100)[1][:, 0] / root


def foreground(solve, features):
    vector = solve(features)
    vector = vector * np.sign(vector[np.abs(vector).argmax()])
    labels = ndimage.label((vector > vector.mean()).reshape(features.shape[:2]))[0]
    return labels == labels.flat[vector.argmax()]


def peers(n):
    solvers = {"dense eigh, as TokenCut": dense, "ARPACK on float32": arpack, "LOBPCG on float32": block}
    if n > 1600 and not os.environ.get("NMK_BENCH_DENSE"):
        del solvers["dense eigh, as TokenCut"]
    return solvers


def table(title, seconds, flops):
    ours, product = seconds["cpu"], seconds["float32 product"]
    rows = [
        {"method": method, "ms": 1e3 * s, "time / cpu's": s / ours}
        for method, s in seconds.items()
        if method != "float32 product"
    ]
    rows[0] |= {"GFLOP/s": flops / ours / 1e9, "share of the product's": (flops / ours) / (2 * flops / product)}
    rows.append({"method": "features x features', torch", "ms": 1e3 * product, "GFLOP/s": 2 * flops / product / 1e9})
    report(title + "; flops counted: half of that product, which is symmetric", rows)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize("side", [28, 40, 60])
def test_single_image(benchmark, side, count, quick):
    if quick and side > 28:
        pytest.skip("large size")
    features = scene(side)
    n = side * side
    ours = nk.normalized_cut(features)
    assert ours.residual[0] <= 1e-8 and ours.foreground.any()
    calls = {"cpu": lambda: nk.normalized_cut(features)}
    for method, solve in peers(n).items():
        assert (foreground(solve, features) == ours.foreground).mean() > 0.998, method
        calls[method] = lambda solve=solve: foreground(solve, features)
    tokens = torch.from_numpy(features).flatten(0, 1)
    calls["float32 product"] = lambda: tokens @ tokens.T
    with threads(count):
        seconds = paired_medians(calls, rounds=9, seconds=40, pause=0.2)
        benchmark.pedantic(calls["cpu"], rounds=5)
    table(f"normalized_cut, {n} tokens, {ours.iterations[0]} iterations, {count} threads", seconds, n * n * CHANNELS)


def test_batch_of_32(benchmark, quick):
    images = np.stack([scene(28, seed) for seed in range(2 if quick else 32)])
    ours = nk.normalized_cut(images)
    calls = {"cpu": lambda: nk.normalized_cut(images)}
    for method, solve in peers(784).items():
        masks = np.stack([foreground(solve, image) for image in images])
        assert (masks == ours.foreground).mean() > 0.998, method
        calls[method] = lambda solve=solve: [foreground(solve, image) for image in images]
    tokens = torch.from_numpy(images).flatten(1, 2)
    calls["float32 product"] = lambda: tokens @ tokens.mT
    with threads(2):
        seconds = paired_medians(calls, rounds=5, seconds=60, pause=0.2)
        benchmark.pedantic(calls["cpu"], rounds=5)
    table(
        f"normalized_cut, batch of {len(images)} images of 784 tokens, two threads",
        seconds,
        len(images) * 784**2 * CHANNELS,
    )


def by_lobpcg_on_gpu(tokens):
    unit = torch.nn.functional.normalize(tokens, dim=1)
    a = torch.where(unit @ unit.T > 0.2, 1.0, 1e-5)
    d = a.sum(1)
    start = torch.randn(len(a), 2, device=a.device, generator=torch.Generator(a.device).manual_seed(0))
    return torch.lobpcg(d.diag() - a, B=d.diag(), X=start, largest=False, niter=100)[1]


@pytest.mark.parametrize("side", [28, 60])
def test_batch_of_64_on_gpu(benchmark, side, quick):
    images = torch.from_numpy(np.stack([scene(side, seed) for seed in range(4)]))
    images = images.repeat(1 if quick else 16, 1, 1, 1)

    def calls():
        from namedmask_kernels.triton import normalized_cut, normalized_rows

        on_gpu, expected = images.cuda(), nk.normalized_cut(images[:4])
        cut = nk.normalized_cut(on_gpu)
        assert cut.residual.max() <= 1e-8
        assert (cut.foreground[:4].cpu() == expected.foreground).float().mean() > 0.999
        rows, offsets = on_gpu.flatten(0, 2), torch.arange(len(images) + 1, dtype=torch.int32) * side * side
        unit = normalized_rows.normalized_rows(rows)
        half = unit.high.unflatten(0, (len(images), -1))
        n = side * side
        product = 2.0 * n * n * CHANNELS  # of one image
        halves = Work(flops=1.5 * product * len(images))  # three products of one half of the pairs
        yield "cuda", lambda: nk.normalized_cut(on_gpu), halves
        both = Work(bytes=(8 * CHANNELS + 1) * n * len(images))
        yield "  normalized rows, as two halves", lambda: normalized_rows.normalized_rows(rows), both
        yield "  affinity as bits", lambda: normalized_cut.affinity_bits(unit, offsets, 0.2), halves
        yield "cuda, one image", lambda: nk.normalized_cut(on_gpu[0]), Work(flops=1.5 * product, images=1)
        one_product = Work(flops=product * len(images))
        yield "features x features', torch, float16", lambda: half @ half.mT, one_product
        yield "torch.lobpcg alone, one image", lambda: by_lobpcg_on_gpu(on_gpu[0].flatten(0, 1)), Work(images=1)

    report_gpu(f"normalized_cut, {len(images)} images of {side * side} tokens, on a GPU", calls, len(images), benchmark)
