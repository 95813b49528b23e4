# SPDX-License-Identifier: MIT
"""Detectors and refinement on photos with a known object."""

import re

import numpy as np
import pytest
import timm
import torch
from detections import detect, packed
from PIL import Image
from scipy import ndimage
from torchvision.transforms import functional as TF

import namedmask_kernels
from namedmask import batches
from namedmask.backbones import Backbone, Fit, untrained
from namedmask.batches import cropped, flipped, nearest, runs
from namedmask.config import CrfConfig, DetectorConfig, PamrConfig, RefineConfig, make_config
from namedmask.errors import UserError
from namedmask.masks import mask_score
from namedmask.photos import Photo
from namedmask.pseudolabel import Labeler
from namedmask.refine import Refiner, fill_holes, keep_largest_component
from namedmask.saliency import make_detector
from namedmask.saliency.cluster_vote import COUNTS, ClusterVoteDetector, elect
from namedmask.saliency.detector import at_sizes, centered
from namedmask.saliency.selfmask import SelfMask
from namedmask.saliency.spectral import SpectralDetector, separation
from namedmask_kernels import Ragged, vote_masks


def disc_photo(h=96, w=128):
    """A photo of a red disc on a noisy blue background, and its mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    mask = (y - h / 2) ** 2 + (x - w / 2.5) ** 2 < (h / 4) ** 2
    pixels = np.where(mask[..., None], (200, 60, 40), (50, 80, 160)) + rng.integers(-15, 16, (h, w, 1))
    return Photo("disc", pixels.clip(0, 255).astype(np.uint8)), mask


def refine(config, photos, targets):
    return Refiner(config).refine(packed(*photos), Ragged.pack(targets)).grids()


class ColorBackbone(Backbone):
    """Uses the mean color of each patch as its feature, in place of a trained network."""

    def __init__(self):
        super().__init__(timm.create_model("vit_tiny_patch16_224", num_classes=0), torch.device("cpu"), torch.float32)
        self.patch = 8

    def extract(self, patches, taps):
        return dict.fromkeys(taps, patches.with_rows(patches.rows.unflatten(1, (3, -1)).mean(2)))


@pytest.fixture
def detector(monkeypatch):
    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: ColorBackbone())
    return SpectralDetector(DetectorConfig(center_features=True, image_size=192), "cpu")


def test_a_photo_whose_features_are_not_finite_is_an_error_of_that_photo(monkeypatch):
    """The other photos of its batch are labeled as without it."""

    class Overflowing(ColorBackbone):
        def extract(self, patches, taps):
            if any(float(photo.mean()) > 0.9 for photo in patches.grids()):
                raise FloatingPointError("the backbone's features are NaN or infinite")
            return super().extract(patches, taps)

    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: Overflowing())
    photo, _ = disc_photo()
    white = Photo("white", np.full((96, 128, 3), 255, np.uint8))
    labeler = Labeler(make_config({"photos": "", "detector": {"image_size": 64, "center_features": True}}), "cpu")
    ((_, alone),) = labeler._label_batch([(("disc", None), photo)])
    batch = [((name, None), own) for name, own in (("a", photo), ("white", white), ("b", photo))]
    labeled = {name: label for (name, _), label in labeler._label_batch(batch)}
    assert list(labeled) == ["a", "white", "b"]
    assert str(labeled["white"]) == "'white': the backbone's features are NaN or infinite"
    assert all(labeled[name] == alone for name in "ab")


METHODS = ["bilateral", "crf", "pamr"]


@pytest.mark.parametrize("method", METHODS)
def test_spectral_detects_the_disc_and_every_method_refines_it(detector, method):
    photo, truth = disc_photo()
    ((mask, confidence),) = detect(detector, photo)
    iou = lambda a: (a & truth).sum() / (a | truth).sum()  # noqa: E731
    raw = (mask > 0.5).numpy()
    (soft,) = refine(RefineConfig(name=method), [photo], [mask])
    refined = (soft > 0.5).numpy()
    assert iou(raw) > 0.8 and iou(refined) > 0.97 and iou(refined) > iou(raw)
    assert confidence > 0.8 and mask_score(refined, confidence) == confidence


def test_spectral_does_not_depend_on_batch_composition(detector):
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (96, 128), (70, 50), (33, 90), (96, 128))]
    for photo, (mask, confidence) in zip(photos, detect(detector, *photos), strict=True):
        ((alone, own),) = detect(detector, photo)
        assert torch.equal(alone, mask) and own == confidence and mask.shape == photo.size


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
    (alone,) = refine(RefineConfig(largest_component=True), [photo], [spotted])
    assert torch.equal(alone, refine(RefineConfig(), [photo], [target])[0])


def test_fill_holes_option():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    target[44:52, 60:68] = 0
    plain, filled = (refine(RefineConfig(fill_holes=fill), [photo], [target])[0] for fill in (False, True))
    holes = ndimage.binary_fill_holes((plain > 0.5).numpy()) & (plain <= 0.5).numpy()
    assert torch.equal(filled, plain.masked_fill(torch.from_numpy(holes), 1.0))
    ring = Ragged.pack([torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.4, 0.6], [0.9, 0.9, 0.9]]), torch.full((2, 2), 0.3)])
    assert fill_holes(ring).rows.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 1, 0.6, 0.9, 0.9, 0.9] + [0.3] * 4)


def test_no_refinement_returns_the_mask_of_the_detector():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    assert torch.equal(refine(RefineConfig(name="none"), [photo], [target])[0], target)


@pytest.mark.parametrize("method", METHODS)
def test_refinement_does_not_depend_on_batch_composition(method):
    photos, masks = zip(
        *(disc_photo(h, w) for h, w in [(96, 128), (50, 70), (128, 96), (1, 1), (96, 200)]), strict=True
    )
    targets = [torch.from_numpy(mask).float() for mask in masks]
    config = RefineConfig(name=method)
    for photo, target, soft in zip(photos, targets, refine(config, photos, targets), strict=True):
        assert soft.shape == target.shape and soft.dtype == torch.float32
        assert torch.equal(soft, refine(config, [photo], [target])[0])


def test_lengths_scale_with_the_photo():
    """Refining an enlarged photo and shrinking the result equals refining the photo."""
    photo, mask = disc_photo(128, 160)
    large = Photo("large", photo.pixels.repeat(4, 0).repeat(4, 1))
    for config in (RefineConfig(name="pamr", pamr=PamrConfig(dilations=[8, 16, 32])), RefineConfig(name="bilateral")):
        target = torch.from_numpy(mask).float()
        small, big = refine(config, [photo, large], [target, target.repeat_interleave(4, 0).repeat_interleave(4, 1)])
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
    (soft,) = refine(config, [photo], [target])
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
    ((mask, _),) = detect(detector, photo)
    assert mask.shape == (1, 1)
    for method in ("bilateral", "pamr"):
        (soft,) = refine(RefineConfig(name=method), [photo], [mask])
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
    inside, other = vector > 0, torch.tensor([[1.0, 1.0, -1.0]])
    ratio = 8 / 2**0.5
    vectors = Ragged.pack([vector, vector, vector, other])
    sides = Ragged.pack([inside, torch.zeros_like(inside), torch.ones_like(inside), other > 0])
    first, *empty, last = separation(vectors, sides).tolist()
    assert first == pytest.approx(ratio / (1 + ratio)) and empty == [0, 0] and 0.999 < last <= 1


def test_centering_is_per_photo():
    batch = Ragged.pack([torch.randn(3, 4, 5) + 7, torch.randn(2, 2, 5) - 3])
    for grid in centered(batch).grids():
        torch.testing.assert_close(grid.mean((0, 1)), torch.zeros(5), atol=1e-5, rtol=0)


def clusters_of(labels):
    """Labels [h, w, len(COUNTS)] as one mask per cluster, [h, w, sum(COUNTS)]."""
    return torch.stack([labels[..., c] == k for c, count in enumerate(COUNTS) for k in range(count)], -1)


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
    assert torch.equal(torch.stack(masks, -1), clusters_of(labels))
    detections = elect([Ragged.pack([clusters_of(labels)])], [[Fit((8, 480), (1, 60), 8)]], [(1, 60)])
    assert detections.confidence.item() == pytest.approx(sum(ious) / len(ious)) and 0 < detections.confidence < 1
    assert torch.equal(detections.masks.grids()[0] > 0.5, masks[winner])


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
    ((soft, confidence),) = detect(voter, photo)
    mask = (soft > 0.5).numpy()
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    assert 0.1 < confidence < 1 and voter.tokens(photo.size) == 24 * 32


def test_cluster_vote_does_not_depend_on_batch_composition(voter):
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (70, 50), (33, 90), (1, 1))]
    for photo, (mask, confidence) in zip(photos, detect(voter, *photos), strict=True):
        ((alone, own),) = detect(voter, photo)
        assert torch.equal(alone, mask) and own == confidence
        assert mask.shape == photo.size and mask.isfinite().all()


def test_winner_is_the_cluster_shared_by_all_counts():
    """A square is a cluster for every k; the rest is divided differently each time."""
    square = torch.zeros(12, 12, dtype=torch.bool)
    square[4:8, 4:8] = True
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    three, four = (x > 5).int(), (x > 5).int() + (y > 9).int()
    labels = torch.stack([square.int(), torch.where(square, 2, three), torch.where(square, 3, four)], 2).int()
    masks, confidence = elect([Ragged.pack([clusters_of(labels)])], [[Fit((96, 96), (12, 12), 8)]], [(24, 36)])
    expected = square.repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert ((masks.grids()[0] > 0.5) == expected).float().mean() > 0.97 and 0 < confidence <= 1


PADDED = {"image_size": 100, "interpolation": "bilinear", "patch_fit": "pad"}


def test_size_of_a_padded_photo():
    """The sizes are torchvision's; the last patches reach beyond the photo, whose pixels are not stretched."""
    backbone = ColorBackbone()
    backbone.interpolation, backbone.patch_fit = "bilinear", "pad"
    rng = np.random.default_rng(0)
    for shape in ((97, 131), (131, 97), (375, 500), (33, 90), (1, 1), (1, 4), (3, 2)):
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        expected = TF.resize(Image.fromarray(pixels), 100, TF.InterpolationMode.BILINEAR)
        images = packed(Photo("", pixels))
        fit, (photo,) = backbone.fit(shape, 100), backbone.resize(images, 100).grids()
        assert fit.size == expected.size[::-1] and fit.grid == tuple(-(-side // 8) for side in fit.size)
        np.testing.assert_allclose(photo.int(), np.asarray(expected, np.int32), atol=1)
        (patches,) = backbone.prepare(images, 100).grids()
        prepared = patches.unflatten(2, (3, 8, 8)).permute(2, 0, 3, 1, 4).reshape(3, *fit.whole)
        assert not prepared[:, fit.size[0] :].any() and not prepared[:, :, fit.size[1] :].any()
    assert backbone.fit((10, 4000), 100).size == (1, 400)


def test_values_on_patches_at_the_pixels_of_a_padded_photo():
    """Those of photos with padding are resized to the patches first; others go directly to the size of the mask."""
    values = torch.rand(2, 3), torch.rand(4, 2)
    fits, sizes = [Fit((13, 20), (2, 3), 8), Fit((32, 16), (4, 2), 8)], [(26, 40), (50, 30)]
    interpolate = lambda x, size: torch.nn.functional.interpolate(x[None, None], size, mode="bilinear")[0, 0]  # noqa: E731
    padded, whole = at_sizes(Ragged.pack(values), fits, sizes).grids()
    torch.testing.assert_close(padded, interpolate(interpolate(values[0], (16, 24))[:13, :20], (26, 40)))
    torch.testing.assert_close(whole, interpolate(values[1], (50, 30)))


@pytest.mark.parametrize("size", ["photo", "detector"])
@pytest.mark.parametrize("select", ["none", "prior"])
@pytest.mark.parametrize("name", ["spectral", "cluster-vote"])
def test_padded_photos_and_refinement_at_the_size_of_the_detector(monkeypatch, name, select, size):
    """The settings hold for all detectors; results do not depend on batch composition."""

    def load(*arguments, interpolation, patch_fit, **others):
        backbone = ColorBackbone()
        backbone.interpolation, backbone.patch_fit = interpolation, patch_fit
        return backbone

    monkeypatch.setattr(f"namedmask.saliency.{name.replace('-', '_')}.load", load)
    settings = {
        "detector": {**PADDED, "name": name, "select": select, "center_features": True},
        "refine": {"size": size},
        "pseudolabel": {"keep_detected": True},
    }
    labeler = Labeler(make_config({"photos": "", **settings}), "cpu")
    photos = [disc_photo(h, w) for h, w in ((96, 128), (203, 171), (90, 121))]
    batch = [((str(number), None), photo) for number, (photo, _) in enumerate(photos)]
    for item, (_, together), (photo, truth) in zip(batch, labeler._label_batch(batch), photos, strict=True):
        ((_, alone),) = labeler._label_batch([item])
        assert alone == together and together.mask.size == together.detected.size == truth.shape
        mask = together.mask.decode()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.9
        if select == "none":
            confidence = together.score / max(1e-9, 1 - together.mask.border)
            assert together.score == pytest.approx(mask_score(mask, confidence))
        expected = (100, 133) if size == "detector" and truth.shape == (96, 128) else labeler._size(photo)
        assert labeler._size(photo) == expected and labeler._pixels(photo) >= max(truth.size, np.prod(expected))


def test_nearest_pixel_of_a_mask_is_that_of_pillow():
    rng = np.random.default_rng(3)
    masks = [torch.from_numpy(rng.random(shape) > 0.5) for shape in ((31, 47), (1, 9), (50, 20))]
    batch = Ragged.pack(masks)
    assert nearest(batch, [(31, 47), (1, 9), (50, 20)]) is batch
    for size in ((31, 47), (64, 93), (20, 17), (1, 1), (30, 45), (310, 470)):
        for mask, resized in zip(masks, nearest(batch, [size] * 3).grids(), strict=True):
            image = Image.fromarray(mask.numpy().astype(np.uint8))
            expected = image.resize(size[::-1], Image.Resampling.NEAREST)
            assert np.array_equal(resized, np.asarray(expected) > 0)
    with pytest.raises(ValueError, match="zip"):
        nearest(batch, [(3, 4)])


def test_parts_of_batches():
    batch = Ragged.pack([torch.arange(6).view(2, 3), torch.arange(6).view(2, 3) + 6, torch.arange(4).view(4, 1)])
    assert flipped(batch).rows.tolist() == [2, 1, 0, 5, 4, 3, 8, 7, 6, 11, 10, 9, 0, 1, 2, 3]
    assert [x.tolist() for x in cropped(batch, [(1, 2), (2, 1), (0, 1)]).grids()] == [[[0, 1]], [[6], [9]], []]
    assert [tuple(images.shape) for images in runs(batch)] == [(1, 2, 3), (1, 2, 3), (1, 4, 1)]


@pytest.mark.parametrize("name", ["spectral", "cluster-vote", "selfmask"])
def test_photos_of_equal_size_are_processed_together_on_a_gpu(monkeypatch, tmp_path, name):
    """The results are those of one photo at a time, up to rounding."""
    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: ColorBackbone())
    monkeypatch.setattr("namedmask.saliency.cluster_vote.load", lambda *a, **k: ColorBackbone())
    network = SelfMask(untrained("vit_namedmask_demo"), queries=3, layers=2)
    monkeypatch.setattr("namedmask.saliency.selfmask.load", lambda *a, **k: network)
    flips = {"horizontal_flip": True, "scales": [1.0, 1.5]} if name == "selfmask" else {}
    detector = make_detector(DetectorConfig(name=name, center_features=True, image_size=64, **flips), "cpu")
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (96, 128), (70, 50), (70, 50), (96, 128))]
    alone = detect(detector, *photos)
    monkeypatch.setattr(batches, "joins_equal_sizes", lambda rows: True)
    together = detect(detector, *photos)
    assert [tuple(images.shape[:3]) for images in runs(packed(*photos))] == [(2, 96, 128), (2, 70, 50), (1, 96, 128)]
    for (mask, confidence), (expected, own) in zip(together, alone, strict=True):
        torch.testing.assert_close(mask, expected, atol=1e-5, rtol=0)
        assert confidence == pytest.approx(own, abs=1e-5)
