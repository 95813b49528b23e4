# SPDX-License-Identifier: MIT

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

import namedmask_kernels as nk
from namedmask_kernels import Ragged

BACKENDS = ["cpu", "reference", "cuda"]


def scene(h, w, boxes, seed=0, noise=0.15, channels=12):
    """float32 [h, w, C]: a background and boxes (rows, columns), each with its own direction, and noise."""
    rng = np.random.default_rng(seed)
    background, *objects = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    features = np.tile(background, (h, w, 1))
    for (rows, columns), direction in zip(boxes, objects, strict=False):
        features[rows, columns] = direction
    return torch.from_numpy((features + noise * rng.normal(size=features.shape)).astype(np.float32))


BOXES = [(slice(2, 8), slice(3, 9)), (slice(10, 15), slice(4, 8)), (slice(3, 6), slice(13, 18))]


def painted(h, w, box):
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[box] = True
    return mask


def published(features, objects, tau, eps, sign):
    """MaskCut as the paper words it, with an eigenvector of an arbitrary sign; bool [h, w, objects]."""
    h, w, _ = features.shape
    corners = np.ravel_multi_index(([0, 0, h - 1, h - 1], [0, w - 1, 0, w - 1]), (h, w))
    rows = features.reshape(h * w, -1).astype(float)
    unit, masks = rows / np.linalg.norm(rows, axis=1, keepdims=True), []
    for _ in range(objects):
        affinity = np.where(unit @ unit.T > tau, 1.0, eps)
        degrees = np.diag(affinity.sum(1))
        vector = sign * linalg.eigh(degrees - affinity, degrees, subset_by_index=[1, 1])[1][:, 0]
        inside = vector > vector.mean()
        seeded, count = inside[np.abs(vector).argmax()], inside[corners].sum()
        if (not seeded and count == 2) or count > 2:
            inside, vector = ~inside, -vector
        inside &= unit.any(1)
        labels = ndimage.label(inside.reshape(h, w))[0]
        masks.append(labels == labels.flat[np.where(inside, vector, -np.inf).argmax()])
        unit = unit * ~masks[-1].ravel()[:, None]
    return np.stack(masks, -1)


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_published_rule_for_either_sign(run, seed):
    features = scene(17, 20, BOXES, seed, noise=0.3)
    result = run(nk.mask_cut, features, tolerance=1e-10)
    for sign in (1, -1):
        np.testing.assert_array_equal(result.masks.numpy(), published(features.numpy(), 3, 0.15, 1e-5, sign))


@pytest.mark.parametrize("seed", range(2))
def test_finds_all_objects(run, seed):
    result = run(nk.mask_cut, scene(17, 20, BOXES, seed, noise=0.05), objects=3)
    found = sorted(result.masks.sum((0, 1)).tolist())
    expected = {tuple(painted(17, 20, box).flatten().tolist()) for box in BOXES}
    assert found == [15, 20, 36]
    assert {tuple(mask.flatten().tolist()) for mask in result.masks.unbind(2)} == expected
    assert result.value.shape == (1, 3) and result.seed.dtype == torch.int32
    for mask, seed_token in zip(result.masks.unbind(2), result.seed[0], strict=True):
        assert mask.flatten()[seed_token]


@pytest.mark.parametrize(
    "box", [(slice(0, 6), slice(0, 7)), (slice(0, 17), slice(0, 5)), (slice(0, 17), slice(14, 20))]
)
def test_corner_rule(run, box):
    """An object in one corner is the foreground; one along a side has two corners, and the largest |v| decides."""
    features = scene(17, 20, [box])
    result = run(nk.mask_cut, features, objects=1)
    cut = run(nk.normalized_cut, features, tau=0.15)
    corners = sum(bool(painted(17, 20, box)[y, x]) for y in (0, 16) for x in (0, 19))
    expected = painted(17, 20, box) if corners == 1 else cut.foreground
    assert torch.equal(result.masks[..., 0], expected) and result.value[0, 0] == cut.value


def test_first_object_of_a_cut_with_the_object_inside_is_that_of_normalized_cut(run):
    features = scene(12, 15, [(slice(3, 9), slice(4, 11))])
    cut, found = run(nk.normalized_cut, features, tau=0.15), run(nk.mask_cut, features, objects=1)
    assert torch.equal(found.masks[..., 0], cut.foreground) and found.seed[0, 0] == cut.seed


def test_masks_are_disjoint_and_equal_the_reference(backend, device):
    """Random features; the images of a batch do not influence each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 9), (1, 1), (0, 4), (5, 13), (12, 4)]
    grids = [torch.randn(h, w, 6, generator=generator).cumsum(0).cumsum(1).to(device) for h, w in shapes]
    batch = nk.mask_cut(Ragged.pack(grids), objects=5, tolerance=1e-12, backend=backend)
    assert batch.value.shape == batch.seed.shape == (5, 5)
    for b, (grid, masks) in enumerate(zip(grids, batch.masks.grids(), strict=True)):
        alone = nk.mask_cut(grid, objects=5, tolerance=1e-12, backend=backend)
        assert torch.equal(alone.masks, masks) and torch.equal(alone.value[0], batch.value[b])
        assert torch.equal(alone.seed[0], batch.seed[b])
        exact = nk.mask_cut(grid.cpu(), objects=5, backend="reference")
        assert torch.equal(masks.cpu(), exact.masks) and torch.equal(alone.seed, exact.seed)
        torch.testing.assert_close(alone.value, exact.value, atol=1e-9, rtol=0)
        assert (masks.sum(2) <= 1).all()


def test_search_ends_without_a_cut(run):
    result = run(nk.mask_cut, torch.ones(6, 7, 4), objects=4)
    assert not result.masks.any() and (result.seed == -1).all() and (result.value == 1).all()
    two = torch.zeros(4, 6, 2)
    two[..., 0], two[1:3, 2:4] = 1, torch.tensor([0.0, 1.0])
    result = run(nk.mask_cut, two, objects=4)
    assert torch.equal(result.masks[..., 0], painted(4, 6, (slice(1, 3), slice(2, 4))))
    assert (result.masks.sum((0, 1)) > 0).tolist() == (result.seed[0] >= 0).tolist()
    empty = Ragged.of_shapes(torch.zeros(0, 3), [(0, 5), (2, 0)])
    assert (run(nk.mask_cut, empty).seed == -1).all()


def test_invalid_arguments_raise():
    features = torch.randn(4, 5, 8)
    for changes, message in [
        ({"tau": -0.1}, "tau must be finite and at least 0, but is -0.1"),
        ({"eps": 1.0}, "eps must be at least 1e-60 and below 1"),
        ({"objects": 0}, "objects must be at least 1"),
        ({"objects": 1001}, "objects must be at most 1000"),
    ]:
        with pytest.raises(ValueError, match=f"mask_cut: {message}"):
            nk.mask_cut(features, **changes)
    features[2, 3, 1] = float("nan")
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="mask_cut: features must be finite, but image 1 holds NaN"):
            nk.mask_cut(torch.stack([features.nan_to_num(), features]), backend=backend)
