# SPDX-License-Identifier: MIT
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.reference import dense_crf as reference

BACKENDS = ["cpu", "cuda", "reference"]
CASES = {"A": (80.0, 13.0, 10.0), "B": (50.0, 5.0, 10.0)}  # parameters of the bilateral kernel in the golden arrays


def random_sample(seed, h, w, labels=2):
    """(probabilities, image): smooth colors with noise, and probabilities that roughly follow them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(h, w, 1)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (max(3, labels), 3))]
    image = (128 + 90 * np.stack(waves[:3], axis=-1) + rng.normal(0, 8, (h, w, 3))).clip(0, 255).astype(np.uint8)
    scores = np.stack(waves[:labels], axis=-1) + rng.normal(0, 1, (h, w, labels))
    return torch.from_numpy(scores).float().softmax(-1), torch.from_numpy(image)


def exact(probabilities, image, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0)):
    """The reference: brute force in float64."""
    return reference.dense_crf(probabilities.double(), image, iterations, *gaussian, *bilateral)


@pytest.fixture(scope="module")
def coffee(golden):
    """(probabilities, image, arrays): the coffee image and the results of pydensecrf and of brute force."""
    arrays = golden("densecrf")
    foreground = torch.from_numpy(arrays["fg_in"]).float()
    return (
        torch.stack([1 - foreground, foreground], dim=-1),
        torch.from_numpy(golden("bilateral")["coffee_photo"]),
        arrays,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("iterations", [1, 10])
def test_equals_pydensecrf_and_is_as_close_to_brute_force(coffee, case, iterations, backend, device):
    if backend == "reference":
        pytest.skip("brute force takes minutes on an image of this size; its result is among the golden arrays")
    probabilities, image, arrays = coffee
    parameters = {"iterations": iterations, "bilateral": CASES[case], "backend": backend}
    result = nk.dense_crf(probabilities.to(device), image.to(device), **parameters)[..., 1].cpu()
    peer = torch.from_numpy(arrays[f"{case}_it{iterations}"]).float()
    truth = torch.from_numpy(arrays[f"{case}_it{iterations}_exact"]).float()
    assert (result - peer).abs().mean() < 2e-3
    assert ((result > 0.5) == (peer > 0.5)).float().mean() >= 0.998
    if iterations == 1:  # the rest of the difference is due to pydensecrf's coarser smoothness kernel
        assert (result - peer).abs().max() < 5e-3
    # The golden arrays are float16: errors of at most 2.5e-4, less than 1e-4 on average.
    assert (result - truth).abs().mean() <= (peer - truth).abs().mean() + 1e-4
    assert ((result > 0.5) == (truth > 0.5)).float().mean() >= ((peer > 0.5) == (truth > 0.5)).float().mean() - 1e-4


def test_reference_equals_a_dense_matrix():
    """All kernel entries in one numpy matrix."""
    probabilities, image = random_sample(0, 7, 9, labels=3)
    (sigma, weight), (sigma_xy, sigma_rgb, bilateral_weight) = (2.5, 3.0), (6.0, 20.0, 4.0)
    position = np.array([(x, y) for y in range(7) for x in range(9)], np.float64)
    color = image.numpy().reshape(-1, 3).astype(np.float64)
    matrix = np.zeros((63, 63))
    for features, w in (
        (position / sigma, weight),
        (np.hstack([position / sigma_xy, color / sigma_rgb]), bilateral_weight),
    ):
        kernel = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(-1))
        norm = 1 / np.sqrt(kernel.sum(1))
        matrix += w * norm[:, None] * kernel * norm
    log_unary = np.log(probabilities.double().numpy().reshape(-1, 3).clip(1e-5, 1))
    q = np.exp(log_unary) / np.exp(log_unary).sum(1, keepdims=True)
    for _ in range(4):
        q = np.exp(log_unary + matrix @ q)
        q /= q.sum(1, keepdims=True)
    result = exact(probabilities, image, 4, (sigma, weight), (sigma_xy, sigma_rgb, bilateral_weight))
    np.testing.assert_allclose(result.reshape(-1, 3), q, atol=1e-12)


@pytest.mark.parametrize("labels", [1, 2, 3, 8, 21, 40])
def test_close_to_the_reference(backend, device, labels):
    """The lattice is an approximation: compare after few updates, and labels only where the margin is clear."""
    probabilities, image = random_sample(labels, 33, 41, labels)
    parameters = {"iterations": 3, "bilateral": (80.0, 13.0, 3.0)}
    truth = exact(probabilities, image, **parameters)
    result = nk.dense_crf(probabilities.to(device), image.to(device), **parameters, backend=backend).cpu()
    assert result.dtype == torch.float32
    assert (result - truth).abs().mean() < 0.015
    best = truth.topk(min(2, labels), dim=-1).values
    clear = best[..., 0] - best[..., -1] > 0.1 if labels > 1 else torch.ones(33, 41, dtype=torch.bool)
    assert (result.argmax(-1) == truth.argmax(-1))[clear].float().mean() >= 0.985


@functools.cache
def gaussian_alone(shape, sigma, labels):
    """(probabilities, image), settings, and the reference's marginals."""
    sample = random_sample(5, *shape, labels)
    parameters = {"iterations": 2, "gaussian": (sigma, 3.0), "bilateral": (80.0, 13.0, 0.0)}
    return sample, parameters, exact(*sample, **parameters)


@pytest.mark.parametrize("shape", [(20, 57), (1, 90), (90, 1), (3, 2)])
@pytest.mark.parametrize("sigma", [1e-9, 1.0, 2.9, 3.0, 4.4, 7.0, 31.0, 1e9])
@pytest.mark.parametrize("labels", [2, 3])
def test_the_gaussian_alone_is_nearly_exact(shape, sigma, labels, backend, device):
    sample, parameters, truth = gaussian_alone(shape, sigma, labels)
    result = nk.dense_crf(*(x.to(device) for x in sample), **parameters, backend=backend).cpu()
    np.testing.assert_allclose(result, truth, atol=2e-3)


SAMPLES = st.tuples(st.integers(0, 99), st.integers(1, 24), st.integers(1, 24), st.integers(1, 12))
PARAMETERS = st.fixed_dictionaries(
    {
        "iterations": st.integers(0, 4),
        "gaussian": st.sampled_from([(3.0, 3.0), (1.0, 0.0), (10.0, 5.0)]),
        "bilateral": st.sampled_from([(80.0, 13.0, 10.0), (5.0, 3.0, 2.5), (50.0, 5.0, 0.0)]),
    }
)


@settings(max_examples=40)
@given(sample=SAMPLES, parameters=PARAMETERS, seed=st.integers(0, 99))
def test_marginals_sum_to_one_and_commute_with_permutations_of_the_labels(backend, device, sample, parameters, seed):
    probabilities, image = (a.to(device) for a in random_sample(*sample))
    result = nk.dense_crf(probabilities, image, **parameters, backend=backend)
    assert result.shape == probabilities.shape and result.min() >= 0
    torch.testing.assert_close(result.sum(-1), torch.ones_like(result[..., 0]), atol=1e-5, rtol=0)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(probabilities.shape[2])).to(device)
    permuted = nk.dense_crf(probabilities[..., order], image, **parameters, backend=backend)
    torch.testing.assert_close(permuted, result[..., order], atol=2e-5, rtol=0)


@settings(max_examples=40)
@given(
    probabilities=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
        elements=st.floats(-1, 2, width=32),
    ),
    off=st.booleans(),
)
def test_no_iterations_and_no_weights_give_the_softmax_of_the_unary(backend, device, probabilities, off):
    tensor = torch.from_numpy(probabilities).to(device)
    image = torch.zeros(*tensor.shape[:2], 3, dtype=torch.uint8, device=device)
    changes = {"gaussian": (3.0, 0.0), "bilateral": (80.0, 13.0, 0.0)} if off else {"iterations": 0}
    result = nk.dense_crf(tensor, image, **changes, backend=backend)
    expected = tensor.double().clamp(1e-5, 1).log().softmax(-1).float()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("labels", [3, 11, 23, 41])
@pytest.mark.parametrize(
    ("h", "w", "sigma"),
    [
        (50, 70, 3.0),
        *((h, w, 3.0) for h, w in [(15, 64), (16, 65), (17, 63), (33, 129), (1, 145), (49, 128)]),  # tiles: 16 x 64
        *((41, w, sigma) for w in (95, 97) for sigma in (0.5, 1.6, 5.0, 40.0)),  # other tiles, and one
    ],
)
def test_two_labels_filtered_as_one_channel_equal_those_filtered_in_tiles(h, w, sigma, labels):
    probabilities, image = random_sample(8, h, w, 2)
    absent = torch.zeros(h, w, labels - 2)  # labels with probability 0 everywhere
    settings = {"gaussian": (sigma, 3.0)}
    result = nk.dense_crf(probabilities, image, **settings)
    tiled = nk.dense_crf(torch.cat([probabilities, absent], dim=-1), image, **settings)
    torch.testing.assert_close(result, tiled[..., :2], atol=1e-3, rtol=0)


def test_more_labels_and_vertices_than_a_thread_block_has_room_for(backend, device):
    """Of a tile of 16 x 16 pixels of noise, which has 1,500 vertices, the CUDA version keeps 53 with 152 channels."""
    rng = np.random.default_rng(9)
    image = torch.from_numpy(rng.integers(0, 256, (17, 35, 3)).astype(np.uint8))
    probabilities = torch.from_numpy(rng.random((17, 35, 150), np.float32) ** 9).softmax(-1)
    settings = {"iterations": 3, "bilateral": (80.0, 40.0, 10.0)}
    result = nk.dense_crf(probabilities.to(device), image.to(device), **settings, backend=backend).cpu()
    if backend == "reference":
        torch.testing.assert_close(result.sum(-1), torch.ones(17, 35))
    else:
        expected = nk.dense_crf(probabilities, image, **settings, backend="cpu")
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_degenerate_images(backend, device):
    for shape in [(0, 5, 2), (5, 0, 3), (0, 0, 2), (4, 6, 0)]:
        result = nk.dense_crf(
            torch.zeros(shape, device=device),
            torch.zeros(*shape[:2], 3, dtype=torch.uint8, device=device),
            backend=backend,
        )
        assert result.shape == shape and result.dtype == torch.float32
    one = torch.tensor([[[0.3, 0.2, 0.5]]], device=device)
    result = nk.dense_crf(one, torch.full((1, 1, 3), 255, dtype=torch.uint8, device=device), backend=backend)
    torch.testing.assert_close(result.cpu(), exact(one.cpu(), torch.full((1, 1, 3), 255)).float(), atol=1e-4, rtol=0)
    empty = Ragged.of_shapes(torch.zeros(0, 4, device=device), [])
    image = empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8, device=device))
    assert nk.dense_crf(empty, image, backend=backend).rows.shape == (0, 4)


@pytest.mark.parametrize("labels", [2, 5])
def test_results_do_not_depend_on_batch_composition(backend, device, labels):
    shapes = [(20, 33), (1, 1), (0, 4), (27, 13), (16, 16), (5, 50)]
    samples = [[a.to(device) for a in random_sample(s, h, w, labels)] for s, (h, w) in enumerate(shapes)]
    packed = Ragged.pack([p for p, _ in samples]), Ragged.pack([i for _, i in samples])
    batch = nk.dense_crf(*packed, iterations=2, backend=backend)
    for (probabilities, image), result in zip(samples, batch.grids(), strict=True):
        assert torch.equal(result, nk.dense_crf(probabilities, image, iterations=2, backend=backend))


@pytest.mark.parametrize("labels", [2, 5])
def test_images_of_a_batch_may_have_spatial_sigmas_of_their_own(backend, device, labels):
    shapes = [(20, 33), (1, 1), (0, 4), (27, 13), (16, 16)]
    narrow, wide = [3.0, 1.0, 2.0, 9.5, 0.3], [80.0, 7.0, 9.0, 50.0, 3.5]
    samples = [[a.to(device) for a in random_sample(s, h, w, labels)] for s, (h, w) in enumerate(shapes)]
    packed = Ragged.pack([p for p, _ in samples]), Ragged.pack([i for _, i in samples])

    def alone(number, gaussian, bilateral):
        kernels = {"gaussian": (gaussian, 3), "bilateral": (bilateral, 13, 10)}
        return nk.dense_crf(*samples[number], iterations=2, **kernels, backend=backend)

    for gaussian, bilateral in (narrow, torch.tensor(wide, dtype=torch.float64)), (3.0, np.array(wide)), (narrow, 80.0):
        kernels = {"gaussian": (gaussian, 3), "bilateral": (bilateral, 13, 10)}
        batch = nk.dense_crf(*packed, iterations=2, **kernels, backend=backend)
        for number, result in enumerate(batch.grids()):
            own = [v if isinstance(v, float) else float(v[number]) for v in (gaussian, bilateral)]
            assert torch.equal(result, alone(number, *own))


@pytest.mark.parametrize("labels", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(labels, on_threads):
    samples = [random_sample(s, 60, 80, labels) for s in range(6)]
    batch = [Ragged.pack([p[i] for p in samples]) for i in (0, 1)]
    alone = random_sample(9, 300, 240, labels)
    first, *others = on_threads(lambda: (nk.dense_crf(*batch).rows, nk.dense_crf(*alone)), (1, 2, 5))
    for batched, single in others:
        assert torch.equal(batched, first[0]) and torch.equal(single, first[1])


def test_instruction_levels_agree(native_at_levels):
    script = """
rng = np.random.default_rng(0)
image = rng.integers(0, 99, (50 * 61, 3)).astype(np.uint8)
shape = np.array([0, len(image)], np.int32), np.array([[50, 61]], np.int32)
for labels in (2, 5):
    probabilities = rng.random((len(image), labels), np.float32)
    out = np.full_like(probabilities, np.nan)
    native.dense_crf(probabilities, image, *shape, out, 3, [3.0], 3.0, [80.0], 13.0, 10.0)
    print(out.tobytes().hex())
"""

    results = [
        [np.frombuffer(bytes.fromhex(marginals), np.float32) for marginals in printed]
        for printed in native_at_levels(script).values()
    ]
    for result in results:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_non_contiguous_views_and_other_dtypes():
    probabilities, image = random_sample(5, 60, 90, 3)
    views = probabilities.transpose(0, 1)[3::2].flip(-1), image.transpose(0, 1)[3::2]
    expected = nk.dense_crf(*(v.contiguous() for v in views))
    assert torch.equal(nk.dense_crf(*views), expected)
    result = nk.dense_crf(*(v.numpy() for v in views))
    assert isinstance(result, np.ndarray) and np.array_equal(result, expected.numpy())


@pytest.mark.parametrize("labels", [2, 3])
def test_every_output_is_written(backend, device, labels, monkeypatch):
    probabilities, image = (a.to(device) for a in random_sample(6, 21, 27, labels))
    expected = nk.dense_crf(probabilities, image, backend=backend)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    assert torch.equal(nk.dense_crf(probabilities, image, backend=backend), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("labels", [2, 3])
def test_probabilities_that_are_not_finite_raise_with_the_image(backend, device, value, labels):
    samples = [random_sample(s, 20, 30, labels) for s in range(3)]
    samples[1][0][7, 9, 1] = value
    batch = [Ragged.pack([p[i].to(device) for p in samples]) for i in (0, 1)]
    with pytest.raises(ValueError, match=r"dense_crf: probabilities .*image 1 "):
        nk.dense_crf(*batch, backend=backend)


def test_invalid_arguments_raise():
    probabilities, image = torch.zeros(4, 6, 2), torch.zeros(4, 6, 3, dtype=torch.uint8)
    for bad, kind, message in [
        ((probabilities > 0, image), TypeError, "probabilities must be float32 or .*, but is bool"),
        ((probabilities, image.float()), TypeError, "image must be uint8, but is float32"),
        ((probabilities[0], image), ValueError, r"probabilities must have 3 dimensions, but has shape \[6, 2\]"),
        ((probabilities, image[..., 0]), ValueError, r"image must have 3 dimensions, but has shape \[4, 6\]"),
        ((probabilities, image[..., :2]), ValueError, "image must have 3 channels, but has 2"),
        (
            (probabilities[1:], image),
            ValueError,
            r"image and probabilities must have .* but have \[4, 6\] and \[3, 6\]",
        ),
        ((Ragged.pack([probabilities]), image.transpose(0, 1)), ValueError, "image and probabilities must have the"),
        ((probabilities, [[0]]), TypeError, "image must be a numpy array, a torch tensor or a Ragged, but is list"),
        ((probabilities.to("meta"), image), ValueError, "image must be on meta, like probabilities, but is on cpu"),
    ]:
        with pytest.raises(kind, match=f"dense_crf: {message}"):
            nk.dense_crf(*bad)
    for name, values, message in [
        ("gaussian", ((3.0,), (3.0, 1.0, 2.0)), r"must be \(sigma_xy, weight\), but is "),
        ("bilateral", ((80.0, 13.0),), r"must be \(sigma_xy, sigma_rgb, weight\), but is "),
        ("gaussian", ((0.0, 3.0), (3.0, float("nan"))), "must be finite with sigmas above 0, but is "),
        ("bilateral", ((80.0, -1.0, 3.0), (float("inf"), 1.0, 1.0)), "must be finite with sigmas above 0, but is "),
        ("iterations", (-1,), "must be at least 0, but is -1"),
    ]:
        for value in values:
            with pytest.raises(ValueError, match=f"dense_crf: {name} {message}"):
                nk.dense_crf(probabilities, image, **{name: value})
    with pytest.raises(ValueError, match=r"dense_crf: the sigmas of bilateral are too small for image 0 of 4 x 6"):
        nk.dense_crf(probabilities, image, bilateral=(80.0, 0.01, 10.0), backend="cpu")
    with pytest.raises(ValueError, match="dense_crf: backend 'cuda' cannot run"):
        nk.dense_crf(probabilities, image, backend="cuda")


def test_opcheck():
    probabilities, image = random_sample(2, 12, 9, 3)
    batch = Ragged.pack([probabilities])
    arguments = (batch.rows, Ragged.pack([image]).rows, batch.offsets, batch.shapes)
    op = torch.ops.namedmask_kernels.dense_crf
    torch.library.opcheck(op, (*arguments, 3, [3.0], 3.0, [80.0], 13.0, 10.0, "cpu"))


def test_explain_names_the_backend():
    text = nk.explain(nk.dense_crf, *random_sample(0, 3, 3))
    assert text.splitlines()[0] == "dense_crf on cpu: cpu"
