# SPDX-License-Identifier: MIT

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.normalized_cut import expect_settings
from namedmask_kernels.reference import normalized_cut as reference

BACKENDS = ["cpu", "reference", "cuda"]


def scene(h, w, channels, seed=0, objects=1, noise=0.6):
    """float32 [h, w, C]: a background and disks, each with its own random direction, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    features = np.tile(rng.normal(size=channels), (h, w, 1))
    for k in range(objects):
        center = (h / 2, w * (2 * k + 1) / (2 * objects))
        inside = (y - center[0]) ** 2 + (x - center[1]) ** 2 < (min(h, w / objects) / 3) ** 2
        features[inside] = rng.normal(size=channels)
    return torch.from_numpy((features + noise * rng.normal(size=features.shape)).astype(np.float32))


def affinity(features, tau=0.2, eps=1e-5):
    return np.where(reference.edges(features.flatten(0, -2), tau), 1.0, eps)


def same(a, b):
    """Whether all fields are bit-identical."""
    fields = ((getattr(x, "rows", x), getattr(y, "rows", y)) for x, y in zip(a, b, strict=True))
    return all(torch.equal(x.flatten(), y.flatten()) for x, y in fields)


@pytest.mark.parametrize("case", ["a", "b"])
def test_equals_tokencut(run, golden, case, backend):
    if backend == "reference" and case == "b":
        pytest.skip("1,200 tokens take the reference seconds")
    arrays = golden("ncut")
    get = lambda name: arrays[f"{case}_{name}"]  # noqa: E731
    features = torch.from_numpy(get("features")).unflatten(0, tuple(get("dims")))
    result = run(nk.normalized_cut, features, tolerance=1e-10)
    expected = get("eigvec")
    assert abs(result.value.item() - get("lambda0_3")[1]) < 1e-10
    assert np.abs(result.vector.flatten().numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert result.seed.item() == get("seed")
    np.testing.assert_array_equal(result.partition.numpy(), get("bipartition"))
    np.testing.assert_array_equal(result.foreground.numpy(), get("mask"))
    assert result.residual.item() < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_reference_equals_scipy(seed):
    connected = reference.edges(scene(9, 13, 32, seed, noise=1.0).flatten(0, 1), 0.2)
    a = np.where(connected, 1.0, 1e-5)
    (value,), vector = scipy.linalg.eigh(np.diag(a.sum(1)) - a, np.diag(a.sum(1)), subset_by_index=[1, 1])
    cut = reference.cut(connected, 1e-5)
    assert abs(cut.value - value) < 1e-12 and cut.residual < 1e-12
    vector = vector[:, 0] * np.sign(vector[cut.seed, 0])
    np.testing.assert_allclose(cut.vector, vector, atol=1e-10 * np.abs(vector).max())


@pytest.mark.parametrize("case", ["a", "b"])
def test_edges_equal_tokencut(golden, case):
    arrays = golden("ncut")
    n = len(arrays[f"{case}_features"])
    expected = np.unpackbits(arrays[f"{case}_edge_bits"], count=n * n).reshape(n, n)
    np.testing.assert_array_equal(reference.edges(torch.from_numpy(arrays[f"{case}_features"]), 0.2), expected)


@pytest.mark.parametrize("case", ["a", "b"])
def test_default_tolerance_gives_the_same_masks(golden, case):
    arrays = golden("ncut")
    features = torch.from_numpy(arrays[f"{case}_features"]).unflatten(0, tuple(arrays[f"{case}_dims"]))
    result = nk.normalized_cut(features)
    assert result.residual.item() <= 1e-8 and result.iterations.item() <= 14
    np.testing.assert_array_equal(result.partition.numpy(), arrays[f"{case}_bipartition"])
    np.testing.assert_array_equal(result.foreground.numpy(), arrays[f"{case}_mask"])


@pytest.mark.parametrize(("channels", "noise", "gap"), [(128, 1.0, 3e-3), (384, 0.6, 2e-5)])
def test_close_eigenvalues(channels, noise, gap):
    """Two equal objects: the vector is nearly ambiguous, the value is not."""
    features = scene(24, 32, channels, seed=3, objects=2, noise=noise)
    a = affinity(features)
    degrees = a.sum(1)
    _, second, third = scipy.linalg.eigh(np.diag(degrees) - a, np.diag(degrees), subset_by_index=[0, 2])[0]
    assert third - second < gap
    result = nk.normalized_cut(features)
    assert abs(result.value.item() - second) < 1e-8
    v = result.vector.flatten().double().numpy()
    assert abs(v @ (degrees * v - a @ v) / (v @ (degrees * v)) - second) < 1e-4


@pytest.mark.parametrize("iterations", [1, 3, 128])
def test_residual(run, backend, iterations):
    features = scene(12, 17, 20, noise=1.5)
    a = affinity(features)
    degrees = a.sum(1)
    result = run(nk.normalized_cut, features, max_iterations=iterations, tolerance=1e-6)
    v = result.vector.flatten().double().numpy()
    assert abs(v @ (degrees * v) - 1) < 1e-6
    residual = np.linalg.norm((degrees * v - a @ v - result.value.item() * degrees * v) / np.sqrt(degrees))
    assert abs(residual - result.residual.item()) < 1e-6
    if backend != "reference":
        assert result.iterations.item() <= iterations
        assert (result.residual.item() <= 1e-6) == (iterations == 128)


def test_groups_that_are_not_connected():
    """Gaps of 10 eps between the eigenvalues: the default tolerance must still give TokenCut's vector."""
    for seed in range(6):
        features = scene(14, 22, 384, seed=seed, objects=2, noise=0.8)
        features[3:7, 3:6] = scene(4, 3, 384, seed=seed + 100, noise=0.8)
        expected = nk.normalized_cut(features, backend="reference")
        result = nk.normalized_cut(features)
        assert expected.value < 1e-2 and result.seed == expected.seed
        assert torch.equal(result.partition, expected.partition) and torch.equal(result.foreground, expected.foreground)


@settings(max_examples=80)
@example(h=6, w=6, channels=35, seed=35, tau=0.5, noise=3.0)  # two equal Ritz values: QR stopped before it was done
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    channels=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    tau=st.sampled_from([-0.3, 0.0, 0.2, 0.5]),
    noise=st.sampled_from([0.2, 0.8, 3.0]),
)
def test_equals_the_reference_on_small_grids(h, w, channels, seed, tau, noise):
    features = scene(h, w, channels, seed, objects=2, noise=noise)
    unit = torch.nn.functional.normalize(features.flatten(0, 1).double(), dim=1)
    assume(((unit @ unit.T).triu(1) - tau).abs().min() > 1e-6 or tau == 0)
    assume(channels > 1)  # one channel: cosines are +1 and -1, see test_two_equal_halves
    check_against_reference(features, tau)


def check_against_reference(features, tau=0.2):
    expected = nk.normalized_cut(features, tau=tau, backend="reference")
    result = nk.normalized_cut(features, tau=tau, tolerance=1e-10)
    assert abs(result.value - expected.value).item() < 1e-9
    assert result.residual.item() < 1e-9
    assert (result.seed == -1) == (expected.seed == -1)
    n = features.shape[0] * features.shape[1]
    if n < 3:
        return
    a = affinity(features, tau)
    values = scipy.linalg.eigh(np.diag(a.sum(1)) - a, np.diag(a.sum(1)), eigvals_only=True, subset_by_index=[1, 2])
    if values[1] - values[0] < 1e-3:
        return  # the vector is not unique
    v, scale = expected.vector.numpy(), expected.vector.abs().max().item()
    size = np.abs(v.ravel()) / scale
    if expected.seed != result.seed:  # entries of equal magnitude: the sign is arbitrary
        assert abs(size[expected.seed] - size[result.seed]) < 1.1e-5
        return
    np.testing.assert_allclose(result.vector.numpy(), v, atol=1e-6 * scale + 1e-7)
    clear = np.abs(v - v.mean()) > 1e-5 * scale
    np.testing.assert_array_equal(result.partition.numpy()[clear], expected.partition.numpy()[clear])
    if clear.all():
        assert torch.equal(result.foreground, expected.foreground)


@pytest.mark.parametrize(
    "shape", [(1, 31), (33, 1), (5, 13), (1, 95), (8, 12), (1, 97), (11, 11), (16, 12), (1, 193), (17, 19)]
)
@pytest.mark.parametrize("channels", [2, 3, 17, 65, 385])
def test_sizes_around_the_tiles(shape, channels):
    check_against_reference(scene(*shape, channels, noise=0.8))


@pytest.mark.parametrize(("channels", "outlier"), [(9, 0), (64, 0), (385, 0), (385, 10)])
def test_cosines_close_to_tau(channels, outlier):
    """Hundreds of pairs too close to tau for products of rounded integers, none too close for floats.

    With an outlier in every token, bytes represent the other channels so badly that they are not used.
    """
    features = scene(20, 22, channels, noise=0.8)
    tokens = torch.arange(440)
    features.flatten(0, 1)[tokens, tokens % channels] += outlier
    unit = torch.nn.functional.normalize(features.flatten(0, 1).double(), dim=1)
    cosines = (unit @ unit.T)[tuple(torch.triu_indices(440, 440, 1))].sort().values
    near = cosines[(cosines - cosines[len(cosines) * 3 // 4]).abs() < 2e-3]
    gap, at = near.diff().max(0)
    assert len(near) > 200 and gap > 4e-6
    check_against_reference(features, (near[at] + near[at + 1]).item() / 2)


@pytest.mark.parametrize(
    ("features", "tau", "value"),
    [
        (torch.ones(4, 5, 8), 0.2, 1.0),
        (torch.ones(1, 2, 3), 0.2, 1.0),
        (torch.zeros(4, 5, 8), 0.2, 1.0),
        (torch.zeros(2, 2, 0), 0.2, 1.0),
        (torch.eye(20).reshape(4, 5, 20), 0.2, 20e-5 / (1 + 19e-5)),
        (torch.eye(20).reshape(4, 5, 20), -1.5, 1.0),
        (torch.ones(4, 5, 8), 1.0, 1.0),
        (torch.ones(1, 1, 8), 0.2, 1.0),
        (torch.ones(0, 7, 8), 0.2, 1.0),
    ],
    ids=["constant", "two", "zeros", "no channels", "none connected", "all connected", "tau 1", "one token", "empty"],
)
def test_all_tokens_alike(run, features, tau, value):
    result = run(nk.normalized_cut, features, tau=tau)
    assert abs(result.value.item() - value) < 1e-12
    assert result.seed.item() == -1 and result.residual.item() == 0 and result.iterations.item() == 0
    assert not result.vector.any() and not result.partition.any() and not result.foreground.any()
    assert result.vector.shape == features.shape[:2]


def test_two_equal_halves(run):
    """All entries have the same magnitude: the first token is the seed, its half the foreground."""
    features = torch.zeros(4, 6, 2)
    features[:, :3, 0] = features[:, 3:, 1] = 1
    result = run(nk.normalized_cut, features)
    assert result.seed.item() == 0
    assert torch.equal(result.partition, features[..., 0] > 0)
    assert torch.equal(result.foreground, result.partition)
    assert abs(result.value.item() - 2e-5 / (1 + 1e-5)) < 1e-12


def test_the_foreground_is_the_component_of_the_seed(run):
    features = torch.zeros(5, 9, 2)
    features[..., 0] = 1
    features[1:4, 1:3] = features[1:3, 6:8] = torch.tensor([0.0, 1.0])
    result = run(nk.normalized_cut, features)
    assert torch.equal(result.partition, features[..., 1] > 0)
    expected = torch.zeros(5, 9, dtype=torch.bool)
    expected[1:4, 1:3] = True
    assert result.seed.item() == 10 and torch.equal(result.foreground, expected)


def test_rows_of_zeros_are_connected_to_nothing(run):
    features = scene(6, 7, 16)
    features[2, 3] = 0
    features[0, 0] *= 1e-25  # squares underflow in float32; norms below 1e-12 count as 0
    features[5, 5] *= 1e25  # squares overflow in float32
    result = run(nk.normalized_cut, features, tolerance=1e-10)
    expected = features.clone()
    expected[0, 0] = 0
    expected[5, 5] *= 1e-25
    check = nk.normalized_cut(expected, tolerance=1e-10, backend="reference")
    np.testing.assert_allclose(result.vector.numpy(), check.vector.numpy(), atol=1e-6)
    assert torch.equal(result.partition, check.partition)


def test_results_do_not_depend_on_batch_composition(run):
    shapes = [(5, 7), (1, 1), (12, 17), (0, 4), (10, 11), (9, 0), (1, 2)]
    images = [scene(h, w, 24, seed=b) for b, (h, w) in enumerate(shapes)]
    batch = run(nk.normalized_cut, Ragged.pack(images))
    assert batch.value.shape == (7,) and batch.value.dtype == torch.float64
    for b, image in enumerate(images):
        alone = run(nk.normalized_cut, image)
        for name in ("vector", "partition", "foreground"):
            assert torch.equal(getattr(batch, name).grids()[b], getattr(alone, name))
        for name in ("value", "residual", "iterations", "seed"):
            assert torch.equal(getattr(batch, name)[b : b + 1], getattr(alone, name))


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    images = [scene(20, 23, 40, seed=b) for b in range(3)]
    first, *others = on_threads(lambda: (nk.normalized_cut(images[0]), nk.normalized_cut(Ragged.pack(images))))
    for alone, batch in others:
        assert same(alone, first[0]) and same(batch, first[1])


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_instruction_levels(level, tmp_path, run_at_level):
    features = scene(19, 21, 70)
    np.save(tmp_path / "features.npy", features.numpy())
    code = (
        "import sys, numpy as np, namedmask_kernels as nk\n"
        "result = nk.normalized_cut(np.load(sys.argv[1] + '/features.npy'), tolerance=1e-10)\n"
        "np.savez(sys.argv[1] + '/result.npz', vector=result.vector, foreground=result.foreground)\n"
    )
    run_at_level(level, code)
    result, expected = np.load(tmp_path / "result.npz"), nk.normalized_cut(features, backend="reference")
    np.testing.assert_allclose(result["vector"], expected.vector.numpy(), atol=1e-6)
    np.testing.assert_array_equal(result["foreground"], expected.foreground.numpy())


def test_arrangements_and_dtypes(run, device):
    images = torch.stack([scene(6, 8, 12, seed=b) for b in range(3)])
    batch = run(nk.normalized_cut, images)
    assert batch.foreground.shape == (3, 6, 8) and batch.seed.shape == (3,)
    ragged = run(nk.normalized_cut, Ragged.pack(list(images)))
    assert same(batch, ragged) and isinstance(ragged.vector, Ragged)
    assert same(run(nk.normalized_cut, images.double()), batch)
    if device == "cpu":
        as_numpy = run(nk.normalized_cut, images.numpy())
        assert all(isinstance(field, np.ndarray) for field in as_numpy)
        assert same((torch.from_numpy(field) for field in as_numpy), batch)
    half = images.bfloat16()
    assert same(run(nk.normalized_cut, half), run(nk.normalized_cut, half.float()))
    none = run(nk.normalized_cut, Ragged.of_shapes(torch.zeros(0, 12), []))
    assert none.vector.rows.shape == (0,) and none.value.shape == (0,)


def test_non_contiguous_views():
    features = scene(20, 30, 16)
    view = features.permute(1, 0, 2)[3::2, 1:, ::2]
    assert same(nk.normalized_cut(view), nk.normalized_cut(view.contiguous()))


def test_every_output_is_written(fill_memory):
    images = Ragged.pack([scene(9, 11, 16), torch.ones(3, 4, 16), scene(1, 1, 16)])
    expected = nk.normalized_cut(images)
    with fill_memory():
        assert same(nk.normalized_cut(images), expected)
        assert same(nk.normalized_cut(images, backend="reference"), nk.normalized_cut(images, backend="reference"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_raise(run, bad):
    images = [scene(4, 5, 8, seed=b) for b in range(4)]
    images[2][3, 1, 5] = bad
    with pytest.raises(ValueError, match=r"normalized_cut: features must be finite, but .*image 2 "):
        run(nk.normalized_cut, Ragged.pack(images))
    with pytest.raises(ValueError, match=r"image 0 "):
        run(nk.normalized_cut, images[2])


def test_invalid_arguments_raise():
    features = scene(4, 5, 8)
    with pytest.raises(TypeError, match=r"normalized_cut: features must be float32 or .*, but is int64"):
        nk.normalized_cut(features.long())
    with pytest.raises(TypeError, match=r"normalized_cut: features must be a numpy array, .* but is list"):
        nk.normalized_cut([1.0])
    with pytest.raises(
        ValueError, match=r"normalized_cut: features must have 3 or 4 dimensions, but has shape \[4, 5\]"
    ):
        nk.normalized_cut(features[..., 0])
    for name, value in (("tau", float("nan")), ("eps", 0), ("eps", 1), ("tolerance", 0), ("max_iterations", 0)):
        with pytest.raises(ValueError, match=f"normalized_cut: {name} must be .*, but is {value}"):
            nk.normalized_cut(features, **{name: value})
    with pytest.raises(ValueError, match="normalized_cut: backend 'cuda' cannot run"):
        nk.normalized_cut(features, backend="cuda")
    wrong = Ragged(
        torch.zeros(6, 3), torch.tensor([0, 6], dtype=torch.int32), torch.tensor([[2, 2]], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match=r"normalized_cut: image 0 has shape 2 x 2 but owns rows 0 to 6"):
        nk.normalized_cut(wrong)


def test_ranges_of_the_settings():
    largest, smallest = np.finfo(float).max, np.nextafter(0, 1)
    accepted = [
        (-largest, 1e-60, smallest, 1),
        (largest, np.nextafter(1, 0), largest, 2**31 - 1),
    ]
    for values in accepted:
        assert expect_settings("op", *values) == values
    assert expect_settings("op", 0, 0.5, 1, 9, least_tau=0) == (0, 0.5, 1, 9)
    for values, message in (
        ((np.inf, 0.5, 1, 1), "tau must be finite, but is inf"),
        ((-np.inf, 0.5, 1, 1), "tau must be finite, but is -inf"),
        ((0, np.nextafter(1e-60, 0), 1, 1), "eps must be at least 1e-60 and below 1"),
        ((0, 0.5, np.inf, 1), "tolerance must be above 0 and finite"),
        ((0, 0.5, -smallest, 1), "tolerance must be above 0 and finite"),
        ((0, 0.5, 1, 0), "max_iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"op: {message}"):
            expect_settings("op", *values)
    with pytest.raises(ValueError, match="op: tau must be finite and at least 0, but is -5e-324"):
        expect_settings("op", -smallest, 0.5, 1, 1, least_tau=0)


def test_opcheck():
    batch = Ragged.pack([scene(4, 5, 8), scene(3, 2, 8)])
    torch.library.opcheck(torch.ops.namedmask_kernels.normalized_cut, (*batch, 0.2, 1e-5, 1e-8, 128, "cpu"))
