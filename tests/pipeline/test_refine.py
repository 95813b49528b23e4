# SPDX-License-Identifier: MIT
"""What each refinement method passes to its operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import namedmask_kernels
from namedmask.config import CrfConfig, PamrConfig, RefineConfig
from namedmask.refine import Refiner, fill_holes, keep_largest_component
from namedmask_kernels import Ragged

SETTINGS = {
    "bilateral": RefineConfig(name="bilateral", sigma_spatial=24.0),
    "crf": RefineConfig(name="crf", crf=CrfConfig(iterations=2, gaussian_sigma=12.0, bilateral_sigma=40.0)),
    "pamr": RefineConfig(name="pamr", pamr=PamrConfig(dilations=[4, 8, 12], iterations=3)),
}


def expected(method: str, target: torch.Tensor, pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """The operator with lengths `scale` times those of SETTINGS."""
    config = SETTINGS[method]
    if method == "bilateral":
        spatial, smoothness = max(1.0, 24 * scale), config.smoothness
        binary = (target > 0.5).float()
        sigmas = {"sigma_luma": config.sigma_luma, "sigma_chroma": config.sigma_chroma}
        return namedmask_kernels.bilateral_solver(
            binary, pixels, sigma_spatial=spatial, smoothness=smoothness, **sigmas
        )
    if method == "pamr":
        dilations = {0.5: [2, 4, 6], 2.0: [8, 16, 24], 0.0625: [1]}[scale]
        return namedmask_kernels.pamr(target, pixels, dilations=dilations, iterations=3)
    crf = config.crf
    foreground = 0.5 + (2 * crf.confidence - 1) * (target - 0.5)
    return namedmask_kernels.dense_crf(
        torch.stack([1 - foreground, foreground], -1),
        pixels,
        iterations=2,
        gaussian=(max(1.0, 12 * scale), crf.gaussian_weight),
        bilateral=(max(1.0, 40 * scale), crf.color_sigma, crf.bilateral_weight),
    )[..., 1]


@pytest.mark.parametrize(("short", "scale"), [(256, 0.5), (1024, 2.0), (32, 0.0625)])
@pytest.mark.parametrize("method", SETTINGS)
def test_lengths_are_those_of_a_photo_with_a_short_side_of_512_pixels(method, short, scale):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (short, short + 8, 3), dtype=np.uint8)
    target = torch.from_numpy(rng.integers(0, 5, pixels.shape[:2])).float() / 4  # 0, 0.25, 0.5, ...
    refined = Refiner(SETTINGS[method]).refine(Ragged.pack([pixels]), Ragged.pack([target]))
    torch.testing.assert_close(refined.grids()[0], expected(method, target, torch.from_numpy(pixels), scale))


@pytest.mark.parametrize("method", SETTINGS)
def test_a_batch_of_photos_of_any_sizes_is_one_call_of_the_operator(method, monkeypatch):
    name = {"bilateral": "bilateral_solver", "crf": "dense_crf"}.get(method, method)
    operator, calls = getattr(namedmask_kernels, name), []
    monkeypatch.setattr(namedmask_kernels, name, lambda *a, **k: calls.append(1) or operator(*a, **k))
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((30, 70), (64, 40), (0, 9), (1, 5), (9, 30))]
    masks = [torch.from_numpy(rng.random(image.shape[:2]).astype(np.float32)) for image in images]
    refiner = Refiner(SETTINGS[method])
    refined = refiner.refine(Ragged.pack(images), Ragged.pack(masks))
    assert len(calls) == 1 and refined.rows.dtype == torch.float32
    for image, mask, soft in zip(images, masks, refined.grids(), strict=True):
        assert torch.equal(soft, refiner.refine(Ragged.pack([image]), Ragged.pack([mask])).grids()[0])
    no_images, no_masks = Ragged.pack(images), Ragged.pack(masks)
    empty = refiner.refine(Ragged.of_shapes(no_images.rows[:0], []), Ragged.of_shapes(no_masks.rows[:0], []))
    assert len(empty.shapes) == len(empty.rows) == 0


def test_probability_of_one_half_is_background():
    plus = torch.tensor([[0.9, 0.5, 0.9, 0.9, 0.9], [0.5, 0.5, 0.9, 0.5, 0.9], [0.9, 0.5, 0.9, 0.9, 0.9]])
    grids = Ragged.pack([plus])
    largest = torch.where(torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]) > 0, plus, 0.0)
    assert torch.equal(keep_largest_component(grids).grids()[0], largest)
    filled = plus.clone()
    filled[1, 3] = 1
    assert torch.equal(fill_holes(grids).grids()[0], filled)
