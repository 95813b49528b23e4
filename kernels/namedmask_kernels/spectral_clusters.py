# SPDX-License-Identifier: MIT
"""SelfMask's spectral clustering: partitions the tokens of an image into k clusters, for several k at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, per_image, register
from .ragged import FLOATING, Batch, arrange, expect_finite, expect_int, expect_ints, expect_rows, is_sequence
from .reference import spectral_clusters as reference

NAME = "spectral_clusters"
MAX_K = 64


def spectral_clusters(features: Batch, k: int | Sequence[int], *, seed: int = 0, backend: str = "auto") -> Batch:
    """Clusters the tokens of each image into k groups.

    The affinity A holds the cosines of all pairs of tokens, scaled so that the smallest of the image is 0 and the
    largest 1; D is diagonal with the row sums of A. The clusters are those of k-means on the generalized eigenvectors
    v_2, ..., v_k of (D - A) v = lambda D v with the smallest eigenvalues after the constant one, v' D v = 1.

    Args:
        features: Floating point grid [h, w, C] (numpy or torch), equal grids [B, h, w, C], or Ragged with rows [T, C];
            computed in float32.
        k: Number of clusters, 1 to 64; or several such numbers, which share one eigenproblem.
        seed: Seed of k-means++. The best of 10 runs is kept, that with the smallest sum of squared distances.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        int32 labels, arranged like the features without C: [h, w], [B, h, w] or Ragged with rows [T]; for several k
        with one more dimension at the end, [h, w, len(k)] and so on. Labels are numbered in order of first occurrence,
        so the first token of every image has label 0. Fewer than k labels occur if fewer than k tokens differ in their
        eigenvectors; all labels are 0 if all tokens are alike (cosines within 1e-6) and for a single token. If
        eigenvalues are (nearly) equal, as in images of fewer than k - 1 channels, eigenvectors are not unique: labels
        are the same on every call, but differ between backends.

    Raises:
        TypeError: If the features are not floating point.
        ValueError: If a shape is wrong, k or the seed is out of range, the features are not finite (the message names
            the image), or the backend cannot run.

    Cost:
        n^2 C flops for the range of the cosines and 4 n C for each product with A (about ten for each of the max k - 1
        eigenvectors) of n tokens; no n x n array. On a GPU 3 n^2 C flops of float16 for the range; on an H100, 0.53 ms
        per image of 1,900 tokens for k = 2, 3, 4, in a batch of 64.

    Determinism:
        Bit-identical for any batch and number of threads.

    Source:
        G. Shin, S. Albanie, W. Xie, Unsupervised Salient Object Detection with Spectral Cluster Voting, CVPR Workshops
        2022, section 3.1; U. von Luxburg, A Tutorial on Spectral Clustering, 2007, section 4; D. Arthur and S.
        Vassilvitskii, k-means++, SODA 2007.

    Examples:
        >>> spectral_clusters(torch.randn(14, 20, 64), k=[2, 3, 4]).shape
        torch.Size([14, 20, 3])
    """
    packed = arrange(NAME, "features", features, 1, *FLOATING, batches=True)
    several = is_sequence(k)
    counts = expect_ints(NAME, "k", k, 1, MAX_K) if several else [expect_int(NAME, "k", k, 1, MAX_K)]
    number = expect_int(NAME, "seed", seed, -(2**63), 2**63 - 1)
    rows = packed.rows.to(torch.float32).contiguous()
    labels = _cluster(rows, packed.offsets, packed.shapes, counts, number, backend)
    return packed.restore(labels if several else labels.squeeze(1))


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------


def _outputs(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    return features.new_empty(features.shape[0], len(counts), dtype=torch.int32)


def _cluster_reference(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    expect_finite(NAME, "features", features.isfinite(), offsets)
    return per_image(reference.spectral_clusters, outputs=_outputs)(features, offsets, shapes, counts, seed)


def _cluster_cpu(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    labels = _outputs(features, offsets, shapes, counts, seed)
    ks = torch.tensor(counts, dtype=torch.int32, device="cpu")
    backends.native().spectral_clusters(features, offsets, shapes, ks, labels, seed)
    return labels


TOGETHER = 64  # images whose vectors a GPU holds at a time: about 250 MB for 1,900 tokens each


def _cluster_cuda(features: Tensor, offsets: Tensor, shapes: Tensor, counts: list[int], seed: int) -> Tensor:
    """The range of the cosines by Triton, eigenvectors and k-means by CUDA."""
    from .triton.normalized_rows import chunks  # not at import: Triton is optional
    from .triton.spectral_clusters import cosine_ranges

    expect_rows(NAME, offsets, shapes, features)
    labels = _outputs(features, offsets, shapes, counts, seed)
    if not counts:
        return labels
    ks = torch.tensor(counts, dtype=torch.int32, device="cpu")
    native, stream = backends.native().cuda, cuda_stream(features)
    with torch.cuda.device_of(features):
        for part in chunks(features, offsets, shapes, TOGETHER):
            expect_finite(NAME, "features", part.unit.finite, part.offsets, part.images.start)
            ranges = cosine_ranges(part.unit, part.offsets)
            vectors = (part.unit.high.float() + part.unit.low.float()) / 256
            doubles = native.spectral_clusters_workspace(part.offsets, part.shapes, ks, *vectors.shape)
            workspace = torch.empty(doubles, dtype=torch.float64, device=features.device)
            native.spectral_clusters(
                vectors, ranges, part.offsets, part.shapes, ks, labels[part.rows], workspace, seed, stream
            )
    return labels


_cluster = register(
    f"{NAME}(Tensor features, Tensor offsets, Tensor shapes, int[] counts, int seed) -> Tensor",
    outputs=_outputs,
    reference=_cluster_reference,
    cpu=_cluster_cpu,
    cuda=_cluster_cuda,
    cuda_needs_triton=True,
    differentiable=False,
)
