# SPDX-License-Identifier: MIT
"""Inference with a trained segmenter, at a single scale and the photo's own size.

    segmenter = Segmenter.load("run/segmenter")
    mask, names = segmenter("photo.jpg")        # names[mask[y, x]]

On the CPU, each thread processes its own photos, in float32. On two AVX-512 cores, neither bfloat16 (whose convolutions
are slower there) nor channels-last memory was faster; both are for GPUs.
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

GPU_BATCH = 8  # maximum number of photos, all of one size
MAX_INTERPOLATED = 1 << 24  # maximum number of logits that are interpolated at once

Key = TypeVar("Key")
Prediction = tuple[str, Photo | PhotoError, Any]  # name, photo and result; or name, error and None


class Segmentation(NamedTuple):
    """Segmentation of a photo.

    Attributes:
        mask: Class of every pixel, uint16 [H, W].
        names: Names of the classes, the background first.
    """

    mask: np.ndarray
    names: list[str]


class Segmenter:
    """A segmenter for inference; created by `load`. It may be called from several threads.

    Args:
        network: Trained network. It is changed: BatchNorm is folded into its convolutions, and it moves to `device`.
        categories: Names of classes 1, 2, ...
        device: Device as torch names it.
        precision: "float32" or "bfloat16".
    """

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
        """Loads a trained segmenter.

        Args:
            path: Folder of a segmenter, its model.safetensors, or a .pth file released by NamedMask.
            categories: Names of classes 1, 2, ..., for weights without a categories.json.
            encoder: Encoder of such weights, by its timm name.
            device: Device as torch names it.
            precision: "float32" or "bfloat16", which is faster only on GPUs.

        Raises:
            UserError: If a file is missing or damaged, or if weights, names and encoder do not match.
        """
        return cls(*load_segmenter(path, categories, encoder), device, precision)

    def __call__(self, image: np.ndarray | Image.Image | str | os.PathLike) -> Segmentation:
        """Segments a photo.

        On one machine, the result does not depend on the number of threads.

        Args:
            image: RGB image, uint8 [H, W, 3], a PIL image, or a path. EXIF orientation of PIL images and files is
                applied.

        Returns:
            The mask, at the size of the photo, and the names of the classes.

        Raises:
            PhotoError: If the file cannot be read.
            ValueError: If an array has another shape or dtype.
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
        """Segments photos of one size.

        Args:
            images: Photos, uint8 [H, W, 3] each.

        Returns:
            Masks, uint16 [H, W] each.
        """
        height, width = images[0].shape[:2]
        masks = [upsampled_argmax(logits, height, width) for logits in self.coarse_logits(images)]
        return [mask.to("cpu", torch.int32).numpy().astype(np.uint16) for mask in masks]

    @torch.inference_mode()
    def coarse_logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """Logits at stride 4 of photos of one size.

        Args:
            images: n photos, uint8 [H, W, 3] each.

        Returns:
            float32 [n, classes, ceil(H / 4), ceil(W / 4)].
        """
        photos = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        photos = ((photos.float() / 255 - self.mean) / self.std).to(self.dtype)
        if self.device.type == "cpu":
            photos = photos.contiguous()
        return self.network.coarse_logits(photos).float()

    def segment(self, source: PhotoSource, names: Iterable[str]) -> Iterator[list[Prediction]]:
        """Segments photos of a source.

        Args:
            source: The photos.
            names: Names of the photos to segment.

        Yields:
            A few photos at a time, in order: the name, the photo and its mask, uint16 [H, W]; or the name, the error
            and None if the photo cannot be used.
        """
        return self.map_photos(source, names, lambda photos: self.masks([photo.pixels for photo in photos]))

    def map_photos(
        self, source: PhotoSource, names: Iterable[str], predict: Callable[[list[Photo]], Sequence[Any]]
    ) -> Iterator[list[Prediction]]:
        """Like `segment`, with other results than masks.

        Args:
            source: The photos.
            names: Names of the photos.
            predict: Results for photos of one size. On the CPU it is called with one photo at a time, from several
                threads.

        Yields:
            A few photos at a time, in order: the name, the photo and its result; or the name, the error and None.
        """

        def predict_batch(batch: list[tuple[str, Photo | PhotoError]]) -> list[Prediction]:
            photos = [photo for _, photo in batch if isinstance(photo, Photo)]
            results = iter(predict(photos) if photos else ())
            return [(name, photo, next(results) if isinstance(photo, Photo) else None) for name, photo in batch]

        with kernels_on_one_thread(self.device.type) as threads:
            size = 1 if self.device.type == "cpu" else GPU_BATCH
            yield from map_ahead(predict_batch, batches_by_size(decode_ahead(source.decode, names), size), threads)


def batches_by_size(
    photos: Iterable[tuple[Key, Photo | PhotoError]], batch_size: int
) -> Iterator[list[tuple[Key, Photo | PhotoError]]]:
    """Groups consecutive photos of one size into batches. An error is a batch of its own.

    Args:
        photos: Photos or errors, with a key each.
        batch_size: Maximum number of photos in a batch.
    """
    batch: list[tuple[Key, Photo | PhotoError]] = []
    shape: tuple[int, ...] = ()
    for key, photo in photos:
        if batch and (isinstance(photo, PhotoError) or photo.pixels.shape != shape or len(batch) == batch_size):
            yield batch
            batch = []
        if isinstance(photo, PhotoError):
            yield [(key, photo)]
        else:
            batch.append((key, photo))
            shape = photo.pixels.shape
    if batch:
        yield batch


def upsampled_argmax(logits: Tensor, height: int, width: int) -> Tensor:
    """The class with the largest logit at every pixel, after bilinear resizing with half-pixel centers.

    Where the four logits around a pixel have the same largest class, so has their interpolation. Only the other pixels,
    near edges, are interpolated: neither time nor memory grows with classes x pixels. Ties, including those that
    rounding makes, go to either class.

    Args:
        logits: [classes, h, w].
        height: Height of the result.
        width: Width of the result.

    Returns:
        int64 [height, width].
    """
    rows = _interpolation(logits.shape[1], height, logits.device)
    columns = _interpolation(logits.shape[2], width, logits.device)
    coarse = logits.argmax(0)
    corners = [coarse[y][:, x] for y in (rows.low, rows.high) for x in (columns.low, columns.high)]
    labels = corners[0]
    mixed = (corners[1] != labels) | (corners[2] != labels) | (corners[3] != labels)
    ys, xs = mixed.nonzero(as_tuple=True)
    for y, x in zip(*(part.split(max(1, MAX_INTERPOLATED // len(logits))) for part in (ys, xs)), strict=True):
        upper, lower = (
            torch.lerp(logits[:, row, columns.low[x]], logits[:, row, columns.high[x]], columns.weight[x])
            for row in (rows.low[y], rows.high[y])
        )
        labels[y, x] = torch.lerp(upper, lower, rows.weight[y]).argmax(0)
    return labels


class _Interpolation(NamedTuple):
    """Linear interpolation along an axis: for each output position its two inputs, and the weight of the higher one."""

    low: Tensor
    high: Tensor
    weight: Tensor


def _interpolation(inputs: int, outputs: int, device: torch.device) -> _Interpolation:
    position = (torch.arange(outputs, device=device, dtype=torch.float32) + 0.5) * (inputs / outputs) - 0.5
    position = position.clamp_min(0)
    low = position.long().clamp_max(inputs - 1)
    return _Interpolation(low, (low + 1).clamp_max(inputs - 1), position - low)


@torch.no_grad()
def fold_batch_norms(network: DeepLab) -> DeepLab:
    """Folds BatchNorm into convolutions, in place.

    Args:
        network: A network in eval mode. Every BatchNorm whose input is the output of a convolution is folded into it;
            those of timm that include an activation are left as they are.

    Returns:
        The network.
    """
    # Output tensors are kept with their convolutions, so that no other tensor can have the same id.
    outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}
    inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, out: outputs.update({id(out): (out, conv)})))
        elif type(module) is nn.BatchNorm2d:
            hooks.append(module.register_forward_pre_hook(lambda norm, args: inputs.append((norm, args[0]))))
    network.coarse_logits(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    folded: set[nn.Module] = set()
    for norm, tensor in inputs:
        if id(tensor) in outputs:
            conv = outputs[id(tensor)][1]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            folded.add(norm)
    for module in network.modules():
        for name, child in module.named_children():
            if child in folded:
                setattr(module, name, nn.Identity())
    return network
