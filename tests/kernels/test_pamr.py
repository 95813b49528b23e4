# SPDX-License-Identifier: MIT
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import namedmask_kernels as nk
from namedmask_kernels import Ragged, backends
from namedmask_kernels.reference import pamr as reference

BACKENDS = ["cpu", "reference"]
DILATIONS = (1, 2, 4, 8, 12, 24)


def exact(masks, image, dilations=DILATIONS, iterations=10):
    """The reference in float64; masks [H, W, L], image [H, W, 3], numpy."""
    return reference.pamr(torch.from_numpy(masks).double(), torch.from_numpy(image), dilations, iterations).numpy()


def random_sample(seed, h, w, labels):
    """(masks that sum to 1, image): smooth colors with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(h, w, 1)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    image = (128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 8, (h, w, 3))).clip(0, 255).astype(np.uint8)
    scores = rng.random((h, w, labels)) ** 4
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32), image


@pytest.mark.parametrize("iterations", [1, 10])
def test_equals_the_published_code(golden, iterations):
    arrays = golden("pamr")
    masks = np.ascontiguousarray(arrays["masks"].transpose(1, 2, 0), np.float32)
    image = golden("bilateral")["coffee_photo"]
    expected = arrays[f"refined_{iterations}"].transpose(1, 2, 0)
    for backend in BACKENDS:
        result = nk.pamr(masks, image, iterations=iterations, backend=backend)
        np.testing.assert_allclose(result[::2, ::2], expected, rtol=0, atol=1e-5)
    truth = exact(masks, image, iterations=iterations)
    np.testing.assert_allclose(truth[::2, ::2], expected, rtol=0, atol=1e-5)


IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 37), st.just(3)))
PARAMETERS = st.fixed_dictionaries(
    {
        "dilations": st.lists(st.integers(1, 40), min_size=1, max_size=7),
        "iterations": st.integers(0, 4),
    }
)


@settings(max_examples=60)
@given(image=IMAGES, labels=st.integers(1, 30), seed=st.integers(0, 99), parameters=PARAMETERS)
def test_cpu_equals_reference_on_small_images(image, labels, seed, parameters):
    masks = np.random.default_rng(seed).random((*image.shape[:2], labels), np.float32)
    result = nk.pamr(masks, image, **parameters, backend="cpu")
    np.testing.assert_allclose(result, exact(masks, image, **parameters), rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", [(97, 131), (64, 48), (1, 300), (300, 1), (17, 16), (40, 257)])
def test_cpu_equals_reference_on_images(shape):
    masks, image = random_sample(3, *shape, 3)
    np.testing.assert_allclose(nk.pamr(masks, image, backend="cpu"), exact(masks, image), rtol=0, atol=5e-5)


def test_several_strips_and_groups_of_labels():
    masks, image = random_sample(1, 60, 400, 53)
    result = nk.pamr(masks, image, iterations=3, backend="cpu")
    np.testing.assert_allclose(result, exact(masks, image, iterations=3), rtol=0, atol=5e-5)


def test_dilations_larger_than_the_image_end_at_its_border():
    masks, image = random_sample(2, 20, 37, 2)
    far = nk.pamr(masks, image, dilations=(1, 2**40), iterations=2)
    np.testing.assert_allclose(far, exact(masks, image, (1, 50), 2), rtol=0, atol=5e-5)


def test_removes_noise_within_regions_of_one_color():
    """Masks do not diffuse across a strong edge; noise on both sides of it is averaged out."""
    image = np.full((40, 60, 3), 30, np.uint8)
    image[10:30, 20:45] = (220, 200, 40)
    truth = (image[..., 0] > 100).astype(np.float32)
    noisy = np.where(np.random.default_rng(0).random(truth.shape) < 0.25, 1 - truth, truth)
    for backend in BACKENDS:
        result = nk.pamr(noisy, image, backend=backend)
        assert ((result > 0.5) == (truth > 0.5)).all()


@settings(max_examples=40)
@given(image=IMAGES, value=st.floats(-100, 100, width=32), seed=st.integers(0, 99), parameters=PARAMETERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_preserves_constants_and_ranges(backend, image, value, seed, parameters):
    masks = np.random.default_rng(seed).normal(size=(*image.shape[:2], 3)).astype(np.float32)
    masks[..., 1] = value
    result = nk.pamr(masks, image, **parameters, backend=backend)
    np.testing.assert_allclose(result[..., 1], value, rtol=1e-5, atol=1e-30)
    slack = 1e-5 * np.abs(masks).max((0, 1)) + 1e-30  # fractions of the smallest float round to 0
    assert (result >= masks.min((0, 1)) - slack).all()
    assert (result <= masks.max((0, 1)) + slack).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_do_not_influence_each_other(backend):
    masks, image = random_sample(2, 30, 45, 27)
    together = nk.pamr(masks, image, iterations=3, backend=backend)
    np.testing.assert_allclose(together.sum(-1), 1, atol=1e-5)
    for label in (0, 7, 8, 23, 26):
        assert np.array_equal(nk.pamr(masks[..., label], image, iterations=3, backend=backend), together[..., label])
    masks[3, 4, 7] = np.nan
    masks[20, 40, 8] = np.inf
    spread = nk.pamr(masks, image, iterations=3, backend=backend)
    assert np.isnan(spread[..., 7]).any() and not np.isfinite(spread[..., 8]).all()
    others = [label for label in range(27) if label not in (7, 8)]
    assert np.array_equal(spread[..., others], together[..., others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_images(backend):
    for shape in [(0, 5), (5, 0), (0, 0)]:
        result = nk.pamr(np.zeros((*shape, 2), np.float32), np.zeros((*shape, 3), np.uint8), backend=backend)
        assert result.shape == (*shape, 2) and result.dtype == np.float32
    one = nk.pamr(torch.tensor([[0.25]]), torch.full((1, 1, 3), 255, dtype=torch.uint8), backend=backend)
    assert one.shape == (1, 1) and one.item() == pytest.approx(0.25, rel=1e-6)
    masks, image = random_sample(0, 12, 20, 2)
    assert np.array_equal(nk.pamr(masks, image, iterations=0, backend=backend), masks)
    assert nk.pamr(masks[..., :0], image, backend=backend).shape == (12, 20, 0)
    empty = Ragged.of_shapes(torch.zeros(0, 4), [])
    samples = empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8))
    assert nk.pamr(empty, samples, backend=backend).rows.shape == (0, 4)


@pytest.mark.parametrize("labels", [None, 1, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_batch_composition(backend, labels):
    sizes = [(40, 70), (1, 1), (0, 4), (97, 33), (64, 64), (5, 200)]
    samples = [random_sample(s, h, w, labels or 1) for s, (h, w) in enumerate(sizes)]
    masks = [torch.from_numpy(m if labels else m[..., 0]) for m, _ in samples]
    images = [torch.from_numpy(i) for _, i in samples]
    batch = nk.pamr(Ragged.pack(masks), Ragged.pack(images), iterations=3, backend=backend)
    for mask, image, result in zip(masks, images, batch.grids(), strict=True):
        assert torch.equal(result, nk.pamr(mask, image, iterations=3, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_a_batch_may_have_dilations_of_their_own(backend):
    sizes = [(40, 70), (1, 1), (0, 4), (97, 33), (64, 64)]
    lists = [[1, 2, 4], [3], [1, 5], (24, 1, 2, 9, 2**40), range(1, 17)]
    samples = [[torch.from_numpy(array) for array in random_sample(s, h, w, 2)] for s, (h, w) in enumerate(sizes)]
    packed = Ragged.pack([m for m, _ in samples]), Ragged.pack([i for _, i in samples])
    batch = nk.pamr(*packed, dilations=lists, iterations=3, backend=backend)
    for sample, dilations, result in zip(samples, lists, batch.grids(), strict=True):
        assert torch.equal(result, nk.pamr(*sample, dilations=dilations, iterations=3, backend=backend))
    table = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    batch = nk.pamr(*packed, dilations=torch.from_numpy(table), iterations=3, backend=backend)
    assert torch.equal(batch.rows, nk.pamr(*packed, dilations=table, iterations=3, backend=backend).rows)
    assert torch.equal(batch.grids()[3], nk.pamr(*samples[3], dilations=[7, 8], iterations=3, backend=backend))
    empty = Ragged.of_shapes(packed[0].rows[:0], []), Ragged.of_shapes(packed[1].rows[:0], [])
    assert len(nk.pamr(*empty, dilations=[], backend=backend).shapes) == 0


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    samples = [random_sample(s, 60, 80, 5) for s in range(6)]
    batch = [Ragged.pack([torch.from_numpy(p[i]) for p in samples]) for i in (0, 1)]
    first, *others = on_threads(lambda: nk.pamr(*batch).rows, (1, 2, 5))
    assert all(torch.equal(other, first) for other in others)


def test_instruction_levels_agree(native_at_levels):
    script = """
rng = np.random.default_rng(0)
image = rng.integers(0, 99, (90 * 71, 3)).astype(np.uint8)
masks = rng.random((len(image), 11), np.float32)
out = np.full_like(masks, np.nan)
shape = np.array([0, len(image)], np.int32), np.array([[90, 71]], np.int32)
native.pamr(masks, image, *shape, out, [1, 2, 4, 8, 12, 24], [6], 10)
print(out.tobytes().hex())
"""

    results = {
        level: np.frombuffer(bytes.fromhex(values), np.float32).reshape(90, 71, 11)
        for level, (values,) in native_at_levels(script).items()
    }
    portable = results["portable"]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (90 * 71, 3)).astype(np.uint8).reshape(90, 71, 3)
    masks = rng.random((90 * 71, 11), np.float32).reshape(90, 71, 11)
    np.testing.assert_allclose(portable, exact(masks, image), rtol=0, atol=5e-5)
    for result in results.values():
        np.testing.assert_allclose(result, portable, rtol=0, atol=5e-5)


def test_non_contiguous_views():
    masks, image = random_sample(5, 60, 90, 4)
    expected = nk.pamr(
        np.ascontiguousarray(masks[:, 3::2, 1:3].swapaxes(0, 1)), np.ascontiguousarray(image[:, 3::2].swapaxes(0, 1))
    )
    views = torch.from_numpy(masks)[:, 3::2, 1:3].transpose(0, 1), torch.from_numpy(image)[:, 3::2].transpose(0, 1)
    assert np.array_equal(nk.pamr(*views).numpy(), expected)
    planes = torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))  # [L, H, W], as networks output them
    assert np.array_equal(nk.pamr(planes.permute(1, 2, 0), torch.from_numpy(image)).numpy(), nk.pamr(masks, image))
    before = masks.copy()
    nk.pamr(masks, image[..., ::-1])
    assert np.array_equal(masks, before)


def test_every_output_is_written(monkeypatch):
    masks, image = map(torch.from_numpy, random_sample(6, 31, 47, 10))
    expected = nk.pamr(masks, image)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    assert torch.equal(nk.pamr(masks, image), expected)


def test_invalid_arguments_raise():
    masks, image = torch.zeros(4, 6, 2), torch.zeros(4, 6, 3, dtype=torch.uint8)
    for bad, kind, message in [
        ((masks > 0, image), TypeError, "masks must be float32 or float64 or float16 or bfloat16, but is bool"),
        ((masks, image.float()), TypeError, "image must be uint8, but is float32"),
        ((masks[0, 0], image), ValueError, r"masks must have 3 dimensions, but has shape \[2\]"),
        ((masks[None], image), ValueError, r"masks must have 3 dimensions, but has shape \[1, 4, 6, 2\]"),
        ((masks, image[..., 0]), ValueError, r"image must have 3 dimensions, but has shape \[4, 6\]"),
        ((masks, image[..., :2]), ValueError, "image must have 3 channels, but has 2"),
        ((masks.transpose(0, 1), image), ValueError, r"image and masks must have .* but have \[4, 6\] and \[6, 4\]"),
        ((Ragged.pack([masks]), image.transpose(0, 1)), ValueError, "image and masks must have the same height and"),
        (([[0]], image), TypeError, "masks must be a numpy array, a torch tensor or a Ragged, but is list"),
        ((masks, [[0]]), TypeError, "image must be a numpy array, a torch tensor or a Ragged, but is list"),
        ((masks.to("meta"), image), ValueError, "image must be on meta, like masks, but is on cpu"),
    ]:
        with pytest.raises(kind, match=f"pamr: {message}"):
            nk.pamr(*bad)
    for dilations, message in [
        ((), "not be empty"),
        ((0,), "be at least 1, but is 0"),
        ((1, -2), "be at least 1, but is -2"),
        (range(1, 2**40), "have at most 16 elements"),
    ]:
        with pytest.raises(ValueError, match=f"pamr: dilations must {message}"):
            nk.pamr(masks, image, dilations=dilations)
    batch = Ragged.pack([masks] * 3), Ragged.pack([image] * 3)
    for dilations, message in [
        ([[1], [2]], "be one list, or one for each of the 3 images, but has 2"),
        ([[1], [2], []], "not be empty"),
        ([[1], [2], [0]], "be at least 1, but is 0"),
    ]:
        with pytest.raises(ValueError, match=f"pamr: dilations must {message}"):
            nk.pamr(*batch, dilations=dilations)
    with pytest.raises(TypeError, match="pamr: dilations must be a sequence of integers, but is 3"):
        nk.pamr(*batch, dilations=[[1], [2], 3])
    with pytest.raises(ValueError, match="pamr: iterations must be at least 0, but is -1"):
        nk.pamr(masks, image, iterations=-1)
    with pytest.raises(ValueError, match="pamr: backend 'cuda' cannot run"):
        nk.pamr(masks, image, backend="cuda")
    packed = masks.flatten(0, 1).numpy(), image.flatten(0, 1).numpy(), np.array([0, 24], np.int32)
    shapes, out = np.array([[4, 6]], np.int32), np.empty((24, 2), np.float32)
    with pytest.raises(ValueError, match="pamr: dilations must be"):
        backends.native().pamr(*packed, shapes, out, [0], [1], 1)
    for dilations, counts in ([1, 2], [1]), ([1], [0]), ([1] * 17, [17]):
        with pytest.raises(ValueError, match="pamr: dilations must be 1 to 16 numbers"):
            backends.native().pamr(*packed, shapes, out, dilations, counts, 1)
    with pytest.raises(ValueError, match="pamr: dilations must be one list, or one per image"):
        backends.native().pamr(*packed, shapes, out, [1, 2], [1, 1], 1)
    with pytest.raises(ValueError, match="pamr: iterations must be"):
        backends.native().pamr(*packed, shapes, out, [1], [1], -1)


def test_opcheck():
    masks, image = map(torch.from_numpy, random_sample(2, 12, 9, 2))
    batch = Ragged.pack([masks])
    arguments = (batch.rows, Ragged.pack([image]).rows, batch.offsets, batch.shapes)
    torch.library.opcheck(torch.ops.namedmask_kernels.pamr, (*arguments, [1, 2], [2], 3, "cpu"))
