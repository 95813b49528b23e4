# SPDX-License-Identifier: MIT
"""normalized_cut, from features to foreground, beside the eigensolvers that one would otherwise call.

`pytest bench/bench_normalized_cut.py --benchmark-only -s` prints the tables. TokenCut's dense eigh takes seconds at
3,600 tokens, so it is left out there unless NMK_BENCH_DENSE=1.
"""

import os

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import ndimage
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

import namedmask_kernels as nk
from common import CHANNELS, on_gpu, paired_medians, report, scene, threads


def affinity(features, dtype):
    unit = features.reshape(-1, CHANNELS)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return np.where(unit @ unit.T > 0.2, dtype(1), dtype(1e-5))


def dense(features):
    """As TokenCut: the generalized problem with dense float64 matrices."""
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
        {"who": who, "ms": 1e3 * s, "times cpu's": s / ours} for who, s in seconds.items() if who != "float32 product"
    ]
    rows[0] |= {"GFLOP/s": flops / ours / 1e9, "share of the product's": (flops / ours) / (2 * flops / product)}
    rows.append({"who": "features x features', torch", "ms": 1e3 * product, "GFLOP/s": 2 * flops / product / 1e9})
    report(title + "; flops counted: half of that product, which is symmetric", rows)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize("side", [28, 40, 60])
def test_one_photo(benchmark, side, count, quick):
    if quick and side > 40:
        pytest.skip("the large size")
    features = scene(side)
    n = side * side
    ours = nk.normalized_cut(features)
    assert ours.residual[0] <= 1e-8 and ours.foreground.any()
    calls = {"cpu": lambda: nk.normalized_cut(features)}
    for who, solve in peers(n).items():
        assert (foreground(solve, features) == ours.foreground).mean() > 0.998, who
        calls[who] = lambda solve=solve: foreground(solve, features)
    tokens = torch.from_numpy(features).flatten(0, 1)
    calls["float32 product"] = lambda: tokens @ tokens.T
    with threads(count):
        seconds = paired_medians(calls, rounds=9, seconds=40, pause=0.05)
        benchmark.pedantic(calls["cpu"], rounds=5)
    table(f"normalized_cut, {n} tokens, {ours.iterations[0]} iterations, {count} threads", seconds, n * n * CHANNELS)


def test_a_batch_of_32(benchmark, quick):
    photos = np.stack([scene(28, seed) for seed in range(4 if quick else 32)])
    ours = nk.normalized_cut(photos)
    calls = {"cpu": lambda: nk.normalized_cut(photos)}
    for who, solve in peers(784).items():
        found = np.stack([foreground(solve, photo) for photo in photos])
        assert (found == ours.foreground).mean() > 0.998, who
        calls[who] = lambda solve=solve: [foreground(solve, photo) for photo in photos]
    tokens = torch.from_numpy(photos).flatten(1, 2)
    calls["float32 product"] = lambda: tokens @ tokens.mT
    with threads(2):
        seconds = paired_medians(calls, rounds=5, seconds=60, pause=0.05)
        benchmark.pedantic(calls["cpu"], rounds=5)
    table(
        f"normalized_cut, a batch of {len(photos)} photos of 784 tokens, two threads",
        seconds,
        len(photos) * 784**2 * CHANNELS,
    )


@pytest.mark.parametrize("side", [28, 60])
def test_a_batch_of_64_on_a_gpu(benchmark, side, quick):
    """No GPU has run this yet. Aims: 0.15 ms a photo of 3,600 tokens, 0.02 ms of 784."""
    photos = torch.from_numpy(np.stack([scene(side, seed) for seed in range(4)]))
    photos = photos.repeat(1 if quick else 16, 1, 1, 1)

    def calls():
        from namedmask_kernels.triton import normalized_cut, normalized_rows

        there, expected = photos.cuda(), nk.normalized_cut(photos[:4])
        found = nk.normalized_cut(there)
        assert found.residual.max() <= 1e-8
        assert (found.foreground[:4].cpu() == expected.foreground).float().mean() > 0.999
        rows, offsets = there.flatten(0, 2), torch.arange(len(photos) + 1, dtype=torch.int32) * side * side
        unit = normalized_rows.normalized_rows(rows)
        half = unit.high.unflatten(0, (len(photos), -1))
        yield "cuda", lambda: nk.normalized_cut(there)
        yield "  unit vectors, two halves", lambda: normalized_rows.normalized_rows(rows)
        yield "  affinity as bits", lambda: normalized_cut.affinity_bits(unit, offsets, 0.2)
        yield "features x features', torch, float16", lambda: half @ half.mT

    on_gpu(f"normalized_cut, {len(photos)} photos of {side * side} tokens, on a GPU", calls, len(photos), benchmark)
