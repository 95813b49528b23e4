# SPDX-License-Identifier: MIT
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.reference import bilateral_solver as reference

BACKENDS = ["cpu", "cuda", "reference"]
CASES = ["chelsea", "coffee", "coffee_large", "coffee_side"]


@pytest.fixture(scope="module")
def case(golden):
    """case(name) -> (target float32, image, soft, converged), computed by the published implementation."""
    arrays = golden("bilateral")
    return lambda name: (
        arrays[f"{name}_target"].astype(np.float32),
        arrays[f"{name.split('_')[0]}_photo"],
        arrays[f"{name}_soft"],
        arrays[f"{name}_converged"],
    )


def exact(target, image, **changes):
    """The reference in float64, with the defaults of the public function."""
    parameters = {
        "confidence": 0.999, "sigma_spatial": 16, "sigma_luma": 16, "sigma_chroma": 8,
        "smoothness": 256.0, "iterations": 25, "tolerance": 1e-5,
    } | changes  # fmt: skip
    return reference.bilateral_solver(target, image, **parameters)


def solve(target, image, backend, device, **parameters):
    """Runs a backend on numpy arrays and returns a numpy array."""
    tensors = (torch.from_numpy(a).to(device) for a in (target, image))
    return nk.bilateral_solver(*tensors, **parameters, backend=backend).cpu().numpy()


def random_sample(seed, h, w):
    """(target, image): smooth colors with some noise and gray areas, a disk as target."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(h, w, 1)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    image = (128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 8, (h, w, 3))).clip(0, 255).astype(np.uint8)
    image[: h // 3] = image[: h // 3, :, :1]
    return ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1).astype(np.float32), image


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_published_solver(case, golden, name):
    target, image, soft, converged = case(name)
    np.testing.assert_allclose(exact(target, image), soft, atol=1e-6)
    np.testing.assert_allclose(exact(target, image, iterations=2000, tolerance=1e-10), converged, atol=1e-6)
    vertex, _ = reference.grid(reference.cells(image, 16, 16, 8))
    assert vertex.max() + 1 == golden("bilateral")[f"{name}_nvertices"]


@pytest.mark.parametrize("iterations", [0, 25])
def test_reference_equals_scipy(iterations):
    """The same system as sparse matrices, with scipy's conjugate gradients and direct solver."""
    target, image = random_sample(3, 60, 80)
    confidence, smoothness = 0.9, 100.0
    vertex, edges = reference.grid(reference.cells(image, 5, 7, 3))
    rows, columns = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    n = len(np.unique(vertex))
    half = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    blur = 10 * sparse.eye_array(n) + half + half.T
    mass = np.bincount(vertex).astype(float)
    scale = np.ones(n)
    for _ in range(10):
        scale = np.sqrt(scale * mass / (blur @ scale))
    scaling = sparse.diags_array(scale)
    laplacian = sparse.diags_array(scale * (blur @ scale)) - scaling @ blur @ scaling
    system = (smoothness * laplacian + sparse.diags_array(confidence * mass)).tocsc()
    b = confidence * np.bincount(vertex, target.ravel())
    jacobi = sparse.diags_array(1 / system.diagonal())
    solution, _ = sparse.linalg.cg(system, b, b / (confidence * mass), rtol=0, maxiter=iterations, M=jacobi)
    changes = dict(zip(("sigma_spatial", "sigma_luma", "sigma_chroma"), (5, 7, 3), strict=True))
    changes |= {"confidence": confidence, "smoothness": smoothness}
    result = exact(target, image, **changes, iterations=iterations, tolerance=0)
    np.testing.assert_allclose(result, solution[vertex].reshape(60, 80), atol=1e-9)
    converged = exact(target, image, **changes, iterations=2000, tolerance=1e-12)
    np.testing.assert_allclose(converged, sparse.linalg.spsolve(system, b)[vertex].reshape(60, 80), atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_solver(case, name, backend, device):
    target, image, soft, converged = case(name)
    result = solve(target, image, backend, device)
    np.testing.assert_allclose(result, soft, atol=1e-5)
    clear = np.abs(soft - 0.5) > 1e-3
    assert ((result > 0.5) == (soft > 0.5))[clear].mean() >= 0.999
    result = solve(target, image, backend, device, iterations=2000, tolerance=1e-7)
    np.testing.assert_allclose(result, converged, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -7.0, 1e-42, 3e38])
def test_a_constant_target_is_returned_unchanged(case, backend, device, value):
    _, image, _, _ = case("coffee")
    result = solve(np.full(image.shape[:2], value, np.float32), image, backend, device)
    np.testing.assert_array_equal(result, np.float32(value))


PARAMETERS = st.fixed_dictionaries(
    {
        "confidence": st.sampled_from([0.999, 1.0, 0.25]),
        "sigma_spatial": st.sampled_from([16, 1, 5, 7.3, 1000, 1e9]),
        "sigma_luma": st.sampled_from([16, 1, 11.7, 300]),
        "sigma_chroma": st.sampled_from([8, 10, 2.9, 300]),
        "smoothness": st.sampled_from([256.0, 0.0, 3.5]),
        "iterations": st.integers(0, 30),
    }
)


@settings(max_examples=120)
@given(
    image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
    seed=st.integers(0, 99),
    parameters=PARAMETERS,
)
@example(  # a column of two pixels, the gray one on the border of a luma cell
    image=np.array([[[176, 157, 176]], [[176, 176, 176]]], np.uint8),
    seed=0,
    parameters={"confidence": 0.999, "sigma_spatial": 16, "sigma_luma": 16, "sigma_chroma": 8, "smoothness": 256.0,
                "iterations": 0},
)  # fmt: skip
def test_equals_reference_on_small_images(backend, device, image, seed, parameters):
    target = np.random.default_rng(seed).random(image.shape[:2], np.float32)
    expected = exact(target, image, tolerance=0.0, **parameters)
    result = solve(target, image, backend, device, tolerance=0.0, **parameters)
    rounding = 3e-7 if backend == "cuda" else 1e-7  # its sums are float32
    np.testing.assert_allclose(
        result, expected, atol=1e-5 + rounding * parameters["smoothness"] / parameters["confidence"]
    )


@pytest.mark.parametrize("shape", [(97, 131), (64, 48), (1, 300), (300, 1), (17, 16)])
@pytest.mark.parametrize("sigmas", [(16, 16, 8), (7.3, 5.5, 3.25), (1, 1, 1)])
def test_equals_reference_on_images(backend, device, shape, sigmas):
    target, image = random_sample(3, *shape)
    parameters = dict(zip(("sigma_spatial", "sigma_luma", "sigma_chroma"), sigmas, strict=True))
    result = solve(target, image, backend, device, **parameters)
    np.testing.assert_allclose(result, exact(target, image, **parameters), atol=2e-5)


def test_colors_on_cell_borders_are_assigned_as_in_the_reference(backend, device):
    """All colors whose luma or chroma is a whole number of cells, including all grays: rounding decides."""
    r, g, b = np.ogrid[:256, :256, :256]
    luma = 299 * r + 587 * g + 114 * b
    blue = 15625 * b - 5273 * r - 10352 * g  # around 0, as chroma
    red = 15625 * r - 13084 * g - 2541 * b
    colors = np.argwhere((luma % 16000 == 0) | (blue % 250000 == 0) | (red % 250000 == 0)).astype(np.uint8)
    image = colors[: len(colors) // 4 * 4].reshape(4, -1, 3)
    target = np.random.default_rng(1).random(image.shape[:2], np.float32)
    result = solve(target, image, backend, device, smoothness=0.0)  # the means of the cells
    np.testing.assert_allclose(result, exact(target, image, smoothness=0.0), atol=1e-6)


def test_degenerate_images(backend, device):
    for shape in [(0, 5), (5, 0), (0, 0)]:
        result = solve(np.zeros(shape, np.float32), np.zeros((*shape, 3), np.uint8), backend, device)
        assert result.shape == shape and result.dtype == np.float32
    one = solve(np.full((1, 1), 0.25, np.float32), np.full((1, 1, 3), 255, np.uint8), backend, device)
    assert one.tolist() == [[0.25]]
    target, _ = random_sample(0, 40, 50)
    flat = solve(target, np.full((40, 50, 3), 77, np.uint8), backend, device, sigma_spatial=100)
    np.testing.assert_allclose(flat, target.mean(), atol=1e-6)
    empty = Ragged.of_shapes(torch.zeros(0, device=device), [])
    image = empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8, device=device))
    assert nk.bilateral_solver(empty, image, backend=backend).rows.shape == (0,)


def test_results_do_not_depend_on_batch_composition(backend, device):
    samples = [
        random_sample(s, h, w) for s, (h, w) in enumerate([(40, 70), (1, 1), (0, 4), (97, 33), (64, 64), (5, 200)])
    ]
    targets = [torch.from_numpy(t).to(device) for t, _ in samples]
    images = [torch.from_numpy(i).to(device) for _, i in samples]
    batch = nk.bilateral_solver(Ragged.pack(targets), Ragged.pack(images), backend=backend)
    for target, image, result in zip(targets, images, batch.grids(), strict=True):
        assert torch.equal(result, nk.bilateral_solver(target, image, backend=backend))


def test_images_of_a_batch_may_have_spatial_sigmas_of_their_own(backend, device):
    shapes, sigmas = [(40, 70), (1, 1), (0, 4), (97, 33), (64, 64)], [16, 1, 5, 3.7, 1000]
    columns = zip(
        *((*random_sample(s, h, w), random_confidence(s, h, w)) for s, (h, w) in enumerate(shapes)), strict=True
    )
    targets, images, confidences = ([torch.from_numpy(array).to(device) for array in column] for column in columns)
    whole = Ragged.pack(targets), Ragged.pack(images)
    for several in (sigmas, tuple(sigmas), np.array(sigmas), torch.tensor(sigmas, dtype=torch.float64, device=device)):
        result = nk.bilateral_solver(*whole, sigma_spatial=several, backend=backend)
        for target, image, sigma, one in zip(targets, images, sigmas, result.grids(), strict=True):
            assert torch.equal(one, nk.bilateral_solver(target, image, sigma_spatial=sigma, backend=backend))
    result = nk.bilateral_solver(*whole, sigma_spatial=sigmas, confidence=Ragged.pack(confidences), backend=backend)
    for *one, confidence, sigma, solved in zip(targets, images, confidences, sigmas, result.grids(), strict=True):
        alone = nk.bilateral_solver(*one, confidence=confidence, sigma_spatial=sigma, backend=backend)
        assert torch.equal(solved, alone)


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    samples = [random_sample(s, 60, 80) for s in range(6)]
    batch = [Ragged.pack([torch.from_numpy(p[i]) for p in samples]) for i in (0, 1)]
    first, *others = on_threads(lambda: nk.bilateral_solver(*batch).rows, (1, 2, 5))
    assert all(torch.equal(other, first) for other in others)


def test_instruction_levels_are_bit_identical(native_at_levels):
    script = """
rng = np.random.default_rng(0)
image = rng.integers(0, 99, (90 * 71, 3)).astype(np.uint8)
image[:2000] = image[:2000, :1]
target, out = rng.random(len(image), np.float32), np.empty(len(image), np.float32)
shape = np.array([0, len(image)], np.int32), np.array([[90, 71]], np.int32)
native.bilateral_solver(target, image, np.empty(0, np.float32), *shape, out, 0.999, [16.0], 20.5, 8.0, 256.0, 25, 1e-5)
result, confidence = out.tobytes(), rng.random(len(image), np.float32)
native.bilateral_solver(target, image, confidence, *shape, out, 1.0, [16.0], 20.5, 8.0, 256.0, 25, 1e-5)
print((result + out.tobytes()).hex())
"""

    results = native_at_levels(script)
    assert len(results["portable"][0]) == 2 * 90 * 71 * 8
    assert all(result == results["portable"] for result in results.values())


def test_non_contiguous_views_and_other_dtypes():
    target, image = random_sample(5, 60, 90)
    expected = nk.bilateral_solver(
        np.ascontiguousarray(target.T[3::2]), np.ascontiguousarray(image[:, 3::2].swapaxes(0, 1))
    )
    views = torch.from_numpy(target).T[3::2], torch.from_numpy(image)[:, 3::2].transpose(0, 1)
    assert np.array_equal(nk.bilateral_solver(*views).numpy(), expected)
    assert np.array_equal(nk.bilateral_solver(views[0].bool(), views[1]).numpy(), expected)
    image_bgr = np.ascontiguousarray(image[..., ::-1])
    assert np.array_equal(nk.bilateral_solver(target, image_bgr[..., ::-1]), nk.bilateral_solver(target, image))


@pytest.mark.parametrize("shape", [(37, 50), (1, 1), (0, 4), (9, 0)])
def test_numpy_arrays_equal_tensors(monkeypatch, shape):
    """Numpy arrays bypass torch: results are bit-identical to those of tensors, and every element is written."""
    target, image = random_sample(5, *shape)
    expected = nk.bilateral_solver(torch.from_numpy(target), torch.from_numpy(image), smoothness=64.0, iterations=7)
    image.flags.writeable = False
    plain = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: np.full_like(plain(*a, **k), np.nan))
    for kind in (target, target.astype(bool), np.asfortranarray(target)):
        result = nk.bilateral_solver(kind, image, smoothness=64.0, iterations=7)
        assert isinstance(result, np.ndarray) and result.dtype == np.float32
        np.testing.assert_array_equal(result, expected.numpy())


def test_every_output_is_written(monkeypatch, backend, device):
    sample = random_sample(6, 31, 47)
    expected = solve(*sample, backend, device)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    assert np.array_equal(solve(*sample, backend, device), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_raises_with_the_image(backend, device, value):
    samples = [random_sample(s, 20, 30) for s in range(3)]
    samples[1][0][7, 9] = value
    batch = [Ragged.pack([torch.from_numpy(p[i]).to(device) for p in samples]) for i in (0, 1)]
    if backend == "cuda":  # it does not wait for the GPU
        finite = [grid.isfinite().all().item() for grid in nk.bilateral_solver(*batch, backend=backend).grids()]
        assert finite == [True, False, True]
        return
    with pytest.raises(ValueError, match=r"bilateral_solver: target .*image 1 "):
        nk.bilateral_solver(*batch, backend=backend)


def test_invalid_arguments_raise():
    target, image = torch.zeros(4, 6), torch.zeros(4, 6, 3, dtype=torch.uint8)
    for bad, kind, message in [
        ((target.byte(), image), TypeError, "target must be float32 or .* or bool, but is uint8"),
        ((target, image.float()), TypeError, "image must be uint8, but is float32"),
        ((target[0], image), ValueError, r"target must have 2 dimensions, but has shape \[6\]"),
        ((target, image[..., 0]), ValueError, r"image must have 3 dimensions, but has shape \[4, 6\]"),
        ((target, image[..., :2]), ValueError, "image must have 3 channels, but has 2"),
        ((target.T, image), ValueError, r"image and target must have .* but have \[4, 6\] and \[6, 4\]"),
        ((Ragged.pack([target]), image.transpose(0, 1)), ValueError, "image and target must have the same height and"),
        ((target, [[0]]), TypeError, "image must be a numpy array, a torch tensor or a Ragged, but is list"),
        ((target.to("meta"), image), ValueError, "image must be on meta, like target, but is on cpu"),
    ]:
        with pytest.raises(kind, match=f"bilateral_solver: {message}"):
            nk.bilateral_solver(*bad)
    for name, values, message in [
        ("confidence", (0, 1.1, -1, float("nan")), "above 0 and at most 1"),
        ("sigma_spatial", (0.9, 0, float("inf"), float("nan")), "finite and at least 1"),
        ("sigma_luma", (0.9, -16), "finite and at least 1"),
        ("sigma_chroma", (0.9, -8), "finite and at least 1"),
        ("smoothness", (-1, float("inf")), "finite and at least 0"),
        ("iterations", (-1,), "at least 0"),
        ("tolerance", (-1e-9, float("nan")), "finite and at least 0"),
    ]:
        for value in values:
            with pytest.raises(ValueError, match=f"bilateral_solver: {name} must be {message}, but is {value}"):
                nk.bilateral_solver(target, image, **{name: value})
    batch = Ragged.pack([target] * 3), Ragged.pack([image] * 3)
    for sigmas, count in ([16, 16], 2), (np.full(4, 16.0), 4), (torch.ones(0), 0):
        message = f"sigma_spatial must be one number, or one for each of the 3 images, but has {count}"
        with pytest.raises(ValueError, match=f"bilateral_solver: {message}"):
            nk.bilateral_solver(*batch, sigma_spatial=sigmas)
    with pytest.raises(ValueError, match=r"sigma_spatial must be .* for each of the 1 images, but has 2"):
        nk.bilateral_solver(target.numpy(), image.numpy(), sigma_spatial=[16, 16])
    for sigmas, kind, message in (
        ([16, 0.5, 16], ValueError, "finite and at least 1"),
        ([16, 16, "a"], TypeError, "a number"),
    ):
        with pytest.raises(kind, match=f"bilateral_solver: sigma_spatial must be {message}, but is "):
            nk.bilateral_solver(*batch, sigma_spatial=sigmas)
    with pytest.raises(ValueError, match="bilateral_solver: backend 'cuda' cannot run"):
        nk.bilateral_solver(target, image, backend="cuda")


def test_opcheck():
    target, image = map(torch.from_numpy, random_sample(2, 12, 9))
    batch = Ragged.pack([target])
    arguments = (batch.rows, Ragged.pack([image]).rows, torch.rand(len(batch.rows)), batch.offsets, batch.shapes)
    op = torch.ops.namedmask_kernels.bilateral_solver
    torch.library.opcheck(op, (*arguments, 0.999, [16.0], 16.0, 8.0, 256.0, 25, 1e-5, "cpu"))


def random_confidence(seed, h, w):
    """Confidence from 0 to 1: noise, with a rectangle and scattered pixels of 0."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((h, w), np.float32) * (rng.random((h, w)) < 0.7)
    confidence[h // 4 : h // 2, w // 5 : w // 2] = 0
    return confidence.astype(np.float32)


def test_confidence_image_equals_scipy():
    """The reference in float64 against sparse matrices and a direct solver."""
    (target, image), confidence = random_sample(4, 60, 80), random_confidence(4, 60, 80)
    sizes, smoothness = (4, 100, 260), 100.0
    vertex, edges = reference.grid(reference.cells(image, *sizes))
    rows, columns = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    mass, weights = np.bincount(vertex).astype(float), np.bincount(vertex, confidence.ravel())
    assert (weights == 0).sum() > 10
    upper = sparse.coo_array((np.ones(len(rows)), (rows, columns)), (len(mass), len(mass)))
    adjacent = (upper + upper.T).tocsr()
    scale = np.ones(len(mass))
    for _ in range(10):
        scale = np.sqrt(scale * mass / (10 * scale + adjacent @ scale))
    links = sparse.diags_array(scale) @ adjacent @ sparse.diags_array(scale)
    system = smoothness * (sparse.diags_array(links.sum(1)) - links) + sparse.diags_array(weights)
    right = np.bincount(vertex, (confidence.astype(float) * target).ravel())
    expected = sparse.linalg.spsolve(system.tocsc(), right)[vertex].reshape(target.shape)
    names = dict(zip(("sigma_spatial", "sigma_luma", "sigma_chroma"), sizes, strict=True))
    exactly = {"smoothness": smoothness, "iterations": 5000, "tolerance": 1e-13}
    result = exact(target, image, confidence=confidence, **names, **exactly)
    np.testing.assert_allclose(result, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(97, 131), (64, 48), (1, 300), (300, 1), (17, 16), (1, 1)])
@pytest.mark.parametrize(("sigmas", "smoothness"), [((16, 16, 8), 256.0), ((7.3, 5.5, 3.25), 256.0), ((1, 1, 1), 1.0)])
def test_confidence_image_equals_reference(backend, device, shape, sigmas, smoothness):
    (target, image), confidence = random_sample(3, *shape), random_confidence(3, *shape)
    parameters = dict(zip(("sigma_spatial", "sigma_luma", "sigma_chroma"), sigmas, strict=True))
    parameters["smoothness"] = smoothness
    result = solve(target, image, backend, device, confidence=torch.from_numpy(confidence).to(device), **parameters)
    expected = exact(target, image, confidence=confidence, **parameters)
    np.testing.assert_allclose(result, expected, atol=5e-4)  # in regions with little confidence
    assert np.abs(result - expected).mean() < 2e-5


def test_constant_confidence_image_equals_the_number(backend, device):
    target, image = random_sample(5, 70, 90)
    for value in (1.0, 0.25):
        confidence = torch.full(target.shape, value, device=device)
        result = solve(target, image, backend, device, confidence=confidence)
        np.testing.assert_allclose(result, solve(target, image, backend, device, confidence=value), atol=1e-6)


def test_pixels_without_confidence_have_no_influence(backend, device):
    (target, image), confidence = random_sample(6, 60, 80), random_confidence(6, 60, 80)
    other = np.where(confidence == 0, 7.0, target).astype(np.float32)
    confidence = torch.from_numpy(confidence).to(device)
    first, second = (solve(t, image, backend, device, confidence=confidence) for t in (target, other))
    np.testing.assert_allclose(first, second, atol=1e-6)
    constant = solve(np.full_like(target, 0.75), image, backend, device, confidence=confidence)
    np.testing.assert_allclose(constant, 0.75, atol=1e-6)
    nothing = solve(target, image, backend, device, confidence=torch.zeros_like(confidence))
    assert not nothing.any()
    unsmoothed = solve(target, image, backend, device, confidence=confidence, smoothness=0.0)
    assert np.isfinite(unsmoothed).all()


def test_confidence_images_of_a_batch(backend, device):
    shapes = [(40, 70), (1, 1), (0, 4), (33, 50)]
    samples = [(*random_sample(s, h, w), random_confidence(s, h, w)) for s, (h, w) in enumerate(shapes)]
    columns = [[torch.from_numpy(array).to(device) for array in column] for column in zip(*samples, strict=True)]
    targets, images, confidences = map(Ragged.pack, columns)
    batch = nk.bilateral_solver(targets, images, confidence=confidences, backend=backend)
    for target, image, confidence, result in zip(*columns, batch.grids(), strict=True):
        assert torch.equal(result, nk.bilateral_solver(target, image, confidence=confidence, backend=backend))
    empty = Ragged.of_shapes(torch.zeros(0, device=device), [])
    image = empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8, device=device))
    assert nk.bilateral_solver(empty, image, confidence=empty, backend=backend).rows.shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
def test_confidence_outside_of_0_to_1_raises_with_the_image(backend, device, value):
    samples = [(*random_sample(s, 20, 30), random_confidence(s, 20, 30)) for s in range(3)]
    samples[1][2][7, 9] = value
    targets, images, confidence = (
        Ragged.pack([torch.from_numpy(array).to(device) for array in column]) for column in zip(*samples, strict=True)
    )
    if backend == "cuda":  # it does not wait for the GPU
        result = nk.bilateral_solver(targets, images, confidence=confidence, backend=backend)
        assert [grid.isfinite().all().item() for grid in result.grids()] == [True, False, True]
        return
    with pytest.raises(ValueError, match="bilateral_solver: confidence must be from 0 to 1, but image 1 holds other"):
        nk.bilateral_solver(targets, images, confidence=confidence, backend=backend)


def test_confidence_images_of_any_kind():
    (target, image), confidence = random_sample(7, 40, 50), random_confidence(7, 40, 50)
    expected = nk.bilateral_solver(
        torch.from_numpy(target), torch.from_numpy(image), confidence=torch.from_numpy(confidence)
    )
    for kind in (confidence, confidence.astype(np.float64), np.asfortranarray(confidence)):
        result = nk.bilateral_solver(target, image, confidence=kind)
        assert isinstance(result, np.ndarray) and np.array_equal(result, expected.numpy())
    known = confidence > 0.5
    binary = nk.bilateral_solver(target, image, confidence=known.astype(np.float32))
    assert np.array_equal(nk.bilateral_solver(target, image, confidence=known), binary)
    for bad, kind, message in [
        (confidence.T, ValueError, "confidence and target must have the same height and width"),
        (confidence[0], ValueError, r"confidence must have 2 dimensions, but has shape \[50\]"),
        (confidence.astype(int), TypeError, "confidence must be float32 or .* but is int64"),
        ([0.5], TypeError, r"confidence must be a number, but is \[0.5\]"),
        (confidence + 1, ValueError, "confidence must be from 0 to 1, but image 0 holds other values"),
    ]:
        with pytest.raises(kind, match=f"bilateral_solver: {message}"):
            nk.bilateral_solver(target, image, confidence=bad)


@pytest.mark.parametrize("number", [1e-45, 1e-30, 1e-9])
def test_extreme_confidences_give_finite_results(backend, device, number):
    (target, image), confidence = random_sample(8, 30, 40), random_confidence(8, 30, 40)
    for values in (confidence * np.float32(number), np.where(confidence > 0.8, confidence, number).astype(np.float32)):
        for smoothness in (0.0, 1e-30, 256.0, 1e300):
            options = {"confidence": torch.from_numpy(values).to(device), "smoothness": smoothness}
            result = solve(target, image, backend, device, **options)
            assert np.isfinite(result).all()


def test_torch_compile_with_a_confidence_image():
    target, image, confidence = map(torch.from_numpy, (*random_sample(9, 12, 17), random_confidence(9, 12, 17)))
    compiled = torch.compile(nk.bilateral_solver, fullgraph=True, backend="eager")
    expected = nk.bilateral_solver(target, image, confidence=confidence)
    assert torch.equal(compiled(target, image, confidence=confidence), expected)
