# SPDX-License-Identifier: MIT
"""A trained segmenter at work: one scale, the photo's own size, the class with the largest logit.

    segmenter = Segmenter.load("run/segmenter")
    mask, names = segmenter("photo.jpg")        # names[mask[y, x]]

On the CPU each thread takes a photo through the network by itself, in float32. On two AVX-512 cores neither bfloat16
(which its convolutions make slower) nor channels-last memory paid; both are for GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..formats import BACKGROUND
from ..photos import Photo, PhotoError, PhotoSource, decode_ahead
from ..threads import kernels_on_one_thread, map_ahead
from .deeplab import DeepLab, load_segmenter, on_device

GPU_BATCH = 8  # photos of one size
MIXED_VALUES = 1 << 24  # logits interpolated at once

Key = TypeVar("Key")
Seen = tuple[str, Photo | PhotoError, Any]  # a photo's name, the photo and its mask, or what is wrong and None


class Segmentation(NamedTuple):
    """mask: uint16 [H, W], the class of every pixel; names: of the classes, the background's first."""

    mask: np.ndarray
    names: list[str]


class Segmenter:
    """A network ready to look at photos; made by `load`. May be called from several threads."""

    def __init__(self, network: DeepLab, categories: Sequence[str], device: str = "cpu", precision: str = "float32"):
        self.names = [BACKGROUND, *categories]
        self.device, self.dtype = torch.device(device), getattr(torch, precision)
        self.mean, self.std = network.mean.to(device), network.std.to(device)
        folded = fold_batch_norms(network.eval().requires_grad_(False)).to(dtype=self.dtype)
        self.network = on_device(folded, self.device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        categories: Sequence[str] | None = None,
        encoder: str = "resnet50",
        device: str = "cpu",
        precision: str = "float32",
    ) -> Segmenter:
        """path:       a segmenter's folder or its model.safetensors, or NamedMask's released .pth
        categories: names of classes 1, 2, ..., and `encoder` its timm name, for weights without a categories.json
        precision:  "float32" or "bfloat16" (faster on GPUs alone)
        Errors:     UserError where weights, names and encoder do not fit together.
        """
        return cls(*load_segmenter(path, categories, encoder), device, precision)

    def __call__(self, image: np.ndarray | Image.Image | str | os.PathLike) -> Segmentation:
        """The class of every pixel of a photo: uint8 [H, W, 3] RGB, a PIL image, or the path of a file.

        Files and PIL images are turned upright by their EXIF orientation. The mask has the photo's size and is the same
        on one machine whatever the number of threads. Raises PhotoError for a file that cannot be read.
        """
        if isinstance(image, Image.Image):
            image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        elif not isinstance(image, np.ndarray):
            folder, name = os.path.split(image)
            image = PhotoSource(folder or ".").decode(name).pixels
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"Segmenter: expected a photo uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        return Segmentation(self.masks([image])[0], self.names)

    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Photos uint8 [H, W, 3] of one size -> their masks, uint16 [H, W] each."""
        height, width = images[0].shape[:2]
        found = [labels_at(logits, height, width) for logits in self.coarse_logits(images)]
        return [labels.to("cpu", torch.int32).numpy().astype(np.uint16) for labels in found]

    @torch.inference_mode()
    def coarse_logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """Photos uint8 [H, W, 3] of one size -> logits float32 [n, classes, ceil(H / 4), ceil(W / 4)]."""
        photos = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        photos = ((photos.float() / 255 - self.mean) / self.std).to(self.dtype)
        if self.device.type == "cpu":
            photos = photos.contiguous()
        return self.network.coarse_logits(photos).float()

    def segment(self, source: PhotoSource, names: Iterable[str]) -> Iterator[list[Seen]]:
        """Each photo of a source with its mask, or with what is wrong with it; a few at a time, in order."""
        return self.each(source, names, lambda photos: self.masks([photo.pixels for photo in photos]))

    def each(
        self, source: PhotoSource, names: Iterable[str], look: Callable[[list[Photo]], Sequence[Any]]
    ) -> Iterator[list[Seen]]:
        """The same with what `look` makes of photos of one size: of one on the CPU, where threads share the photos."""

        def look_at(batch: list[tuple[str, Photo | PhotoError]]) -> list[Seen]:
            found = iter(look([photo for _, photo in batch]) if isinstance(batch[0][1], Photo) else ())
            return [(name, photo, next(found, None)) for name, photo in batch]

        with kernels_on_one_thread(self.device.type) as threads:
            batches = equal_sizes(decode_ahead(source.decode, names), 1 if self.device.type == "cpu" else GPU_BATCH)
            yield from map_ahead(look_at, batches, threads)


def equal_sizes(
    photos: Iterable[tuple[Key, Photo | PhotoError]], most: int
) -> Iterator[list[tuple[Key, Photo | PhotoError]]]:
    """Neighbors of one size together, at most `most`; what could not be read is alone."""
    batch: list[tuple[Key, Photo | PhotoError]] = []
    for key, photo in photos:
        size = photo.pixels.shape if isinstance(photo, Photo) else None
        if batch and (size is None or batch[0][1].pixels.shape != size or len(batch) == most):
            yield batch
            batch = []
        if size is None:
            yield [(key, photo)]
        else:
            batch.append((key, photo))
    if batch:
        yield batch


def labels_at(logits: Tensor, height: int, width: int) -> Tensor:
    """The class with the largest logit at every pixel, int64 [height, width].

    logits [classes, h, w] are resized bilinearly with half-pixel centers, as the network does. Where the four logits
    around a pixel have one winner it wins in between too, so only the pixels near edges are interpolated: neither time
    nor memory grows with classes x pixels. Ties, and what rounding makes one, go to either class.
    """
    rows, columns = _between(logits.shape[1], height, logits), _between(logits.shape[2], width, logits)
    winner = logits.argmax(0)
    corners = [winner[y][:, x] for y in (rows.low, rows.high) for x in (columns.low, columns.high)]
    labels = corners[0]
    mixed = (corners[1] != labels) | (corners[2] != labels) | (corners[3] != labels)
    ys, xs = mixed.nonzero(as_tuple=True)
    for y, x in zip(*(part.split(max(1, MIXED_VALUES // len(logits))) for part in (ys, xs)), strict=True):
        upper, lower = (
            torch.lerp(logits[:, row, columns.low[x]], logits[:, row, columns.high[x]], columns.share[x])
            for row in (rows.low[y], rows.high[y])
        )
        labels[y, x] = torch.lerp(upper, lower, rows.share[y]).argmax(0)
    return labels


class _Between(NamedTuple):
    """For each position of a longer line its neighbors on a shorter one, and how near the higher one is."""

    low: Tensor
    high: Tensor
    share: Tensor


def _between(short: int, long: int, like: Tensor) -> _Between:
    place = (torch.arange(long, device=like.device, dtype=torch.float32) + 0.5) * (short / long) - 0.5
    place = place.clamp_min(0)
    low = place.long().clamp_max(short - 1)
    return _Between(low, (low + 1).clamp_max(short - 1), place - low)


@torch.no_grad()
def fold_batch_norms(network: DeepLab) -> DeepLab:
    """Folds every BatchNorm of a network in eval mode, in place, into the convolution whose output alone it reads."""
    made: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # the tensor is kept, so that its id stays its own
    read: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, out: made.update({id(out): (out, conv)})))
        elif type(module) is nn.BatchNorm2d:  # those of timm with an activation inside stay as they are
            hooks.append(module.register_forward_pre_hook(lambda norm, given: read.append((norm, given[0]))))
    network.coarse_logits(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    folded = set()
    for norm, given in read:
        if id(given) in made:
            conv = made[id(given)][1]
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            folded.add(norm)
    for module in network.modules():
        for name, child in module.named_children():
            if child in folded:
                setattr(module, name, nn.Identity())
    return network
