# SPDX-License-Identifier: MIT
"""spectral_clusters for k = 2, 3, 4 at once, beside torch.lobpcg or scipy's dense eigh with scikit-learn's k-means."""

import numpy as np
import pytest
import scipy.linalg
import torch

import namedmask_kernels as nk
from common import CHANNELS, on_gpu, paired_medians, report, scene, threads

COUNTS = (2, 3, 4)
HEIGHT, WIDTH = 38, 50


def affinity(features):
    """float32 [n, n]: cosines scaled to [0, 1]."""
    unit = torch.nn.functional.normalize(torch.from_numpy(features).flatten(0, 1), dim=1)
    products = unit @ unit.T
    least, most = products.aminmax()
    return (products - least) / (most - least)


def by_lobpcg(features):
    """The generalized problem in torch, as SelfMask's; once for each k there, once for all here."""
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
    """Share of tokens with equal labels once b's are renamed to those that they most often meet."""
    a, b = np.ravel(a), np.ravel(b)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return table.max(0).sum() / len(a)


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
def test_one_photo(benchmark, count):
    features = np.ascontiguousarray(scene(60, seed=1)[:HEIGHT, :WIDTH])
    ours = nk.spectral_clusters(features, COUNTS)
    calls, absent = {"cpu": lambda: nk.spectral_clusters(features, COUNTS)}, []
    try:
        for who, embed in (("torch.lobpcg", by_lobpcg), ("scipy eigh", by_eigh)):
            who += " + scikit-learn's k-means"
            for column, labels in enumerate(with_kmeans(embed, features)):
                assert agreement(ours[..., column], labels) > 0.95, (who, COUNTS[column])
            calls[who] = lambda embed=embed: with_kmeans(embed, features)
    except ImportError as error:
        absent.append({"who": f"scikit-learn: absent ({error})"})
        calls |= {"torch.lobpcg alone": lambda: by_lobpcg(features), "scipy eigh alone": lambda: by_eigh(features)}
    tokens = torch.from_numpy(features).flatten(0, 1)
    calls["features x features', torch"] = lambda: tokens @ tokens.T
    with threads(count):
        seconds = paired_medians(calls, rounds=7, seconds=15, pause=0.05)
        benchmark.pedantic(calls["cpu"], rounds=5)
    rows = [{"who": who, "ms": 1e3 * s, "times cpu's": s / seconds["cpu"]} for who, s in seconds.items()]
    report(f"spectral_clusters, k = 2, 3, 4, {HEIGHT * WIDTH} tokens, C = {CHANNELS}, {count} threads", rows + absent)


def test_a_batch_of_64_on_a_gpu(benchmark, quick):
    """No GPU has run this yet."""
    photos = np.stack([scene(60, seed)[:HEIGHT, :WIDTH] for seed in range(4)])
    photos = torch.from_numpy(photos).repeat(1 if quick else 16, 1, 1, 1)

    def by_lobpcg_there(rows):
        a = (unit := torch.nn.functional.normalize(rows, dim=1)) @ unit.T
        least, most = a.aminmax()
        d = (a := (a - least) / (most - least)).sum(1)
        start = torch.randn(len(a), max(COUNTS), device=a.device, generator=torch.Generator(a.device).manual_seed(0))
        return torch.lobpcg(d.diag() - a, B=d.diag(), X=start, largest=False, niter=100)[1]

    def calls():
        there, expected = photos.cuda(), nk.spectral_clusters(photos[:4], COUNTS)
        found = nk.spectral_clusters(there, COUNTS)[:4].cpu()
        for column, _ in enumerate(COUNTS):
            assert agreement(expected[..., column], found[..., column]) > 0.99
        yield "cuda", lambda: nk.spectral_clusters(there, COUNTS)
        yield "torch.lobpcg alone, photo after photo", lambda: [by_lobpcg_there(p) for p in there.flatten(1, 2)]

    on_gpu(f"spectral_clusters, k = 2, 3, 4, {len(photos)} photos of {HEIGHT * WIDTH} tokens, on a GPU", calls,
           len(photos), benchmark)  # fmt: skip
