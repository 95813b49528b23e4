# SPDX-License-Identifier: MIT
"""The detector and the refiner on photos whose object is known."""

import numpy as np
import pytest
import timm
import torch

from namedmask.backbones import Backbone
from namedmask.config import DetectorConfig, RefineConfig
from namedmask.photos import Photo
from namedmask.pseudolabel import mask_score
from namedmask.refine import Refiner
from namedmask.saliency.spectral import SpectralDetector, centred, separation
from namedmask_kernels import Ragged


def disc_photo(h=96, w=128):
    """A red disc on a grainy blue ground: (photo, its mask)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    mask = (y - h / 2) ** 2 + (x - w / 2.5) ** 2 < (h / 4) ** 2
    pixels = np.where(mask[..., None], (200, 60, 40), (50, 80, 160)) + rng.integers(-15, 16, (h, w, 1))
    return Photo("disc", pixels.clip(0, 255).astype(np.uint8)), mask


class ColourBackbone(Backbone):
    """A patch's mean colour as its feature: real geometry and a real cut, without a network that was trained."""

    def __init__(self):
        super().__init__(timm.create_model("vit_tiny_patch16_224", num_classes=0), torch.device("cpu"), torch.float32)
        self.patch = 8

    def extract(self, photos, taps):
        colours = Ragged.pack([torch.nn.functional.avg_pool2d(p, self.patch).permute(1, 2, 0) for p in photos])
        return dict.fromkeys(taps, colours)


@pytest.fixture
def detector(monkeypatch):
    monkeypatch.setattr("namedmask.saliency.spectral.load", lambda *a, **k: ColourBackbone())
    return SpectralDetector(DetectorConfig(centre=True, image_size=192), "cpu")


def test_the_disc_is_found_and_the_solver_sharpens_it(detector):
    photo, truth = disc_photo()
    (found,) = detector.detect([photo])
    iou = lambda a: (a & truth).sum() / (a | truth).sum()  # noqa: E731
    raw = (found.mask > 0.5).numpy()
    refined = (Refiner(RefineConfig()).refine(photo, found.mask) > 0.5).numpy()
    assert iou(raw) > 0.8 and iou(refined) > 0.97 and iou(refined) > iou(raw)
    assert found.separation > 0.8 and mask_score(refined, found.separation) == found.separation


def test_photos_of_several_sizes_do_not_influence_each_other(detector):
    photos = [disc_photo(h, w)[0] for h, w in ((96, 128), (70, 50), (33, 90))]
    for photo, together in zip(photos, detector.detect(photos), strict=True):
        (alone,) = detector.detect([photo])
        assert torch.equal(alone.mask, together.mask) and alone.separation == together.separation
        assert together.mask.shape == photo.pixels.shape[:2]


def test_without_refinement_the_detector_s_mask_stays():
    photo, mask = disc_photo()
    target = torch.from_numpy(mask).float()
    assert Refiner(RefineConfig(name="none")).refine(photo, target) is target


def test_a_photo_of_one_pixel(detector):
    photo = Photo("dot", np.zeros((1, 1, 3), np.uint8))
    (found,) = detector.detect([photo])
    assert found.mask.shape == (1, 1)
    assert Refiner(RefineConfig()).refine(photo, found.mask).isfinite().all()


def test_the_score_falls_with_the_border_that_is_covered():
    mask = np.zeros((10, 10), bool)
    assert mask_score(mask, 0.9) == 0
    mask[3:6, 3:6] = True
    assert mask_score(mask, 0.9) == pytest.approx(0.9)
    mask[0] = True  # 10 of the 36 border pixels
    assert mask_score(mask, 0.9) == pytest.approx(0.9 * 26 / 36)
    assert mask_score(np.ones((1, 1), bool), 0.9) == 0


def test_separation_is_the_distance_of_means_in_spreads():
    vector = torch.tensor([[3.0, 5.0, -3.0, -5.0]])
    inside = vector > 0
    ratio = 8 / 2**0.5
    assert separation(vector, inside) == pytest.approx(ratio / (1 + ratio))
    assert separation(vector, torch.zeros_like(inside)) == 0 == separation(vector, torch.ones_like(inside))
    assert separation(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[True, True, False]])) <= 1


def test_centring_is_per_photo():
    batch = Ragged.pack([torch.randn(3, 4, 5) + 7, torch.randn(2, 2, 5) - 3])
    for grid in centred(batch).grids():
        torch.testing.assert_close(grid.mean((0, 1)), torch.zeros(5), atol=1e-5, rtol=0)
