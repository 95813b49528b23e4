# SPDX-License-Identifier: MIT
"""resize against torchvision, Pillow and its reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import namedmask_kernels as nk
from namedmask_kernels import Ragged

BACKENDS = ("cpu", "cuda", "reference")
SIZES = [((7, 9), (14, 5)), ((1, 1), (3, 4)), ((0, 4), (0, 2)), ((40, 64), (13, 17)), ((33, 20), (33, 20)),
         ((5, 200), (1, 1)), ((12, 30), (48, 61))]  # fmt: skip


def images_of(dtype, channels):
    generator = torch.Generator().manual_seed(0)
    row = (channels,) if channels else ()
    values = [torch.randint(0, 256, (*size, *row), dtype=torch.uint8, generator=generator) for size, _ in SIZES]
    return values if dtype == torch.uint8 else [value.to(dtype) / 100 - 1 for value in values]


def expect_close(result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    if result.dtype == torch.uint8:  # at a factor of two, many sums are halfway between two levels
        assert ((result.int() - expected.int()).abs() <= 1).all()
    else:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_batches_equal_the_definition(dtype, channels, interpolation, backend, device):
    images = images_of(dtype, channels)
    batch = Ragged.pack([image.to(device) for image in images])
    result = nk.resize(batch, [new for _, new in SIZES], interpolation=interpolation, backend=backend)
    assert result.shapes.tolist() == [list(new) for _, new in SIZES]
    for image, grid, (_, new) in zip(images, result.grids(), SIZES, strict=True):
        expect_close(grid.cpu(), nk.resize(image, new, interpolation=interpolation, backend="reference"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_torchvision_and_pillow(interpolation):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    pillow = pytest.importorskip("PIL.Image")
    image = (torch.rand(67, 90, 3, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    for new in ((30, 41), (67, 33), (100, 180)):
        result = nk.resize(image, new, interpolation=interpolation)
        mode = functional.InterpolationMode(interpolation)
        expected = functional.resize(image.permute(2, 0, 1), new, mode, antialias=True).permute(1, 2, 0)
        assert (result.int() - expected.int()).abs().max() <= 1
        expected = pillow.fromarray(image.numpy()).resize(new[::-1], pillow.Resampling[interpolation.upper()])
        assert np.abs(result.numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    old=st.tuples(st.integers(1, 60), st.integers(1, 90)), new=st.tuples(st.integers(1, 60), st.integers(1, 90)),
    channels=st.sampled_from([0, 1, 3]), interpolation=st.sampled_from(["bilinear", "bicubic"]),
)  # fmt: skip
def test_any_size(old, new, channels, interpolation):
    row = (channels,) if channels else ()
    image = torch.rand(*old, *row, generator=torch.Generator().manual_seed(old[0] + new[1]))
    result = nk.resize(image, new, interpolation=interpolation)
    expect_close(result, nk.resize(image, new, interpolation=interpolation, backend="reference"))


def test_constant_images_stay_constant(backend, device):
    image = torch.full((31, 45, 3), 255, dtype=torch.uint8, device=device)
    assert (nk.resize(image, (20, 77), interpolation="bicubic", backend=backend) == 255).all()


def test_arrangements():
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
    result = nk.resize(image, (5, 6))
    assert isinstance(result, np.ndarray) and result.shape == (5, 6, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(nk.resize(image[:, ::-1], np.array([5, 6])), nk.resize(image[:, ::-1].copy(), [5, 6]))
    soft = nk.resize(image[..., 0].astype(np.float64), (5, 6))
    assert soft.dtype == np.float32 and soft.shape == (5, 6)
    many = Ragged.pack([torch.full((1 + b % 3, 2 + b % 5), b, dtype=torch.uint8) for b in range(150)])
    new = nk.resize(many, [(3, 3)] * 150)
    assert new.rows.reshape(150, 9).tolist() == [[b] * 9 for b in range(150)]


@pytest.mark.parametrize(
    ("image", "sizes", "message"),
    [
        (torch.zeros(4, 4), (0, 3), "image 0 and its new size must both have pixels, or neither"),
        (torch.zeros(0, 4), (2, 3), "image 0 and its new size must both have pixels, or neither"),
        (torch.zeros(4, 4), (3,), "a size must be a height and a width"),
        (torch.zeros(4, 4), (-1, 3), "height must be at least 0"),
        (Ragged.pack([torch.zeros(4, 4)]), [(1, 1), (2, 2)], "one size, or one for each of the 1 images, but has 2"),
    ],
    ids=range(5),
)
def test_wrong_sizes_raise(image, sizes, message):
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=f"resize: .*{message}"):
            nk.resize(image, sizes, backend=backend)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic, but is 'nearest'"):
        nk.resize(torch.zeros(4, 4), (2, 2), interpolation="nearest")
    with pytest.raises(TypeError, match=r"must be an integer, but is 2\.5"):
        nk.resize(torch.zeros(4, 4), (2, 2.5))
    with pytest.raises(TypeError, match="image must be"):
        nk.resize(torch.zeros(4, 4, dtype=torch.int64), (2, 2))
