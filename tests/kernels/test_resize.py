# SPDX-License-Identifier: MIT
"""resize against torchvision, Pillow and its reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
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
    if result.dtype == torch.uint8:
        # At a factor of two, many sums are halfway between two levels. In enlarged noise, two roundings can add up.
        difference = (result.int() - expected.int()).abs()
        assert (difference <= 2).all() and (difference > 1).sum() <= 1 + difference.numel() // 1000
    else:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_too_large_results_are_rejected_before_they_are_allocated(backend, device):
    image, settings = torch.zeros(4, 4, dtype=torch.uint8, device=device), {"mean": [0], "std": [1], "patch": 1024}
    for keywords in ({}, settings):
        with pytest.raises(ValueError, match="a batch may have at most 2147483647 rows, but has "):
            nk.resize(image, (2**31 - 1, 2**31 - 1), backend=backend, **keywords)


def test_images_without_channels(backend, device):
    batch = Ragged.of_shapes(torch.zeros(63, 0, device=device), [SIZES[0][0]])
    assert nk.resize(batch, SIZES[0][1], backend=backend).rows.shape == (70, 0)


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


@settings(max_examples=60)
@example(old=(2, 1), new=(3, 1), channels=0, interpolation="bilinear")
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


MEAN, STD = (0.48, 0.46, 0.41, 0.5), (0.27, 0.26, 0.28, 0.01)


@pytest.mark.parametrize("patch", [None, 1, 7])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(0, torch.float16), (1, torch.float32), (3, torch.bfloat16), (4, torch.float32)]
)
def test_normalized_images_are_those_of_the_uint8_result(channels, dtype, patch, backend, device):
    images = images_of(torch.uint8, channels)
    batch = Ragged.pack([image.to(device) for image in images])
    new, mean, std = [new for _, new in SIZES], MEAN[: channels or 1], STD[: channels or 1]
    settings = {"interpolation": "bicubic", "backend": backend}
    result = nk.resize(batch, new, mean=mean, std=std, patch=patch, dtype=dtype, **settings)
    assert result.rows.dtype == dtype
    resized = nk.resize(batch, new, **settings).rows.cpu()
    colors = resized.reshape(len(resized), -1).double() / 255
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    expected = Ragged.of_shapes(((colors - means) / stds).to(dtype), new)
    if patch is None:
        assert result.rows.cpu().reshape(expected.rows.shape).equal(expected.rows)
        assert result.shapes.tolist() == [list(size) for size in new]
        return
    assert result.shapes.tolist() == [[-(-h // patch), -(-w // patch)] for h, w in new]
    for (h, w), grid, image in zip(new, result.grids(), expected.grids(), strict=True):
        rows, columns = grid.shape[:2]
        padded = torch.zeros(rows * patch, columns * patch, channels or 1, dtype=dtype)
        padded[:h, :w] = image
        cells = grid.cpu().reshape(rows, columns, channels or 1, patch, patch).permute(0, 3, 1, 4, 2)
        assert cells.reshape(padded.shape).equal(padded)


def test_patches_are_those_of_a_convolution():
    image = images_of(torch.uint8, 3)[3]
    convolution = torch.nn.Conv2d(3, 5, 4, 4, bias=False, dtype=torch.float64)
    settings = {"mean": MEAN[:3], "std": STD[:3]}
    patches = nk.resize(image, (16, 24), patch=4, **settings)
    result = patches.rows.double() @ convolution.weight.flatten(1).T
    pixels = nk.resize(image, (16, 24), **settings).double().permute(2, 0, 1)
    torch.testing.assert_close(result, convolution(pixels[None])[0].flatten(1).T)
    assert patches.shapes.tolist() == [[4, 6]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_axes_that_keep_their_length_keep_their_values(dtype, backend, device):
    image = images_of(dtype, 3)[3].to(device)
    if dtype == torch.float32:
        image[3, 5] = torch.nan
    same = nk.resize(image, image.shape[:2], interpolation="bicubic", backend=backend)
    assert same.equal(image) or same.nan_to_num(7).equal(image.nan_to_num(7))
    narrow = nk.resize(image, (40, 17), interpolation="bicubic", backend=backend)
    for y in (0, 3, 39):
        row = nk.resize(image[y : y + 1], (1, 17), interpolation="bicubic", backend=backend)[0]
        torch.testing.assert_close(narrow[y], row, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_within_the_reach_of_the_filter(
    value, channels, interpolation, backend, device
):
    for image, (old, new) in zip(images_of(torch.float32, channels), SIZES, strict=True):
        for y, x in {(0, 0), (old[0] // 2, old[1] // 3), (old[0] - 1, old[1] - 1)} if image.numel() else ():
            broken = image.clone()
            broken[y, x, -1] = value
            result = nk.resize(broken.to(device), new, interpolation=interpolation, backend=backend).cpu()
            expected = nk.resize(broken, new, interpolation=interpolation, backend="reference")
            assert torch.equal(result.isfinite(), expected.isfinite())


def test_uint8_is_bit_identical_at_the_portable_level(run_at_level, tmp_path):
    image = images_of(torch.uint8, 3)[3]
    new = (37, 29)
    torch.save((image, nk.resize(image, new, interpolation="bicubic")), tmp_path / "case.pt")
    code = f"""
import sys, torch, namedmask_kernels as nk
image, expected = torch.load(sys.argv[1] + "/case.pt")
assert nk.resize(image, {new}, interpolation="bicubic").equal(expected)"""
    run_at_level("portable", code)


@pytest.mark.parametrize("size", [(7, 400), (1000, 3), (3, 3)])
def test_large_reductions_and_enlargements(size, backend, device):
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    for new in ((1, 1), (2, 5), (50, 40)):
        result = nk.resize(image, new, interpolation="bicubic", backend=backend).cpu()
        expect_close(result, nk.resize(image.cpu(), new, interpolation="bicubic", backend="reference"))


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
    with pytest.raises(ValueError, match="a size must be a height and a width, but is 5"):
        nk.resize(Ragged.pack([torch.zeros(4, 4)] * 2), [(2, 2), 5])
    with pytest.raises(TypeError, match="image must be"):
        nk.resize(torch.zeros(4, 4, dtype=torch.int64), (2, 2))


PIXELS = torch.zeros(4, 4, 3, dtype=torch.uint8)
HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("image", "settings", "error", "message"),
    [
        (PIXELS, {"mean": HALF}, ValueError, "mean and std must be given together"),
        (PIXELS, {"patch": 2}, ValueError, "patch requires mean and std"),
        (PIXELS, {"dtype": torch.float16}, ValueError, "dtype requires mean and std"),
        (PIXELS, {"dtype": torch.float64}, TypeError, "dtype must be .* but is torch.float64"),
        (PIXELS, {"mean": HALF, "std": (0.5,)}, ValueError, "for each of the 3 channels, but have 3 and 1"),
        (PIXELS, {"mean": HALF, "std": (0.5, 0.5, 0)}, ValueError, "std be positive, but are 0.5, 0.0"),
        (PIXELS, {"mean": (0, 0, torch.nan), "std": HALF}, ValueError, "must give finite"),
        (PIXELS, {"mean": HALF, "std": (1, 1, 1e-6), "dtype": torch.float16}, ValueError, "finite torch.float16"),
        (PIXELS, {"mean": HALF, "std": ("1", 1, 1)}, TypeError, "std must be a number, but is '1'"),
        (PIXELS, {"mean": 0.5, "std": HALF}, TypeError, "mean must be a sequence of numbers, but is 0.5"),
        (PIXELS, {"mean": HALF, "std": HALF, "patch": 0}, ValueError, "patch must be at least 1"),
        (PIXELS.float(), {"mean": HALF, "std": HALF}, TypeError, "require a uint8 image, but it is float32"),
        (PIXELS.numpy(), {"mean": HALF, "std": HALF, "dtype": torch.bfloat16}, TypeError, "numpy has no bfloat16"),
    ],
    ids=range(13),
)
def test_wrong_normalizations_raise(image, settings, error, message):
    with pytest.raises(error, match=f"resize: .*{message}"):
        nk.resize(image, (2, 2), **settings)


def test_normalized_images_under_opcheck_and_compile():
    batch = Ragged.pack([PIXELS, PIXELS[:3]])
    settings = {"mean": HALF, "std": HALF, "patch": 2, "dtype": torch.bfloat16}
    arguments = (*batch, [3, 5, 2, 2], 0, list(HALF), list(HALF), 2, torch.bfloat16, "cpu")
    torch.library.opcheck(torch.ops.namedmask_kernels.resize.default, arguments)
    compiled = torch.compile(lambda rows: nk.resize(batch.with_rows(rows), (3, 5), **settings).rows, backend="eager")
    assert compiled(batch.rows).equal(nk.resize(batch, (3, 5), **settings).rows)


def test_extreme_normalizations_are_finite(backend, device):
    image = torch.tensor([[0, 255]], dtype=torch.uint8, device=device)
    for dtype, scale in (
        (torch.float32, 1e-38),
        (torch.bfloat16, 1e-38),
        (torch.float16, 1e-4),
        (torch.float32, 1e300),
    ):
        result = nk.resize(image, (1, 2), mean=(0.5,), std=(scale,), dtype=dtype, backend=backend).cpu()
        assert result.isfinite().all() and (result.sign() == torch.tensor([-1, 1]) if scale < 1 else result == 0).all()
