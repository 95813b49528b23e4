# SPDX-License-Identifier: MIT
"""resize compared with torchvision on tensors, Pillow and OpenCV, one photo at a time as peers take them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

import namedmask_kernels as nk
from common import Work, compare, report_gpu
from namedmask_kernels import Ragged

OLD, NEW, BATCH = (1200, 1600), (512, 683), 8


def photos() -> list[np.ndarray]:
    """Smooth photos with noise, uint8 [h, w, 3]."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(BATCH)]
    smooth = [np.asarray(Image.fromarray(c).resize(OLD[::-1], Image.Resampling.BICUBIC)) for c in coarse]
    return [np.clip(s + rng.normal(0, 5, s.shape), 0, 255).astype(np.uint8) for s in smooth]


def same(ours, other) -> None:
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_batch(benchmark, interpolation, count):
    images = photos()
    batch = Ragged.pack([torch.from_numpy(image) for image in images])
    mode, pillow = functional.InterpolationMode(interpolation), Image.Resampling[interpolation.upper()]

    def with_torchvision():  # [3, h, w] with channels last, its faster layout
        planes = (torch.from_numpy(image).permute(2, 0, 1) for image in images)
        return [functional.resize(plane, NEW, mode, antialias=True).permute(1, 2, 0) for plane in planes]

    compare(
        f"resize, {BATCH} photos of {OLD[0]} x {OLD[1]} to {NEW[0]} x {NEW[1]}, {interpolation}, {count} threads",
        {
            "cpu": lambda: list(nk.resize(batch, NEW, interpolation=interpolation).grids()),
            "torchvision": with_torchvision,
            "Pillow": lambda: [np.asarray(Image.fromarray(i).resize(NEW[::-1], pillow)) for i in images],
        },
        benchmark,
        same=same,
        count=count,
        moved=batch.rows.nbytes + BATCH * 3 * NEW[0] * NEW[1],
    )


def test_patches(benchmark):
    """The input of a ViT-S/16, compared with the same steps in torchvision and torch."""
    mean, std, new = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (448, 592)
    images = [torch.from_numpy(image) for image in photos()]
    batch = Ragged.pack(images)

    def with_torchvision():
        patches = []
        for image in images:
            mode = functional.InterpolationMode.BICUBIC
            pixels = functional.resize(image.permute(2, 0, 1), new, mode, antialias=True)
            pixels = functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), mean, std)
            patches.append(torch.nn.functional.unfold(pixels[None], 16, stride=16)[0].T)
        return torch.cat(patches)

    def same_patches(ours, other) -> None:
        assert (ours - other).abs().max() <= 1.01 / 255 / min(std)

    compare(
        f"resize to {new[0]} x {new[1]}, normalize and cut into patches, {BATCH} photos, bicubic, 1 thread",
        {
            "cpu": lambda: nk.resize(batch, new, interpolation="bicubic", mean=mean, std=std, patch=16).rows,
            "torchvision and torch": with_torchvision,
        },
        benchmark,
        same=same_patches,
        count=1,
        moved=batch.rows.nbytes + BATCH * 12 * new[0] * new[1],
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_batch_on_gpu(benchmark, interpolation):
    """No GPU has run this yet."""
    batch = Ragged.pack([torch.from_numpy(image) for image in photos()])

    def calls():
        on_gpu = batch.with_rows(batch.rows.cuda())
        result, expected = (nk.resize(b, NEW, interpolation=interpolation).rows.cpu().int() for b in (on_gpu, batch))
        assert (result - expected).abs().max() <= 1
        work = Work(bytes=batch.rows.nbytes + BATCH * 3 * NEW[0] * NEW[1])
        yield "resize", lambda: nk.resize(on_gpu, NEW, interpolation=interpolation), work
        mode = functional.InterpolationMode(interpolation)
        planes = torch.stack(on_gpu.grids()).permute(0, 3, 1, 2).contiguous()
        yield "torchvision, one batch", lambda: functional.resize(planes, NEW, mode, antialias=True), work

    report_gpu(f"resize, {BATCH} photos to {NEW[0]} x {NEW[1]}, {interpolation}, on a GPU", calls, BATCH, benchmark)
