# SPDX-License-Identifier: MIT
"""What a training photo goes through: scale, crop, flip, colors, blur; and objects of other photos pasted into it.

Every draw comes from the generator that the caller gives, so a sample depends on nothing else. Labels are int32: 0 is
the background, i + 1 the i-th category, IGNORE neither, so that there may be any number of categories.

Colors follow torchvision's ColorJitter, but for two liberties that save 95% of its time. Hue turns about the gray axis
instead of going through HSV; then brightness, contrast, saturation, hue and gray are each affine in RGB, and a photo's
draw of them is one matrix.
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

from ..config import SegmenterTraining

IGNORE = -1  # a pixel that says nothing: left out of the loss, never pasted
BLUR_KERNEL = 39  # pixels; what of it has less than 1/3000 of the middle's weight is left out
LUMA = torch.tensor([0.2989, 0.587, 0.114])


class View(NamedTuple):
    """A photo as the network is to see it: uint8 [3, S, S], with labels int32 [S, S]."""

    photo: Tensor
    labels: Tensor


def augmented(pixels: np.ndarray, labels: np.ndarray, settings: SegmenterTraining, rng: np.random.Generator) -> View:
    """A view of a photo uint8 [H, W, 3] with labels int32 [H, W], of S = settings.crop_size pixels a side.

    The photo is scaled by a factor of `settings.scale`. Of a side that is longer than the view a window at a uniform
    place is taken (only that is resized); a shorter one is padded evenly at both ends, with the mean color and IGNORE.
    """
    size = settings.crop_size
    scale = rng.uniform(*settings.scale)
    (top, high, h, above), (left, wide, w, before) = (_window(side, scale, size, rng) for side in labels.shape)
    window = (top, left, high, wide, [h, w])
    photo = TF.resized_crop(torch.from_numpy(pixels).permute(2, 0, 1), *window, antialias=True).float() / 255
    small = TF.resized_crop(torch.from_numpy(labels)[None], *window, TF.InterpolationMode.NEAREST_EXACT)[0]
    view = photo.mean((1, 2)).view(3, 1, 1).repeat(1, size, size)
    view[:, above : above + h, before : before + w] = photo
    padded = torch.full((size, size), IGNORE, dtype=torch.int32)
    padded[above : above + h, before : before + w] = small
    if rng.random() < settings.flip_prob:
        view, padded = view.flip(2), padded.flip(1)
    if rng.random() < settings.color_jitter_prob:
        view = jittered(view, settings.color_jitter, rng)
    if rng.random() < settings.grayscale_prob:
        view = torch.einsum("c,chw->hw", LUMA, view).expand(3, -1, -1)
    if rng.random() < settings.blur_prob:
        view = blurred(view, rng.uniform(*settings.blur_sigma))
    return View(view.mul(255).round_().clamp_(0, 255).to(torch.uint8), padded)


def _window(length: int, scale: float, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Of a photo's side: where the window begins, how long it is, its length in the view, and the padding before it."""
    scaled = max(1, round(scale * length))
    if scaled <= size:
        return 0, length, scaled, (size - scaled) // 2
    taken = min(length, max(1, round(size / scale)))
    return int(rng.integers(length - taken + 1)), taken, size, 0


def jittered(photo: Tensor, strengths: Sequence[float], rng: np.random.Generator) -> Tensor:
    """A photo float32 [3, h, w] in [0, 1] in other light and colors, within [0, 1].

    strengths: of brightness, contrast, saturation and hue, as in ColorJitter: a factor from 1 - s to 1 + s of the first
    three, a turn from -s to s of the color circle. They follow each other in an order that is drawn too.
    """
    gray = torch.full((3, 3), 1 / 3)
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    matrix, shift = torch.eye(3), torch.zeros(3)
    mean = photo.mean((1, 2))
    for which in rng.permutation(4):
        strength = strengths[which]
        if which == 3:
            angle = 2 * math.pi * rng.uniform(-strength, strength)
            step, offset = gray + math.cos(angle) * (torch.eye(3) - gray) + math.sin(angle) * turn, torch.zeros(3)
        else:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            step, offset = factor * torch.eye(3), torch.zeros(3)
            if which == 1:  # toward the mean luma of the photo as it is by now
                offset = (1 - factor) * (LUMA @ (matrix @ mean + shift)) * torch.ones(3)
            if which == 2:  # toward each pixel's luma
                step = step + (1 - factor) * LUMA.expand(3, 3)
        matrix, shift = step @ matrix, step @ shift + offset
    return torch.addmm(shift[:, None], matrix, photo.flatten(1)).clamp_(0, 1).view(photo.shape)


def blurred(photo: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of a photo float32 [3, h, w], borders reflected; columns, then rows, each a sum of shifted photos.

    torchvision sums over the square kernel: 1,521 products a pixel, where two lines of it do.
    """
    radius = min(BLUR_KERNEL // 2, math.ceil(4 * sigma), min(photo.shape[1:]) - 1)
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    whole = weights[0] + 2 * sum(weights[1:])
    for axis, padding in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        wide, length = F.pad(photo[None], padding, mode="reflect")[0], photo.shape[axis]
        photo = wide.narrow(axis, radius, length) * (weights[0] / whole)
        for k in range(1, radius + 1):
            pair = wide.narrow(axis, radius - k, length) + wide.narrow(axis, radius + k, length)
            photo.add_(pair, alpha=weights[k] / whole)
    return photo


def copy_paste(view: View, others: Sequence[View], rng: np.random.Generator) -> None:
    """Pastes the object of each of `others`, whose photos may be smaller, into `view` at uniform places, in order."""
    for other in others:
        if (box := object_box(other.labels)) is not None:
            h, w = box[2] - box[0], box[3] - box[1]
            top, left = (
                int(rng.integers(side - part + 1)) for side, part in zip(view.labels.shape, (h, w), strict=True)
            )
            paste_object(view, other, top, left)


def object_box(labels: Tensor) -> tuple[int, int, int, int] | None:
    """The box of what is neither background nor IGNORE: top, left and the rows and columns after the last; or None."""
    found = labels > 0
    rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def paste_object(view: View, other: View, top: int, left: int) -> None:
    """Puts the object of `other` into `view`, the corner of its box at (top, left); its labels take the place."""
    y, x, bottom, right = object_box(other.labels)
    theirs = other.labels[y:bottom, x:right]
    h, w = theirs.shape
    photo, labels = view.photo[:, top : top + h, left : left + w], view.labels[top : top + h, left : left + w]
    if theirs.shape != labels.shape:
        raise ValueError(f"paste_object: an object of {h} x {w} pixels does not fit at ({top}, {left})")
    is_object = theirs > 0
    photo.copy_(torch.where(is_object, other.photo[:, y:bottom, x:right], photo))
    labels.copy_(torch.where(is_object, theirs, labels))
