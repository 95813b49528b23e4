# SPDX-License-Identifier: MIT
"""SelfMask's spectral clustering: the tokens of a photo in k groups, for several k from one eigenproblem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, expect_rows
from .reference import spectral_clusters as reference

NAME = "spectral_clusters"


def spectral_clusters(
    features: Ragged | Array, k: int | Sequence[int], *, seed: int = 0, backend: str = "auto"
) -> Ragged | Array:
    """Groups the tokens of each photo into k clusters.

    The affinity A holds the cosines of all pairs of tokens, scaled so that the photo's least is 0 and its largest 1; D
    is diagonal with A's row sums. The clusters are those of k-means on the generalized eigenvectors v_2, ..., v_k of
    (D - A) v = lambda D v with the smallest eigenvalues after the constant one, v' D v = 1.

    features: floating point grid [h, w, C], equal grids [B, h, w, C], or Ragged rows [T, C]; computed in float32.
              Numpy in, numpy out.
    k:        number of clusters, 1 to 64; or several such numbers, which share the one eigenproblem.
    seed:     of k-means++; 10 runs are made and that of the least squared distances is kept.
    Returns:  int32 labels arranged like the features without C: [h, w], [B, h, w] or Ragged rows [T]; for several k
              with one more dimension at the end, [h, w, len(k)] and so on. Labels are numbered in the order in which
              they first occur, so the first token of every photo has label 0.
    Few:      fewer than k labels occur where fewer than k tokens differ in their eigenvectors; all are 0 where all
              tokens are alike (cosines within 1e-6) and for a single token.
    Errors:   TypeError for features that are not floating point; ValueError for a wrong shape, a k or seed out of
              range, features that are not finite (the photo is named), a backend that cannot run.
    Cost:     n^2 C flops for the range of the cosines and 4 n C for each product with A (some ten for each of the
              max k - 1 eigenvectors) of n tokens; no n x n array. On a GPU 3 n^2 C flops of float16 for the range; no
              GPU has run it yet. Deterministic: a photo's labels are the same alone, in any batch and with any thread
              count.
    Source:   G. Shin, S. Albanie, W. Xie, Unsupervised Salient Object Detection with Spectral Cluster Voting, CVPR
              Workshops 2022, section 3.1; U. von Luxburg, A Tutorial on Spectral Clustering, 2007, section 4;
              D. Arthur and S. Vassilvitskii, k-means++, SODA 2007.
    """
    ragged, restore = arrange(NAME, "features", features, 1, batches=True)
    expect_dtype(NAME, "features", ragged.rows, torch.float32, torch.float64, torch.float16, torch.bfloat16)
    counts = [k] if isinstance(k, int) else list(k)
    for count in counts:
        if not isinstance(count, int) or not 1 <= count <= 64:
            raise ValueError(f"{NAME}: k must be between 1 and 64, or several such numbers, but is {k}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{NAME}: seed must fit 64 bits, but is {seed}")
    rows = ragged.rows.to(torch.float32).contiguous()
    labels = _cluster(rows, ragged.offsets, ragged.shapes, counts, seed, backend)
    return restore(labels.squeeze(1) if isinstance(k, int) else labels)


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


def _cluster_reference(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    labels = _fake_cluster(features, offsets, shapes, counts)
    for b, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if not torch.isfinite(features[begin:end]).all():
            raise ValueError(f"{NAME}: features must be finite, but those of photo {b} hold NaN or Inf")
        labels[begin:end] = torch.from_numpy(reference.spectral_clusters(features[begin:end], counts, seed))
    return labels


def _cluster_cpu(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    labels = _fake_cluster(features, offsets, shapes, counts)
    wanted = torch.tensor(counts, dtype=torch.int32)
    backends.native().spectral_clusters(features, offsets, shapes, wanted, labels, seed)
    return labels


TOGETHER = 64  # photos whose vectors a GPU holds at a time: some 250 MB for 1,900 tokens each


def _cluster_cuda(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    """The range of the cosines by Triton, vectors and k-means by CUDA."""
    from .triton.normalized_rows import normalized_rows, refuse_infinite
    from .triton.spectral_clusters import cosine_ranges  # not at import: not every machine has Triton

    expect_rows(NAME, offsets, shapes, features)
    labels = _fake_cluster(features, offsets, shapes, counts)
    wanted = torch.tensor(counts, dtype=torch.int32)
    native, stream = backends.native().cuda, torch.cuda.current_stream(features.device).cuda_stream
    with torch.cuda.device_of(features):
        for first in range(0, len(shapes) if counts else 0, TOGETHER):
            grids = shapes[first : first + TOGETHER]
            begin, end = int(offsets[first]), int(offsets[first + len(grids)])
            mine = offsets[first : first + len(grids) + 1] - begin
            unit = normalized_rows(features[begin:end])
            refuse_infinite(NAME, unit.finite, mine, first)
            ranges = cosine_ranges(unit, mine)
            vectors = (unit.high.float() + unit.low.float()) / 256
            doubles = native.spectral_clusters_workspace(mine, grids, wanted, *vectors.shape)
            workspace = torch.empty(doubles, dtype=torch.float64, device=features.device)
            native.spectral_clusters(vectors, ranges, mine, grids, wanted, labels[begin:end], workspace, seed, stream)
    return labels


backends.IMPLEMENTATIONS[NAME] = {"reference": _cluster_reference, "cpu": _cluster_cpu, "cuda": _cluster_cuda}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _fake_cluster(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], *rest) -> Tensor:
    return features.new_empty(features.shape[0], len(counts), dtype=torch.int32)


def _dispatch(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int, backend: str) -> Tensor:
    return backends.run(NAME, backend, features.device)(features, offsets, shapes, counts, seed)


_cluster = register(
    f"{NAME}(Tensor features, Tensor offsets, Tensor shapes, int[] counts, int seed, str backend) -> Tensor",
    _dispatch,
    _fake_cluster,
)
