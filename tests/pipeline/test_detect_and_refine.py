# SPDX-License-Identifier: MIT
"""Detectors and refinement on photos with a known object."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms import functional as TF

import namedmask_kernels
from namedmask.backbones import Backbone, Fit
from namedmask.config import CrfConfig, DetectorConfig, PamrConfig, RefineConfig, make_config
from namedmask.errors import UserError
from namedmask.photos import Photo
from namedmask.pseudolabel import Labeler, at_size_of, mask_score
from namedmask.refine import Refiner, fill_holes, keep_largest_component
from namedmask.saliency.cluster_vote import COUNTS, ClusterVoteDetector, elect
from namedmask.saliency.spectral import SpectralDetector, centered, separation
from namedmask_kernels import Ragged, vote_masks


def disc_photo(h=96, w=128):
    """A photo of a red disc on a noisy blue background, and its mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    mask = (y - h / 2) ** 2 + (x - w / 2.5) ** 2 < (h / 4) ** 2
    pixels = np.where(mask[..., None], (200, 60, 40), (50, 80, 160)) + rng.integers(-15, 16, (h, w, 1))
    return Photo("disc", pixels.clip(0, 255).astype(np.uint8)), mask


def refine(config, photo, target):
    """The refined mask of one photo."""
    return Refiner(config).refine(Ragged.pack([photo.pixels]), Ragged.pack([target])).grids()[0]


class ColorBackbone(Backbone):
    """Uses the mean color of each patch as its feature, in place of a trained network."""

    def __init__(self):
        super().__init__(timm.create_model("vit_tiny_patch16_224", num_classes=0), torch.device("cpu"), torch.float32)
        self.patch = 8

    def extract(self, photos, taps):
        colors = Ragged.pack([torch.nn.functional.avg_pool2d(p, self.patch).permute(1, 2, 0) for p in photos])
        return dict.fromkeys(taps, colors)


@pytest.fixture
def detector(monkeypatch):
    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: ColorBackbone())
    return SpectralDetector(DetectorConfig(center_features=True, image_size=192), "cpu")


def test_a_photo_whose_features_are_not_finite_is_an_error_of_that_photo(monkeypatch):
    """The other photos of its batch are labeled as without it."""

    class Overflowing(ColorBackbone):
        def extract(self, photos, taps):
            if any(float(photo.mean()) > 0.9 for photo in photos):
                raise FloatingPointError("the backbone's features are NaN or infinite")
            return super().extract(photos, taps)

    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: Overflowing())
    photo, _ = disc_photo()
    white = Photo("white", np.full((96, 128, 3), 255, np.uint8))
    labeler = Labeler(make_config({"photos": "", "detector": {"image_size": 64, "center_features": True}}), "cpu")
    ((_, alone),) = labeler._label_batch([("disc", photo)])
    labeled = dict(labeler._label_batch([("a", photo), ("white", white), ("b", photo)]))
    assert list(labeled) == ["a", "white", "b"]
    assert str(labeled["white"]) == "'white': the backbone's features are NaN or infinite"
    assert all(np.array_equal(labeled[name].mask, alone.mask) for name in "ab")


METHODS = ["bilateral", "crf", "pamr"]


@pytest.mark.parametrize("method", METHODS)
def test_spectral_detects_the_disc_and_every_method_refines_it(detector, method):
    photo, truth = disc_photo()
    (detection,) = detector.detect([photo])
    iou = lambda a: (a & truth).sum() / (a | truth).sum()  # noqa: E731
    raw = (detection.mask > 0.5).numpy()
    soft = refine(RefineConfig(name=method), photo, detection.mask)
    refined = (soft > 0.5).numpy()
    assert iou(raw) > 0.8 and iou(refined) > 0.97 and iou(refined) > iou(raw)
    assert detection.confidence > 0.8 and mask_score(refined, detection.confidence) == detection.confidence


def test_spectral_does_not_depend_on_batch_composition(detector):
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (70, 50), (33, 90))]
    for photo, together in zip(photos, detector.detect(photos), strict=True):
        (alone,) = detector.detect([photo])
        assert torch.equal(alone.mask, together.mask) and alone.confidence == together.confidence
        assert together.mask.shape == photo.pixels.shape[:2]


def test_largest_component_option():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    spotted = target.clone()
    spotted[5:15, 100:120] = 0.8  # another component
    spotted[0, 0] = 0.3  # background, kept as it is
    soft = keep_largest_component(Ragged.pack([spotted, spotted * 0.4]))
    first, second = soft.grids()
    expected = torch.where(target == 1, target, 0.0)
    expected[0, 0] = 0.3
    assert torch.equal(first, expected) and torch.equal(second, spotted * 0.4)
    alone = refine(RefineConfig(largest_component=True), photo, spotted)
    assert torch.equal(alone, refine(RefineConfig(), photo, target))


def test_fill_holes_option():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    target[44:52, 60:68] = 0
    plain, filled = (refine(RefineConfig(fill_holes=fill), photo, target) for fill in (False, True))
    holes = ndimage.binary_fill_holes((plain > 0.5).numpy()) & (plain <= 0.5).numpy()
    assert torch.equal(filled, plain.masked_fill(torch.from_numpy(holes), 1.0))
    ring = Ragged.pack([torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.4, 0.6], [0.9, 0.9, 0.9]]), torch.full((2, 2), 0.3)])
    assert fill_holes(ring).rows.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 1, 0.6, 0.9, 0.9, 0.9] + [0.3] * 4)


def test_no_refinement_returns_the_mask_of_the_detector():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    assert torch.equal(refine(RefineConfig(name="none"), photo, target), target)


@pytest.mark.parametrize("method", METHODS)
def test_refinement_does_not_depend_on_batch_composition(method):
    photos, masks = zip(
        *(disc_photo(h, w) for h, w in [(96, 128), (50, 70), (128, 96), (1, 1), (96, 200)]), strict=True
    )
    targets = [torch.from_numpy(mask).float() for mask in masks]
    config = RefineConfig(name=method)
    together = Refiner(config).refine(Ragged.pack([photo.pixels for photo in photos]), Ragged.pack(targets))
    for photo, target, soft in zip(photos, targets, together.grids(), strict=True):
        assert soft.shape == target.shape and soft.dtype == torch.float32
        assert torch.equal(soft, refine(config, photo, target))


def test_lengths_scale_with_the_photo():
    """Refining an enlarged photo and shrinking the result equals refining the photo."""
    photo, mask = disc_photo(128, 160)
    large = Photo("large", photo.pixels.repeat(4, 0).repeat(4, 1))
    for config in (RefineConfig(name="pamr", pamr=PamrConfig(dilations=[8, 16, 32])), RefineConfig(name="bilateral")):
        target = torch.from_numpy(mask).float()
        targets = Ragged.pack([target, target.repeat_interleave(4, 0).repeat_interleave(4, 1)])
        small, big = Refiner(config).refine(Ragged.pack([photo.pixels, large.pixels]), targets).grids()
        assert ((big[2::4, 2::4] > 0.5) == (small > 0.5)).float().mean() > 0.99


def test_crf_unary_is_the_mask_with_the_confidence_of_the_settings(monkeypatch):
    arguments = {}

    def dense_crf(probabilities, image, *, iterations, gaussian, bilateral):
        arguments.update(probabilities=probabilities, iterations=iterations, gaussian=gaussian, bilateral=bilateral)
        return probabilities

    monkeypatch.setattr(namedmask_kernels, "dense_crf", dense_crf, raising=False)
    photo = Photo("gray", np.full((256, 300, 3), 99, np.uint8))
    target = torch.rand(256, 300)
    config = RefineConfig(name="crf", crf=CrfConfig(confidence=0.8, iterations=3, bilateral_sigma=60.0))
    soft = refine(config, photo, target)
    torch.testing.assert_close(soft, 0.2 + 0.6 * target)
    torch.testing.assert_close(arguments.pop("probabilities").rows.sum(1), torch.ones(256 * 300))
    assert arguments == {"iterations": 3, "gaussian": ([1.5], 3.0), "bilateral": ([30.0], 13.0, 10.0)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crf": {"confidence": 0.5}}, "refine.crf.confidence: expected above 0.5, got 0.5"),
        ({"crf": {"bilateral_sigma": 0.0}}, "refine.crf.bilateral_sigma: expected at least 0.1, got 0.0"),
        ({"crf": {"iterations": 0}}, "refine.crf.iterations: expected at least 1, got 0"),
        ({"crf": {"weight": 3.0}}, "there is no setting 'refine.crf.weight'"),
        ({"pamr": {"iterations": -2}}, "refine.pamr.iterations: expected at least 1, got -2"),
        ({"pamr": {"dilations": []}}, "refine.pamr.dilations: List should have at least 1 item"),
        ({"pamr": {"dilations": [1, 0]}}, "refine.pamr.dilations: expected at least 1, got 0"),
        ({"pamr": {"dilations": list(range(1, 18))}}, "refine.pamr.dilations: List should have at most 16 items"),
    ],
)
def test_invalid_settings_raise_user_error_with_their_names(settings, message):
    with pytest.raises(UserError, match=f"wrong settings: {re.escape(message)}"):
        make_config({"photos": "photos", "refine": settings})


def test_photo_of_one_pixel(detector):
    photo = Photo("dot", np.zeros((1, 1, 3), np.uint8))
    (detection,) = detector.detect([photo])
    assert detection.mask.shape == (1, 1)
    for method in ("bilateral", "pamr"):
        soft = refine(RefineConfig(name=method), photo, detection.mask)
        assert soft.isfinite().all()


def test_mask_score_decreases_with_the_covered_border():
    mask = np.zeros((10, 10), bool)
    assert mask_score(mask, 0.9) == 0
    mask[3:6, 3:6] = True
    assert mask_score(mask, 0.9) == pytest.approx(0.9)
    mask[0] = True  # 10 of the 36 border pixels
    assert mask_score(mask, 0.9) == pytest.approx(0.9 * 26 / 36)
    assert mask_score(np.ones((1, 1), bool), 0.9) == 0


def test_separation_is_the_distance_of_means_over_the_spread():
    vector = torch.tensor([[3.0, 5.0, -3.0, -5.0]])
    inside = vector > 0
    ratio = 8 / 2**0.5
    assert separation(vector, inside) == pytest.approx(ratio / (1 + ratio))
    assert separation(vector, torch.zeros_like(inside)) == 0 == separation(vector, torch.ones_like(inside))
    assert separation(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[True, True, False]])) <= 1


def test_centering_is_per_photo():
    batch = Ragged.pack([torch.randn(3, 4, 5) + 7, torch.randn(2, 2, 5) - 3])
    for grid in centered(batch).grids():
        torch.testing.assert_close(grid.mean((0, 1)), torch.zeros(5), atol=1e-5, rtol=0)


def test_confidence_is_the_mean_iou_with_the_other_voters():
    """In three labelings of 60 pixels, the object has 10, 10 and 12 pixels."""
    labels = torch.zeros(1, 60, 3, dtype=torch.int32)
    labels[0, :10, :2] = 1
    labels[0, :12, 2] = 1
    vote = vote_masks(torch.stack([labels[..., c] == k for c, count in enumerate(COUNTS) for k in range(count)]))
    winner = int(vote.winner)
    others = [k for k in range(9) if vote.kept[k] and k != winner]
    masks = [labels[..., c] == k for c, count in enumerate(COUNTS) for k in range(count)]
    ious = [float((masks[winner] & masks[k]).sum() / (masks[winner] | masks[k]).sum()) for k in others]
    assert COUNTS == (2, 3, 4) and len(others) >= 2
    detection = elect([labels], [Fit((8, 480), (1, 60), 8)], (1, 60))
    assert detection.confidence == pytest.approx(sum(ious) / len(ious)) and 0 < detection.confidence < 1
    assert torch.equal(detection.mask > 0.5, masks[winner])


@pytest.fixture
def voter(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "namedmask.saliency.cluster_vote.load", lambda *a, **k: loaded.append((a, k)) or ColorBackbone()
    )
    config = DetectorConfig(
        name="cluster-vote", center_features=True, image_size=192, more_backbones=["b", "c=/weights"]
    )
    detector = ClusterVoteDetector(config, "cpu")
    assert [a for a, _ in loaded] == [("vit_small_patch8_224.dino", None), ("b", None), ("c", "/weights")]
    detector.backbones[1].patch, detector.backbones[2].patch = 12, 16
    return detector


def test_cluster_vote_detects_the_disc(voter):
    photo, truth = disc_photo()
    (detection,) = voter.detect([photo])
    mask = (detection.mask > 0.5).numpy()
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    assert 0.1 < detection.confidence < 1 and voter.tokens(photo) == 24 * 32


def test_cluster_vote_does_not_depend_on_batch_composition(voter):
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (70, 50), (33, 90), (1, 1))]
    for photo, together in zip(photos, voter.detect(photos), strict=True):
        (alone,) = voter.detect([photo])
        assert torch.equal(alone.mask, together.mask) and alone.confidence == together.confidence
        assert together.mask.shape == photo.pixels.shape[:2] and together.mask.isfinite().all()


def test_winner_is_the_cluster_shared_by_all_counts():
    """A square is a cluster for every k; the rest is divided differently each time."""
    square = torch.zeros(12, 12, dtype=torch.bool)
    square[4:8, 4:8] = True
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    three, four = (x > 5).int(), (x > 5).int() + (y > 9).int()
    labels = torch.stack([square.int(), torch.where(square, 2, three), torch.where(square, 3, four)], 2).int()
    detection = elect([labels], [Fit((96, 96), (12, 12), 8)], (24, 36))
    expected = square.repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert ((detection.mask > 0.5) == expected).float().mean() > 0.97 and 0 < detection.confidence <= 1


PADDED = {"image_size": 100, "interpolation": "bilinear", "patch_fit": "pad"}


def test_size_of_a_padded_photo():
    """The sizes are torchvision's; the last patches reach beyond the photo, whose pixels are not stretched."""
    backbone = ColorBackbone()
    backbone.interpolation, backbone.patch_fit = "bilinear", "pad"
    rng = np.random.default_rng(0)
    for shape in ((97, 131), (131, 97), (375, 500), (33, 90), (1, 1), (1, 4), (3, 2)):
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        expected = TF.resize(Image.fromarray(pixels), 100, TF.InterpolationMode.BILINEAR)
        fit, photo = backbone.fit(pixels, 100), backbone.resize(pixels, 100)
        assert fit.size == expected.size[::-1] and fit.grid == tuple(-(-side // 8) for side in fit.size)
        np.testing.assert_array_equal(photo.permute(1, 2, 0), np.asarray(expected))
        prepared = backbone.prepare(pixels, 100)
        assert prepared.shape[1:] == tuple(8 * side for side in fit.grid)
        assert not prepared[:, fit.size[0] :].any() and not prepared[:, :, fit.size[1] :].any()
    assert backbone.fit(np.empty((10, 4000, 3), np.uint8), 100).size == (1, 400)


def test_values_on_patches_at_the_pixels_of_a_padded_photo():
    values = torch.arange(6.0).reshape(1, 1, 2, 3)
    whole = torch.nn.functional.interpolate(values, (16, 24), mode="bilinear")
    assert torch.equal(Fit((13, 20), (2, 3), 8).without_padding(values), whole[..., :13, :20])
    assert Fit((16, 24), (2, 3), 8).without_padding(values) is values


@pytest.mark.parametrize("size", ["photo", "detector"])
@pytest.mark.parametrize("name", ["spectral", "cluster-vote"])
def test_padded_photos_and_refinement_at_the_size_of_the_detector(monkeypatch, name, size):
    """The settings hold for all detectors; results do not depend on batch composition."""

    def load(*arguments, interpolation, patch_fit, **others):
        backbone = ColorBackbone()
        backbone.interpolation, backbone.patch_fit = interpolation, patch_fit
        return backbone

    monkeypatch.setattr(f"namedmask.saliency.{name.replace('-', '_')}.load", load)
    settings = {"detector": {**PADDED, "name": name, "center_features": True}, "refine": {"size": size}}
    labeler = Labeler(make_config({"photos": "", **settings}), "cpu")
    photos = [disc_photo(h, w) for h, w in ((96, 128), (203, 171), (90, 121))]
    batch = [(str(number), photo) for number, (photo, _) in enumerate(photos)]
    for item, (_, together), (photo, truth) in zip(batch, labeler._label_batch(batch), photos, strict=True):
        ((_, alone),) = labeler._label_batch([item])
        assert np.array_equal(alone.mask, together.mask) and alone.score == together.score
        assert together.mask.shape == together.detected.shape == truth.shape
        assert (together.mask & truth).sum() / (together.mask | truth).sum() > 0.9
        expected = (100, 133) if size == "detector" and truth.shape == (96, 128) else labeler._size(photo)
        assert labeler._size(photo) == expected and labeler._pixels(photo) >= max(truth.size, np.prod(expected))


def test_nearest_pixel_of_a_mask_is_that_of_pillow():
    mask = torch.from_numpy(np.random.default_rng(3).random((31, 47)) > 0.5)
    for size in ((31, 47), (64, 93), (20, 17), (1, 1), (30, 45), (310, 470)):
        expected = Image.fromarray(mask.numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(at_size_of(Photo("", np.empty((*size, 3), np.uint8)), mask), np.asarray(expected) > 0)
