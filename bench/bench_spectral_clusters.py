# SPDX-License-Identifier: MIT
"""spectral_clusters for k = 2, 3, 4, compared with torch.lobpcg or scipy's dense eigh and scikit-learn's k-means."""

import numpy as np
import pytest
import scipy.linalg
import torch

import namedmask_kernels as nk
from common import CHANNELS, Work, paired_medians, report, report_gpu, scene, threads

COUNTS = (2, 3, 4)
HEIGHT, WIDTH = 38, 50


def affinity(features):
    """Cosine similarities scaled to [0, 1], float32 [n, n]."""
    unit = torch.nn.functional.normalize(torch.from_numpy(features).flatten(0, 1), dim=1)
    products = unit @ unit.T
    least, most = products.aminmax()
    return (products - least) / (most - least)


def by_lobpcg(features):
    """The generalized problem in torch, as in SelfMask, which solves it for each k; here it is solved once for all."""
    a = affinity(features)
    d = a.sum(1)
    start = torch.from_numpy(np.random.default_rng(0).normal(size=(len(a), max(COUNTS))).astype(np.float32))
    return torch.lobpcg(d.diag() - a, B=d.diag(), X=start, largest=False, niter=100)[1].numpy()


def by_eigh(features):
    a = affinity(features).double().numpy()
    d = np.diag(a.sum(1))
    return scipy.linalg.eigh(d - a, d, subset_by_index=[0, max(COUNTS) - 1])[1]


def with_kmeans(embed, features):
    from sklearn.cluster import KMeans

    points = embed(features)
    return [KMeans(k, n_init=10, random_state=0).fit_predict(points[:, 1:k]) for k in COUNTS]


def agreement(a, b):
    """Fraction of tokens with equal labels, after mapping each label of b to the most frequent one of a."""
    a, b = np.ravel(a), np.ravel(b)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return table.max(0).sum() / len(a)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_single_image(benchmark, count, quick):
    features = scene(24, seed=1) if quick else np.ascontiguousarray(scene(60, seed=1)[:HEIGHT, :WIDTH])
    ours = nk.spectral_clusters(features, COUNTS)
    calls, absent = {"cpu": lambda: nk.spectral_clusters(features, COUNTS)}, []
    try:
        for method, embed in (("torch.lobpcg", by_lobpcg), ("scipy eigh", by_eigh)):
            method += " + scikit-learn's k-means"
            for column, labels in enumerate(with_kmeans(embed, features)):
                assert agreement(ours[..., column], labels) > 0.95, (method, COUNTS[column])
            calls[method] = lambda embed=embed: with_kmeans(embed, features)
    except ImportError as error:
        absent.append({"method": f"scikit-learn: absent ({error})"})
        calls |= {"torch.lobpcg alone": lambda: by_lobpcg(features), "scipy eigh alone": lambda: by_eigh(features)}
    tokens = torch.from_numpy(features).flatten(0, 1)
    calls["features x features', torch"] = lambda: tokens @ tokens.T
    with threads(count):
        seconds = paired_medians(calls, rounds=7, seconds=15, pause=0.2)
        benchmark.pedantic(calls["cpu"], rounds=5)
    rows = [{"method": method, "ms": 1e3 * s, "time / cpu's": s / seconds["cpu"]} for method, s in seconds.items()]
    report(f"spectral_clusters, k = 2, 3, 4, {len(tokens)} tokens, C = {CHANNELS}, {count} threads", rows + absent)


def test_batch_of_64_on_gpu(benchmark, quick):
    """The flops are those of the range of the cosines: three products of halves, of one half of the pairs."""
    images = np.stack([scene(60, seed)[:HEIGHT, :WIDTH] for seed in range(4)])
    images = torch.from_numpy(images).repeat(1 if quick else 16, 1, 1, 1)

    def by_lobpcg_on_gpu(rows):
        a = (unit := torch.nn.functional.normalize(rows, dim=1)) @ unit.T
        least, most = a.aminmax()
        d = (a := (a - least) / (most - least)).sum(1)
        start = torch.randn(len(a), max(COUNTS), device=a.device, generator=torch.Generator(a.device).manual_seed(0))
        return torch.lobpcg(d.diag() - a, B=d.diag(), X=start, largest=False, niter=100)[1]

    def calls():
        on_gpu, expected = images.cuda(), nk.spectral_clusters(images[:4], COUNTS)
        labels = nk.spectral_clusters(on_gpu, COUNTS)[:4].cpu()
        for column, _ in enumerate(COUNTS):
            assert agreement(expected[..., column], labels[..., column]) > 0.99
        work = Work(flops=3.0 * len(images) * (HEIGHT * WIDTH) ** 2 * CHANNELS)
        yield "cuda", lambda: nk.spectral_clusters(on_gpu, COUNTS), work
        yield "torch.lobpcg alone, one image at a time", lambda: [by_lobpcg_on_gpu(p) for p in on_gpu.flatten(1, 2)]

    report_gpu(f"spectral_clusters, k = 2, 3, 4, {len(images)} images of {HEIGHT * WIDTH} tokens, on a GPU", calls,
           len(images), benchmark)  # fmt: skip
