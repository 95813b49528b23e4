# SPDX-License-Identifier: MIT
"""Training augmentation: random scale, crop, flip, color jitter and blur, and copy-paste of objects between photos.

All randomness comes from the generator that the caller passes, so that a sample does not depend on anything else.
Labels are int32: 0 is the background, i + 1 the i-th category, and IGNORE is excluded from the loss. The number of
categories is therefore not limited to 255.

Color jitter follows torchvision's ColorJitter, with two differences that save 95% of its time. Hue rotates colors about
the gray axis instead of converting to HSV. Brightness, contrast, saturation and hue are then affine maps of RGB, and
their composition is one matrix product per photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..config import DeepLabTraining

IGNORE = -1  # label of pixels that are excluded from the loss and never pasted
BLUR_KERNEL = 39  # side in pixels; taps below 1/3000 of the central weight are omitted
LUMA = torch.tensor([0.2989, 0.587, 0.114])
# Matrices on RGB: the projection onto the gray axis, and a quarter turn about it.
GRAY = torch.full((3, 3), 1 / 3)
TURN = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)


class View(NamedTuple):
    """A training crop.

    Attributes:
        photo: uint8 [3, S, S].
        labels: int32 [S, S].
    """

    photo: Tensor
    labels: Tensor


def augment(pixels: np.ndarray, labels: np.ndarray, settings: DeepLabTraining, rng: np.random.Generator) -> View:
    """Randomly scales, crops, flips, recolors and blurs a photo.

    The scale factor is drawn from `settings.scale`. If a scaled side is longer than the view, a window at a uniformly
    random position is cropped from it (only the window is resized). If it is shorter, the photo is placed at a
    uniformly random position and padded with its mean color and IGNORE. The positions along the two sides are
    independent.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        labels: Its labels, int32 [H, W].
        settings: Sizes, strengths and probabilities.
        rng: Source of randomness.

    Returns:
        A view with sides of S = `settings.crop_size` pixels.
    """
    size = settings.crop_size
    scale = rng.uniform(*settings.scale)
    rows, columns = (_random_window(side, scale, size, rng) for side in labels.shape)
    h, w = rows.scaled, columns.scaled
    window = (rows.start, columns.start, rows.length, columns.length, [h, w])
    photo = TF.resized_crop(torch.from_numpy(pixels).permute(2, 0, 1), *window, antialias=True).float() / 255
    resized = TF.resized_crop(torch.from_numpy(labels)[None], *window, TF.InterpolationMode.NEAREST_EXACT)[0]
    y, x = slice(rows.padding, rows.padding + h), slice(columns.padding, columns.padding + w)
    view = photo.mean((1, 2)).view(3, 1, 1).repeat(1, size, size)
    view[:, y, x] = photo
    padded = torch.full((size, size), IGNORE, dtype=torch.int32)
    padded[y, x] = resized
    if rng.random() < settings.flip_prob:
        view, padded = view.flip(2), padded.flip(1)
    return View(recolored(view, settings, rng).mul(255).round_().clamp_(0, 255).to(torch.uint8), padded)


def whole_view(pixels: np.ndarray, labels: np.ndarray, size: int) -> View:
    """The whole photo, reduced to fit into a view if it is larger, at the top left; the rest is padded as in `augment`.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        labels: Its labels, int32 [H, W].
        size: Side of the view.
    """
    scale = min(1.0, size / max(labels.shape))
    h, w = (max(1, round(scale * side)) for side in labels.shape)
    photo = TF.resize(torch.from_numpy(pixels).permute(2, 0, 1), [h, w], antialias=True)
    view = photo.float().mean((1, 2)).round_().to(torch.uint8).view(3, 1, 1).repeat(1, size, size)
    view[:, :h, :w] = photo
    padded = torch.full((size, size), IGNORE, dtype=torch.int32)
    padded[:h, :w] = TF.resize(torch.from_numpy(labels)[None], [h, w], TF.InterpolationMode.NEAREST_EXACT)[0]
    return View(view, padded)


def recolored(photo: Tensor, settings: DeepLabTraining, rng: np.random.Generator) -> Tensor:
    """Randomly changes the colors of a photo, makes it gray, and blurs it, each with its own probability.

    Args:
        photo: float32 [3, h, w] in [0, 1].
        settings: Strengths and probabilities.
        rng: Source of randomness.

    Returns:
        float32 [3, h, w].
    """
    if rng.random() < settings.color_jitter_prob:
        photo = color_jitter(photo, settings.color_jitter, rng)
    if rng.random() < settings.grayscale_prob:
        photo = torch.einsum("c,chw->hw", LUMA, photo).expand(3, -1, -1)
    if rng.random() < settings.blur_prob:
        photo = gaussian_blur(photo, rng.uniform(*settings.blur_sigma))
    return photo


class _Window(NamedTuple):
    """A window along one side of a photo: its start and length, its length in the view, and the padding before it."""

    start: int
    length: int
    scaled: int
    padding: int


def _random_window(side: int, scale: float, size: int, rng: np.random.Generator) -> _Window:
    scaled = max(1, round(scale * side))
    if scaled <= size:
        return _Window(0, side, scaled, int(rng.integers(size - scaled + 1)))
    length = min(side, max(1, round(size / scale)))
    return _Window(int(rng.integers(side - length + 1)), length, size, 0)


def color_jitter(photo: Tensor, strengths: Sequence[float], rng: np.random.Generator) -> Tensor:
    """Randomly changes brightness, contrast, saturation and hue of a photo, in random order.

    Args:
        photo: float32 [3, h, w] in [0, 1].
        strengths: Of brightness, contrast, saturation and hue, as in ColorJitter: the first three are scaled by a
            factor from [1 - s, 1 + s], hue is rotated by a part of the color circle from [-s, s].
        rng: Source of randomness.

    Returns:
        float32 [3, h, w] in [0, 1].
    """
    matrix, shift = torch.eye(3), torch.zeros(3)
    mean = photo.mean((1, 2))
    for change in rng.permutation(4).tolist():
        strength = strengths[change]
        if change == 3:  # hue
            angle = 2 * math.pi * rng.uniform(-strength, strength)
            step, offset = GRAY + math.cos(angle) * (torch.eye(3) - GRAY) + math.sin(angle) * TURN, torch.zeros(3)
        else:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            step, offset = factor * torch.eye(3), torch.zeros(3)
            if change == 1:  # contrast: blend with the photo's current mean luma
                offset = (1 - factor) * (LUMA @ (matrix @ mean + shift)) * torch.ones(3)
            if change == 2:  # saturation: blend with each pixel's luma
                step = step + (1 - factor) * LUMA.expand(3, 3)
        matrix, shift = step @ matrix, step @ shift + offset
    return torch.addmm(shift[:, None], matrix, photo.flatten(1)).clamp_(0, 1).view(photo.shape)


def gaussian_blur(photo: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with reflected borders.

    torchvision convolves with the square kernel, which takes 1,521 products per pixel.

    Args:
        photo: float32 [3, h, w].
        sigma: In pixels.

    Returns:
        float32 [3, h, w].
    """
    radius = min(BLUR_KERNEL // 2, math.ceil(4 * sigma), min(photo.shape[1:]) - 1)
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for axis, padding in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        padded, length = F.pad(photo[None], padding, mode="reflect")[0], photo.shape[axis]
        photo = padded.narrow(axis, radius, length) * (weights[0] / total)
        for k in range(1, radius + 1):
            pair = padded.narrow(axis, radius - k, length) + padded.narrow(axis, radius + k, length)
            photo.add_(pair, alpha=weights[k] / total)
    return photo


def copy_paste(view: View, others: Sequence[View], rng: np.random.Generator) -> None:
    """Pastes the objects of other views into a view, in place and in order, at uniformly random positions.

    Args:
        view: View to change.
        others: Views with the objects to paste, at most as large as `view`. Views without an object are skipped.
        rng: Source of randomness.
    """
    for other in others:
        if (box := object_box(other.labels)) is not None:
            h, w = box[2] - box[0], box[3] - box[1]
            top, left = (
                int(rng.integers(side - part + 1)) for side, part in zip(view.labels.shape, (h, w), strict=True)
            )
            paste_object(view, other, top, left)


def object_box(labels: Tensor) -> tuple[int, int, int, int] | None:
    """Bounding box of the object, that is, of all pixels that are neither background nor IGNORE.

    Args:
        labels: int32 [h, w].

    Returns:
        (top, left, bottom, right), bottom and right exclusive; None if there is no object.
    """
    is_object = labels > 0
    rows, columns = is_object.any(1).nonzero(), is_object.any(0).nonzero()
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def paste_object(view: View, other: View, top: int, left: int) -> None:
    """Pastes the object of a view into another view, in place.

    Args:
        view: View to change.
        other: View with the object.
        top: Row of `view` for the top of the object's bounding box.
        left: Column of `view` for the left of the object's bounding box.

    Raises:
        ValueError: If `other` has no object, or if the object does not fit at this position.
    """
    if (box := object_box(other.labels)) is None:
        raise ValueError("paste_object: there is no object in `other`")
    y, x, bottom, right = box
    pasted = other.labels[y:bottom, x:right]
    h, w = pasted.shape
    photo, labels = view.photo[:, top : top + h, left : left + w], view.labels[top : top + h, left : left + w]
    if pasted.shape != labels.shape:
        raise ValueError(f"paste_object: an object of {h} x {w} pixels does not fit at ({top}, {left})")
    is_object = pasted > 0
    photo.copy_(torch.where(is_object, other.photo[:, y:bottom, x:right], photo))
    labels.copy_(torch.where(is_object, pasted, labels))
