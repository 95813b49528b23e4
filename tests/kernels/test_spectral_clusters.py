# SPDX-License-Identifier: MIT

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.reference import spectral_clusters as reference

BACKENDS = ["cpu", "reference", "cuda"]


def scene(h, w, channels, seed=0, objects=3, noise=0.6):
    """float32 [h, w, C] and labels [h, w]: a background and disks, each with its own random direction, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    labels = np.zeros((h, w), int)
    for k in range(objects):
        center = (h / 2, w * (2 * k + 1) / (2 * objects))
        labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < (min(h, w / objects) / 2.2) ** 2] = k + 1
    directions = rng.normal(size=(objects + 1, channels))
    features = directions[labels] + noise * rng.normal(size=(h, w, channels))
    return torch.from_numpy(features.astype(np.float32)), labels


def in_order(labels):
    """Labels, renumbered in order of first occurrence."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(np.shape(labels))


def test_recovers_planted_clusters(run):
    features, planted = scene(18, 30, 64)
    labels = run(nk.spectral_clusters, features, 4)
    assert labels.dtype == torch.int32 and labels.shape == (18, 30)
    np.testing.assert_array_equal(labels.numpy(), in_order(planted))


@pytest.mark.parametrize("seed", range(3))
def test_eigenvectors_of_the_reference_equal_scipy(seed):
    features, _ = scene(9, 13, 32, seed)
    a = reference.affinity(features.flatten(0, 1))
    expected = scipy.linalg.eigh(np.diag(a.sum(1)) - a, np.diag(a.sum(1)), subset_by_index=[1, 3])[1]
    points = reference.embedding(a, 3)
    signs = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points * signs, expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_reference(seed):
    features, _ = scene(13 + seed, 17, 48, seed, objects=2, noise=1.0 + 0.3 * seed)
    result = nk.spectral_clusters(features, [2, 3, 4, 7], seed=seed)
    expected = nk.spectral_clusters(features, [2, 3, 4, 7], seed=seed, backend="reference")
    assert torch.equal(result, expected)


@pytest.mark.parametrize("case", ["one channel above all", "nearly alike", "one token far from all", "two opposite"])
def test_minimum_cosine_where_8_bits_are_coarse(case):
    """Few pairs differ in 8 bits, or the first guess is not the minimum; strong noise makes the labels depend on it."""
    features, _ = scene(17, 19, 70, seed=3, objects=2, noise=2.0)
    if case == "one channel above all":
        features[..., 1] += 12
    elif case == "nearly alike":
        features = 1 + 0.01 * features
    elif case == "one token far from all":
        features = features.abs()
        features[11, 7] = -features[2, 3]
    else:
        features[3, 4] = -features[16, 18]
    result = nk.spectral_clusters(features, [2, 3, 5])
    assert torch.equal(result, nk.spectral_clusters(features, [2, 3, 5], backend="reference"))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alike", [False, True])
def test_clusters_of_noise_equal_the_reference(seed, alike):
    """The clusters of noise depend on errors of 0.01 in the minimum cosine, and if cosines differ by 4e-6, on the
    rounding of factors to 29 bits."""
    noise = np.random.default_rng(seed).normal(size=(20, 25, 13))
    features = torch.from_numpy((1 + 0.001 * noise if alike else noise).astype(np.float32))
    result = nk.spectral_clusters(features, [3, 12])
    assert torch.equal(result, nk.spectral_clusters(features, [3, 12], backend="reference"))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_few_channels(channels):
    features = torch.from_numpy(np.random.default_rng(channels).normal(size=(12, 17, channels)).astype(np.float32))
    result = nk.spectral_clusters(features, 2)
    assert torch.equal(result, nk.spectral_clusters(features, 2, backend="reference"))


def sum_of_squares(points, labels):
    return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


@settings(max_examples=60)
@given(
    h=st.integers(1, 8),
    w=st.integers(2, 9),
    channels=st.integers(2, 30),
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.3, 1.0, 4.0]),
    k=st.integers(2, 6),
)
def test_clusters_are_as_compact_as_those_of_the_reference(h, w, channels, seed, noise, k):
    """Labels may differ if eigenvalues or k-means runs tie; the compactness of the clusters may not."""
    features, _ = scene(h, w, channels, seed, objects=2, noise=noise)
    a = reference.affinity(features.flatten(0, 1))
    if a is None:
        return
    degrees = a.sum(1)
    values = np.linalg.eigvalsh(a / np.sqrt(degrees[:, None] * degrees))[::-1]
    if k < h * w and values[k - 1] - values[k] < 1e-3:
        return  # v_k is not unique
    points = reference.embedding(a, k - 1)
    result = nk.spectral_clusters(features, k).flatten().numpy()
    expected = nk.spectral_clusters(features, k, backend="reference").flatten().numpy()
    assert sum_of_squares(points, result) <= 1.05 * sum_of_squares(points, expected) + 1e-9
    assert result.max() < k and np.array_equal(result, in_order(result))


def test_equal_groups_have_equal_eigenvalues(run):
    """Three groups of equal tokens: the second eigenvalue is double; one start vector would yield one eigenvector."""
    features = torch.eye(3).repeat_interleave(20, 0).reshape(6, 10, 3) + 0.1
    labels = run(nk.spectral_clusters, features, 3)
    assert torch.equal(labels.flatten(), torch.arange(3, dtype=torch.int32).repeat_interleave(20))


def test_several_k_equal_each_alone():
    """One eigenproblem for all: the first vectors are the same to 1e-6, so are the clusters of a clear scene."""
    features, _ = scene(14, 20, 40, noise=1.0)
    together = nk.spectral_clusters(features, (4, 2, 3))
    assert together.shape == (14, 20, 3)
    for column, k in enumerate((4, 2, 3)):
        assert torch.equal(together[..., column], nk.spectral_clusters(features, k))


def test_the_seed_decides():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 12, 40)).astype(np.float32))
    labels = [nk.spectral_clusters(features, 12, seed=seed) for seed in (0, 0, 1, -5)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert all(torch.equal(labels[i], nk.spectral_clusters(features, 12, seed=s, backend="reference"))
               for i, s in ((0, 0), (2, 1), (3, -5)))  # fmt: skip


@pytest.mark.parametrize(
    "features",
    [torch.ones(4, 5, 8), torch.zeros(4, 5, 8), torch.zeros(2, 2, 0), torch.ones(1, 1, 8), torch.ones(0, 7, 8)],
    ids=["constant", "zeros", "no channels", "one token", "empty"],
)
def test_all_alike(run, features):
    labels = run(nk.spectral_clusters, features, [2, 3])
    assert labels.shape == (*features.shape[:2], 2) and not labels.any()


def test_fewer_tokens_than_clusters(run):
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    labels = run(nk.spectral_clusters, features, [1, 2, 5])
    assert labels.flatten().tolist() == [0, 0, 0, 0, 1, 1]


def test_a_row_of_zeros(run):
    """If all other cosines are positive, those of the token are the minimum: it has no affinity to any other."""
    features, _ = scene(9, 12, 32, objects=1)
    features = features.abs()
    features[4, 3] = 0
    labels = run(nk.spectral_clusters, features, 3)
    assert labels.max() <= 2
    assert torch.equal(labels, nk.spectral_clusters(features, 3, backend="reference"))


def test_cosines_that_decrease_from_token_to_token():
    """Every tile lowers the minimum cosine, which is in the last one."""
    angles = torch.linspace(0, 2.5, 13 * 17).reshape(13, 17, 1)
    features = torch.cat([angles.cos(), angles.sin()], 2)
    labels = nk.spectral_clusters(features, [2, 3])
    assert torch.equal(labels, nk.spectral_clusters(features, [2, 3], backend="reference"))


def test_results_do_not_depend_on_batch_composition(run):
    shapes = [(5, 7), (1, 1), (12, 17), (0, 4), (10, 11), (9, 0), (1, 2)]
    images = [scene(h, w, 24, seed=b)[0] for b, (h, w) in enumerate(shapes)]
    batch = run(nk.spectral_clusters, Ragged.pack(images), [2, 4])
    assert batch.rows.shape == (sum(h * w for h, w in shapes), 2)
    for image, labels in zip(images, batch.grids(), strict=True):
        assert torch.equal(labels, run(nk.spectral_clusters, image, [2, 4]))


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    images = [scene(20, 23, 40, seed=b, noise=3.0)[0] for b in range(3)]
    batch = Ragged.pack(images)
    first, *others = on_threads(lambda: (nk.spectral_clusters(images[0], 5), nk.spectral_clusters(batch, 5).rows))
    for alone, together in others:
        assert torch.equal(alone, first[0]) and torch.equal(together, first[1])


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_instruction_levels(level, tmp_path, run_at_level):
    features, _ = scene(19, 21, 70)
    np.save(tmp_path / "features.npy", features.numpy())
    code = (
        "import sys, numpy as np, namedmask_kernels as nk\n"
        "features = np.load(sys.argv[1] + '/features.npy')\n"
        "np.save(sys.argv[1] + '/result.npy', nk.spectral_clusters(features, [2, 3, 4]))\n"
    )
    run_at_level(level, code)
    expected = nk.spectral_clusters(features, [2, 3, 4], backend="reference")
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), expected)


def test_arrangements_and_dtypes(run, device):
    images = torch.stack([scene(6, 8, 12, seed=b)[0] for b in range(3)])
    batch = run(nk.spectral_clusters, images, 3)
    assert batch.shape == (3, 6, 8)
    ragged = run(nk.spectral_clusters, Ragged.pack(list(images)), 3)
    assert torch.equal(ragged.rows, batch.flatten())
    assert torch.equal(run(nk.spectral_clusters, images.double(), 3), batch)
    if device == "cpu":
        as_numpy = run(nk.spectral_clusters, images.numpy(), [3])
        assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy[..., 0], batch)
    half = images.bfloat16()
    assert torch.equal(run(nk.spectral_clusters, half, 3), run(nk.spectral_clusters, half.float(), 3))
    none = run(nk.spectral_clusters, Ragged.of_shapes(torch.zeros(0, 12), []), [2, 3])
    assert none.rows.shape == (0, 2)
    view = images[0].permute(1, 0, 2)[::2, 1:, ::2]
    assert torch.equal(run(nk.spectral_clusters, view, 3), run(nk.spectral_clusters, view.contiguous(), 3))


def test_every_output_is_written(monkeypatch):
    images = Ragged.pack([scene(9, 11, 16)[0], torch.ones(3, 4, 16), scene(1, 1, 16)[0]])
    expected = nk.spectral_clusters(images, [1, 2, 5]).rows
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(77))
    assert torch.equal(nk.spectral_clusters(images, [1, 2, 5]).rows, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_raise(run, bad):
    images = [scene(4, 5, 8, seed=b)[0] for b in range(4)]
    images[2][3, 1, 5] = bad
    message = "spectral_clusters: features must be finite, but .*image {} "
    with pytest.raises(ValueError, match=message.format(2)):
        run(nk.spectral_clusters, Ragged.pack(images), 2)
    with pytest.raises(ValueError, match=message.format(0)):
        run(nk.spectral_clusters, images[2], 2)


def test_invalid_arguments_raise():
    features, _ = scene(4, 5, 8)
    with pytest.raises(TypeError, match=r"spectral_clusters: features must be float32 or .*, but is int64"):
        nk.spectral_clusters(features.long(), 2)
    with pytest.raises(
        ValueError, match=r"spectral_clusters: features must have 3 or 4 dimensions, but has shape \[4, 5\]"
    ):
        nk.spectral_clusters(features[..., 0], 2)
    for k, message in ((0, "at least 1, but is 0"), (65, "at most 64, but is 65"), ([2, 0], "at least 1, but is 0")):
        with pytest.raises(ValueError, match=f"spectral_clusters: k must be {message}"):
            nk.spectral_clusters(features, k)
    with pytest.raises(ValueError, match=r"spectral_clusters: seed must be at most 9223372036854775807, but is "):
        nk.spectral_clusters(features, 2, seed=2**63)
    with pytest.raises(ValueError, match="spectral_clusters: backend 'cuda' cannot run"):
        nk.spectral_clusters(features, 2, backend="cuda")


def test_opcheck():
    batch = Ragged.pack([scene(4, 5, 8)[0], scene(3, 2, 8)[0]])
    torch.library.opcheck(torch.ops.namedmask_kernels.spectral_clusters, (*batch, [2, 3], 0, "cpu"))
