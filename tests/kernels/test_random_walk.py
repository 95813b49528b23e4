# SPDX-License-Identifier: MIT

import gpu_rounding
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.reference import random_walk as reference

BACKENDS = ["cpu", "reference", "triton"]


def scene(h, w, channels, masks=3, seed=0, noise=0.5):
    """Masks float32 [h, w, M] in [0, 1] and features [h, w, C]: two halves, and noise."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(2, channels))
    features = directions[(np.arange(w) >= w / 2).astype(int)] + noise * rng.normal(size=(h, w, channels))
    return torch.from_numpy(rng.random((h, w, masks)).astype(np.float32)), torch.from_numpy(features.astype(np.float32))


def error(result, masks, features, steps, sharpness, backend="cpu"):
    """Largest error relative to twice that of the torch expression in float32, both against float64.

    The error of that expression can be small by chance, so it counts as at least the expected rounding error of a sum
    of n terms, sqrt(n) units of the largest mask (Higham and Mary, 2019); the kernel adds 96 terms sequentially.
    Multiplied by the number of steps: if all weights are equal, as without channels, all row sums are off by the same
    factor in every step. Cosines are off by a unit or two, which the sharpness multiplies: both have errors of up to
    16 units for a sharpness of 10 in 12,000 images of up to 20 tokens.
    """
    rows = masks.flatten(0, 1), features.flatten(0, 1)
    exact = reference.random_walk(rows[0].double(), rows[1].double(), steps, sharpness)
    if not exact.numel():
        return 0.0
    plain = reference.random_walk(*rows, steps, sharpness)
    unit = 2.0**-24 * float(masks.abs().max())
    least = unit * (max(4, steps * min(len(exact), 96) ** 0.5) + sharpness)
    allowed = 2 * max(float((plain - exact).abs().max()), least)
    if backend == "triton":
        allowed += float(masks.abs().max()) * gpu_rounding.random_walk(len(exact), steps, sharpness)
    return float((result.flatten(0, 1) - exact).abs().max()) / allowed


@pytest.mark.parametrize(("steps", "sharpness"), [(1, 10.0), (2, 10.0), (5, 3.0), (2, 0.0), (3, 60.0)])
def test_equals_the_reference(run, backend, steps, sharpness):
    masks, features = scene(17, 23, 40)
    result = run(nk.random_walk, masks, features, steps=steps, sharpness=sharpness)
    assert result.dtype == torch.float32 and result.shape == masks.shape
    assert error(result, masks, features, steps, sharpness, backend) <= 1


@settings(max_examples=60)
@given(
    h=st.integers(0, 12),
    w=st.integers(1, 12),
    channels=st.integers(0, 40),
    masks=st.integers(0, 40),
    seed=st.integers(0, 10**6),
    steps=st.integers(0, 3),
)
@example(h=3, w=12, channels=0, masks=1, seed=0, steps=2)  # equal weights: rounding errors that do not average out
@example(h=1, w=3, channels=37, masks=9, seed=204, steps=2)  # torch happens to be almost exact
def test_equals_the_reference_on_small_grids(h, w, channels, masks, seed, steps):
    soft, features = scene(h, w, channels, masks, seed)
    result = nk.random_walk(soft, features, steps=steps)
    assert error(result, soft, features, steps, 10.0) <= 1


@pytest.mark.parametrize("shape", [(1, 95), (8, 12), (1, 97), (1, 193), (17, 19), (32, 33)])
@pytest.mark.parametrize(("channels", "masks"), [(1, 1), (385, 31), (64, 32), (17, 33)])
def test_sizes_around_the_tiles(shape, channels, masks):
    soft, features = scene(*shape, channels, masks)
    assert error(nk.random_walk(soft, features), soft, features, 2, 10.0) <= 1


def test_masks_follow_the_features():
    """A blurred, shifted mask of the right half becomes the right half."""
    _, features = scene(20, 30, 64)
    truth = torch.arange(30) >= 15
    rough = ((torch.arange(30) - 19.0) / 8).sigmoid().expand(20, 30)
    refined = nk.random_walk(rough[..., None], features)[..., 0]
    assert ((rough > 0.5) == truth).float().mean() < 0.9
    assert torch.equal(refined > refined.mean(), truth.expand(20, 30))


def test_known_values(run, backend):
    masks, features = scene(6, 7, 12)
    assert torch.equal(run(nk.random_walk, masks, features, steps=0), masks)
    mean = masks.mean((0, 1)).expand_as(masks)
    torch.testing.assert_close(run(nk.random_walk, masks, features, sharpness=0), mean)
    torch.testing.assert_close(run(nk.random_walk, masks, torch.zeros_like(features)), mean)
    torch.testing.assert_close(run(nk.random_walk, masks, 0 * features + 1e18), mean)
    constant = run(nk.random_walk, torch.full_like(masks, 0.7), features)
    torch.testing.assert_close(constant, torch.full_like(masks, 0.7))
    one = run(nk.random_walk, masks[:1, :1], features[:1, :1])
    split = gpu_rounding.tensor_core_sum(1) + 2.0**-22 * gpu_rounding.ON_GPU  # and the division
    torch.testing.assert_close(one, masks[:1, :1], rtol=split if backend == "triton" else 0, atol=0)


@pytest.mark.parametrize("side", [20, 66])
def test_steps_can_be_taken_one_by_one(side, on_threads):
    """Later steps use weights that the first one kept; beyond 4,032 tokens, as here with 4,356, only a part of them."""
    masks, features = scene(side, side, 4)
    first, *others = on_threads(lambda: nk.random_walk(masks, features, steps=3))
    assert all(torch.equal(other, first) for other in others)
    for _ in range(3):
        masks = nk.random_walk(masks, features, steps=1)
    assert torch.equal(masks, first)


def test_results_do_not_depend_on_batch_composition(run):
    shapes = [(5, 7), (1, 1), (33, 41), (0, 4), (10, 11), (9, 0)]
    images = [scene(h, w, 24, seed=b) for b, (h, w) in enumerate(shapes)]
    masks, features = (Ragged.pack(list(x)) for x in zip(*images, strict=True))
    batch = run(nk.random_walk, masks, features)
    for image, out in zip(images, batch.grids(), strict=True):
        assert torch.equal(out, run(nk.random_walk, *image))


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    masks, features = scene(31, 37, 40)
    first, *others = on_threads(lambda: nk.random_walk(masks, features, steps=3), (1, 2, 3, 11))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_instruction_levels(level, tmp_path, run_at_level):
    masks, features = scene(19, 21, 70, masks=20)
    np.savez(tmp_path / "inputs.npz", masks=masks, features=features)
    code = (
        "import sys, numpy as np, namedmask_kernels as nk\n"
        "inputs = np.load(sys.argv[1] + '/inputs.npz')\n"
        "np.save(sys.argv[1] + '/result.npy', nk.random_walk(inputs['masks'], inputs['features']))\n"
    )
    run_at_level(level, code)
    assert error(torch.from_numpy(np.load(tmp_path / "result.npy")), masks, features, 2, 10.0) <= 1


def test_arrangements_and_dtypes(run, device):
    images = [scene(6, 8, 12, seed=b) for b in range(3)]
    masks, features = (torch.stack(x) for x in zip(*images, strict=True))
    batch = run(nk.random_walk, masks, features)
    assert batch.shape == (3, 6, 8, 3)
    ragged = run(nk.random_walk, Ragged.pack(list(masks)), Ragged.pack(list(features)))
    assert torch.equal(ragged.rows, batch.flatten(0, 2))
    if device == "cpu":
        as_numpy = run(nk.random_walk, masks.numpy(), features.numpy())
        assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, batch)
    assert torch.equal(run(nk.random_walk, masks.double(), features.double()), batch)
    half = features.bfloat16()
    assert torch.equal(run(nk.random_walk, masks, half), run(nk.random_walk, masks, half.float()))
    view = masks[0].permute(1, 0, 2)[::2, 1:, 1:], features[0].permute(1, 0, 2)[::2, 1:, ::2]
    expected = run(nk.random_walk, *(x.contiguous() for x in view))
    assert torch.equal(run(nk.random_walk, *view), expected)
    empty = Ragged.of_shapes(torch.zeros(0, 3), []), Ragged.of_shapes(torch.zeros(0, 12), [])
    assert run(nk.random_walk, *empty).rows.shape == (0, 3)


def test_every_output_is_written(monkeypatch):
    masks, features = scene(9, 11, 16)
    expected = nk.random_walk(masks, features)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    assert torch.equal(nk.random_walk(masks, features), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_raise(run, bad):
    images = [scene(4, 5, 8, seed=b) for b in range(4)]
    images[2][1][3, 1, 5] = bad
    masks, features = (Ragged.pack(list(x)) for x in zip(*images, strict=True))
    message = "random_walk: features must be finite, but .*image {} "
    with pytest.raises(ValueError, match=message.format(2)):
        run(nk.random_walk, masks, features)
    with pytest.raises(ValueError, match=message.format(0)):
        run(nk.random_walk, *images[2])


def test_invalid_arguments_raise():
    masks, features = scene(4, 5, 8)
    with pytest.raises(TypeError, match=r"random_walk: masks must be float32 or .*, but is bool"):
        nk.random_walk(masks > 0.5, features)
    with pytest.raises(TypeError, match=r"random_walk: features must be float32 or .*, but is int64"):
        nk.random_walk(masks, features.long())
    with pytest.raises(ValueError, match=r"random_walk: masks must have 3 or 4 dimensions, but has shape \[4, 5\]"):
        nk.random_walk(masks[..., 0], features)
    with pytest.raises(ValueError, match=r"random_walk: features and masks must have the same height and width"):
        nk.random_walk(masks, features.transpose(0, 1))
    with pytest.raises(ValueError, match="random_walk: steps must be at least 0, but is -1"):
        nk.random_walk(masks, features, steps=-1)
    for sharpness in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"random_walk: sharpness must be .*, but is {sharpness}"):
            nk.random_walk(masks, features, sharpness=sharpness)
    with pytest.raises(ValueError, match="random_walk: backend 'triton' cannot run"):
        nk.random_walk(masks, features, backend="triton")


def test_opcheck():
    masks, features = scene(4, 5, 8)
    batch = Ragged.pack([masks]), Ragged.pack([features])
    torch.library.opcheck(
        torch.ops.namedmask_kernels.random_walk, (batch[0].rows, *batch[1], 2, 10.0, "cpu")
    )  # fmt: skip
