# SPDX-License-Identifier: MIT
"""Augmentation: copy-paste against the authors' code, colors and blur against torchvision, geometry against labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torchvision.transforms.v2 import functional as TF

from golden import GOLDEN
from namedmask.config import SegmenterTraining, make_config
from namedmask.errors import UserError
from namedmask.segmenter.augment import (
    IGNORE,
    LUMA,
    View,
    augment,
    color_jitter,
    copy_paste,
    gaussian_blur,
    object_box,
    paste_object,
    recolored,
    whole_view,
)

PLAIN = {"flip_prob": 0.0, "color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}


@pytest.mark.parametrize("case", ["two", "four", "empty_second", "one_row", "full", "single"])
def test_copy_paste_equals_the_authors(case):
    """Their code omits the last row and column of a box and may draw a position one too large: hence the padding."""
    with np.load(GOLDEN / "copy_paste.npz") as golden:
        images, masks, draws, expected_photo, expected_labels = (
            torch.from_numpy(golden[f"{case}_{name}"]) for name in ("images", "masks", "draws", "out_image", "out_mask")
        )
    labels = masks.int().where(masks != 255, IGNORE)
    view = View(F.pad(images[0], (0, 1, 0, 1)), F.pad(labels[0], (0, 1, 0, 1)))
    same = torch.ones(view.labels.shape, dtype=bool)  # False where only our code has pasted
    positions = iter(draws[:, 2].tolist())
    for photo, pasted_labels in zip(images[1:], labels[1:], strict=True):
        if (box := object_box(pasted_labels)) is None:
            continue
        top, left = next(positions), next(positions)
        paste_object(view, View(photo, pasted_labels), top, left)
        pasted = pasted_labels[box[0] : box[2], box[1] : box[3]] > 0
        kept = pasted.clone()
        kept[-1], kept[:, -1] = False, False
        window = same[top : top + pasted.shape[0], left : left + pasted.shape[1]]
        window |= kept
        window &= ~(pasted & ~kept)
    same = same[:-1, :-1]
    expected_labels = expected_labels.int().where(expected_labels != 255, IGNORE)
    assert torch.equal(view.labels[:-1, :-1][same], expected_labels[same])
    assert torch.equal(view.photo[:, :-1, :-1][:, same], expected_photo[:, same])
    assert case == "single" or not same.all()


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 255, 256, 919]))
def test_objects_are_pasted_completely(seed, label):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 9, 2)
    view = View(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.int32))
    labels = torch.full((8, 8), IGNORE, dtype=torch.int32)
    labels[:h, :w] = label
    copy_paste(view, [View(torch.full((3, 8, 8), 9, dtype=torch.uint8), labels)], rng)
    assert int((view.labels == label).sum()) == h * w and set(view.labels.unique().tolist()) <= {0, label}
    assert torch.equal(view.photo > 0, (view.labels > 0).expand(3, -1, -1))


def test_paste_object_rejects_what_does_not_fit():
    view = View(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="no object"):
        paste_object(view, view, 0, 0)
    other = View(view.photo, torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"4 x 4 pixels does not fit at \(1, 0\)"):
        paste_object(view, other, 1, 0)


def test_objects_are_pasted_at_all_positions():
    labels = torch.zeros(4, 4, dtype=torch.int32)
    labels[1:3, 1:4] = 5
    rng, corners = np.random.default_rng(0), set()
    for _ in range(200):
        view = View(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32))
        copy_paste(view, [View(view.photo.clone(), labels)], rng)
        corners.add(object_box(view.labels)[:2])
    assert corners == {(top, left) for top in range(3) for left in range(2)}


def photo_with_box(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """A gray photo with a white box in its center, and the labels of the box."""
    labels = np.zeros((h, w), np.int32)
    labels[h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 300
    return np.repeat(np.where(labels > 0, 255, 60).astype(np.uint8)[..., None], 3, 2), labels


@pytest.mark.parametrize(("h", "w"), [(40, 56), (200, 30), (90, 300), (1, 1), (64, 64)])
def test_photo_and_labels_stay_aligned(h, w):
    settings = SegmenterTraining(crop_size=64, **PLAIN)
    for seed in range(20):
        view = augment(*photo_with_box(h, w), settings, np.random.default_rng(seed))
        assert view.photo.shape == (3, 64, 64) and view.photo.dtype == torch.uint8
        assert view.labels.shape == (64, 64) and view.labels.dtype == torch.int32
        white, gray = view.photo[0] > 250, view.photo[0] < 65
        labeled = view.labels != IGNORE
        assert (view.labels[white & labeled] == 300).all() and (view.labels[gray & labeled] == 0).all()


def test_padded_photos_are_placed_uniformly():
    """Each of the 3 x 4 positions is equally likely: rows and columns are drawn independently."""
    settings = SegmenterTraining(crop_size=16, scale=(1.0, 1.0), **PLAIN)
    pixels, labels = np.zeros((14, 13, 3), np.uint8), np.zeros((14, 13), np.int32)
    counts, rng = np.zeros((3, 4)), np.random.default_rng(0)
    for _ in range(1200):
        rows, columns = (augment(pixels, labels, settings, rng).labels != IGNORE).nonzero().amin(0).tolist()
        counts[rows, columns] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 31.3  # the 99.9% quantile of chi-squared with 11 degrees of freedom


def test_padding_has_the_mean_color():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    view = augment(
        pixels, np.zeros((20, 30), np.int32), SegmenterTraining(crop_size=64, scale=(1.0, 1.0), **PLAIN), rng
    )
    [padding] = view.photo[:, view.labels == IGNORE].unique(dim=1).T
    np.testing.assert_allclose(padding, pixels.mean((0, 1)), atol=0.6)
    np.testing.assert_array_equal(view.photo[:, view.labels == 0].T, pixels.reshape(-1, 3))


def test_crops_are_drawn_at_all_positions():
    settings = SegmenterTraining(crop_size=16, scale=(1.0, 1.0), **PLAIN)
    labels = np.arange(1, 20 * 18 + 1, dtype=np.int32).reshape(20, 18)
    pixels = np.zeros((20, 18, 3), np.uint8)
    corners = {int(augment(pixels, labels, settings, np.random.default_rng(i)).labels[0, 0]) for i in range(200)}
    assert corners == {int(labels[y, x]) for y in range(5) for x in range(3)}


@pytest.mark.parametrize(("side", "scale", "size"), [(100, 0.5, 20), (100, 2.0, 20), (30, 1.0, 20), (7, 3.0, 20)])
def test_a_crop_shows_as_much_of_the_photo_as_its_scale_says(side, scale, size):
    """Labels count the columns of the photo, so the range in a crop is its width in the photo."""
    labels = np.arange(side, dtype=np.int32)[None].repeat(side, 0)
    settings = SegmenterTraining(crop_size=size, scale=(scale, scale), **PLAIN)
    for seed in range(5):
        crop = augment(np.zeros((side, side, 3), np.uint8), labels, settings, np.random.default_rng(seed)).labels
        assert abs(int(crop.max() - crop.min()) - (size / scale - 1)) <= 2


@pytest.mark.parametrize("scale", [0.21, 0.3, 0.77, 1.6])
@pytest.mark.parametrize("size", [320, 48])
def test_labels_are_where_the_photo_is(scale, size):
    """Both number the rows, then the columns. Rounding down would shift labels by half a step."""
    numbers = np.broadcast_to(np.arange(200, dtype=np.int32)[:, None], (200, 200))
    for labels in (numbers, numbers.T):
        pixels = np.repeat(labels.astype(np.uint8)[..., None], 3, 2)
        settings = SegmenterTraining(crop_size=size, scale=(scale, scale), **PLAIN)
        views = [augment(pixels, labels.copy(), settings, np.random.default_rng(seed)) for seed in range(5)]
        if scale < 1:
            views.append(whole_view(pixels, labels.copy(), round(200 * scale)))
        for view in views:
            inside = (view.labels > 20) & (view.labels < 180)
            shift = view.labels[inside].double() - view.photo[0][inside].double()
            assert inside.any() and abs(shift.mean()) < 0.15


@pytest.mark.parametrize("size", [64, 20])
def test_photos_are_reduced_with_antialiasing(size):
    """Lines of single pixels become gray."""
    pixels, labels = np.zeros((160, 160, 3), np.uint8), np.ones((160, 160), np.int32)
    pixels[:, ::2] = 255
    settings = SegmenterTraining(crop_size=size, scale=(0.24, 0.24), **PLAIN)
    for view in (augment(pixels, labels, settings, np.random.default_rng(0)), whole_view(pixels, labels, 38)):
        inside = view.photo[0][view.labels == 1]
        assert inside.min() > 90 and inside.max() < 165


def only(change: int, strength: float) -> list[float]:
    return [strength if i == change else 0.0 for i in range(4)]


@pytest.mark.parametrize(
    ("change", "adjust"), [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation)]
)
def test_color_jitter_equals_torchvision(change, adjust):
    photo = 0.3 + 0.3 * torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order = rng.permutation(4)
        draws = [rng.uniform(0.5, 1.5) if i == change else rng.random() for i in order]
        expected = adjust(photo, draws[list(order).index(change)])
        torch.testing.assert_close(
            color_jitter(photo, only(change, 0.5), np.random.default_rng(seed)), expected, atol=1e-4, rtol=0
        )


def test_hue_rotates_about_the_gray_axis():
    photo = 0.3 + 0.3 * torch.rand(3, 9, 11)
    other = color_jitter(photo, only(3, 0.2), np.random.default_rng(0))
    torch.testing.assert_close(other.mean(0), photo.mean(0))
    assert (other - photo).abs().max() > 0.02
    gray = torch.rand(1, 9, 11).expand(3, -1, -1)
    torch.testing.assert_close(color_jitter(gray, only(3, 0.2), np.random.default_rng(0)), gray, atol=1e-6, rtol=0)
    torch.testing.assert_close(color_jitter(photo, [0, 0, 0, 0], np.random.default_rng(0)), photo, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_color_jitter_equals_its_steps(seed):
    """Brightness, contrast, saturation and hue in the drawn order; factors are never negative."""
    photo = 0.4 + 0.1 * torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(seed))
    strengths = [1.2, 0.4, 0.6, 0.2]
    rng, pixels = np.random.default_rng(seed), photo.flatten(1).T.double().numpy()
    luma = LUMA.double().numpy()
    for change in rng.permutation(4):
        strength = strengths[change]
        factor = rng.uniform(-strength if change == 3 else max(0, 1 - strength), strength + (change != 3))
        if change == 0:
            pixels = factor * pixels
        elif change == 1:
            pixels = factor * pixels + (1 - factor) * (pixels @ luma).mean()
        elif change == 2:
            pixels = factor * pixels + (1 - factor) * (pixels @ luma)[:, None]
        else:
            pixels = Rotation.from_rotvec(np.full(3, 2 * np.pi * factor / 3**0.5)).apply(pixels)
    result = color_jitter(photo, strengths, np.random.default_rng(seed))
    np.testing.assert_allclose(result.flatten(1).T, pixels.clip(0, 1), atol=2e-6)


def test_luma_is_that_of_torchvision():
    photo = torch.rand(3, 4, 5)
    torch.testing.assert_close(torch.einsum("c,chw->hw", LUMA, photo), TF.rgb_to_grayscale(photo)[0])


@pytest.mark.parametrize(
    ("size", "sigma", "kernel"), [((45, 50), 10.0, 39), ((45, 50), 1.0, 9), ((5, 9), 6.0, 9), ((9, 5), 6.0, 9)]
)
def test_side_of_the_blur_kernel(size, sigma, kernel):
    """At most 39, 4 sigma to each side, and what a small photo reflects."""
    photo = torch.rand(3, *size)
    expected = TF.gaussian_blur(photo, [kernel, kernel], [sigma, sigma])
    torch.testing.assert_close(gaussian_blur(photo, sigma), expected, atol=1e-5, rtol=0)
    assert torch.equal(gaussian_blur(photo[:, :1, :1], sigma), photo[:, :1, :1])


@pytest.mark.parametrize("change", ["flip", "color_jitter", "grayscale", "blur"])
def test_changes_occur_with_their_probabilities(change):
    settings = SegmenterTraining(crop_size=16, scale=(1.0, 1.0), **PLAIN | {f"{change}_prob": 0.25})
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    rng, labels = np.random.default_rng(1), np.zeros((16, 16), np.int32)
    views = [augment(pixels, labels, settings, rng).photo.permute(1, 2, 0).numpy() for _ in range(200)]
    assert 30 < sum((view != pixels).any() for view in views) < 70
    photo = torch.rand(3, 9, 9)
    blurred = recolored(photo, SegmenterTraining(**PLAIN | {"blur_prob": 1.0}, blur_sigma=(1.5, 1.5)), rng)
    torch.testing.assert_close(blurred, gaussian_blur(photo, 1.5))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma):
    photo = torch.rand(3, 45, 50)
    torch.testing.assert_close(
        gaussian_blur(photo, sigma), TF.gaussian_blur(photo, [39, 39], [sigma] * 2), atol=4e-4, rtol=0
    )


def test_probabilities():
    pixels, labels = photo_with_box(64, 64)
    pixels = pixels // np.array([1, 2, 4], np.uint8)
    base = {"crop_size": 64, "scale": (1.0, 1.0), **PLAIN}

    def view(**changed):
        return augment(pixels, labels, SegmenterTraining(**{**base, **changed}), np.random.default_rng(3))

    plain = view()
    np.testing.assert_array_equal(plain.photo.permute(1, 2, 0), pixels)
    assert torch.equal(view(flip_prob=1.0).photo, plain.photo.flip(2))
    gray = view(grayscale_prob=1.0).photo
    torch.testing.assert_close(gray[0].float(), torch.einsum("c,chw->hw", LUMA, plain.photo.float()), atol=0.51, rtol=0)
    assert torch.equal(gray[0], gray[2])
    assert not torch.equal(view(blur_prob=1.0, blur_sigma=(2.0, 2.0)).photo, plain.photo)
    assert torch.equal(
        view(flip_prob=1.0, color_jitter_prob=1.0, grayscale_prob=1.0, blur_prob=1.0).labels, plain.labels.flip(1)
    )


def test_invalid_settings_raise_user_error():
    for given_, message in (
        ({"paste_objects": (2, 1)}, "paste_objects"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"grayscale_prob": 1.5}, "gray"),
    ):
        with pytest.raises(UserError, match=message):
            make_config({"photos": "p", "segmenter": given_})
