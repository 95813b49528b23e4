# SPDX-License-Identifier: MIT
"""Inference with a trained segmenter, by default in one pass at the photo's own size.

    segmenter = Segmenter.load("run/segmenter")
    mask, names, scores = segmenter("photo.jpg")        # names[mask[y, x]], scores.confidence

On the CPU, each thread processes one photo at a time, in float32: a mask depends on its photo alone. On two AVX-512
cores, neither bfloat16 (whose convolutions are slower there) nor channels-last memory was faster; both are for GPUs.

On a GPU, photos of equal shape go through the network together, by default in bfloat16. Batches are formed from the
list of photos by a fixed rule (`batches_by_shape`). Within rounding, a mask may depend on the other photos of its
batch, so pixels where two classes nearly tie may differ.

Test-time augmentation averages the probabilities of several passes, at other sizes of the photo (`scales`) and of the
flipped photo (`horizontal_flip`).
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import hub
from ..config import Precision
from ..decoding import pixels_of
from ..files import atomic_write, make_folder
from ..formats import BACKGROUND
from ..memory import BATCH_PIXELS, processing_budget
from ..photos import Photo, PhotoError, PhotoSource, decode_ahead
from ..threads import map_batches
from .card import model_card
from .deeplab import DeepLab, load_segmenter, on_device, save_segmenter

WINDOW = 64  # maximum number of consecutive photos that are grouped by shape
GPU_PIXELS = 1 << 22  # maximum number of pixels in a batch of several photos on a GPU
MAX_PIXELS = 1 << 21  # of the network's input; larger photos are reduced to it
MAX_INTERPOLATED = 1 << 24  # maximum number of logits that are interpolated at once
ROWS_AT_ONCE = 1 << 20  # pixels of a mask that are interpolated at once
NETWORK_BYTES = 720  # per pixel of the input, at the peak of a ResNet-50 in float32; measured at 1 and 2 megapixels
MASK_BYTES = 16  # per pixel of the photo: the photo, its mask, and what is made of both

Item = tuple[int, str, Photo | PhotoError]  # number, name, and photo or error
Prediction = tuple[str, Photo | PhotoError, Any]  # name, photo and result; or name, error and None


class MaskScore(NamedTuple):
    """Score of the mask of a category.

    Attributes:
        confidence: Mean probability of the category over the pixels of its mask, in (0, 1].
        area: Number of these pixels relative to the photo's, in (0, 1].
    """

    confidence: float
    area: float


class Scores(NamedTuple):
    """Scores of a photo and its masks. Probabilities are those of the softmax at the size of the photo.

    Attributes:
        confidence: Mean probability of the predicted class, the background included, over all pixels, in (0, 1].
        categories: Scores of the categories that the photo shows, by name, in class order.
    """

    confidence: float
    categories: dict[str, MaskScore]


class Segmentation(NamedTuple):
    """Segmentation of a photo.

    Attributes:
        mask: Class of every pixel, uint16 [H, W].
        names: Names of the classes, the background first.
        scores: How confident the network is.
    """

    mask: np.ndarray
    names: list[str]
    scores: Scores


class Segmenter:
    """A segmenter for inference; created by `load`. It may be called from several threads.

    Args:
        network: Trained network. It is changed: BatchNorm is folded into its convolutions, and it moves to `device`.
        categories: Names of classes 1, 2, ...
        device: Device as torch names it.
        precision: "float32" or "bfloat16"; None: bfloat16 on a GPU, float32 on the CPU.
        scales: Test-time augmentation: sizes of the network's input, relative to the photo.
        horizontal_flip: Test-time augmentation: average with the flipped photo.

    Attributes:
        names: Names of the classes, the background first.
        path: File of weights that it was loaded from; None if it was made of a network.
    """

    def __init__(
        self,
        network: DeepLab,
        categories: Sequence[str],
        device: str = "cpu",
        precision: str | None = None,
        scales: Sequence[float] = (1.0,),
        horizontal_flip: bool = False,
    ):
        if not scales or not all(0.01 <= scale <= 4 for scale in scales):
            raise ValueError(f"scales: expected numbers from 0.01 to 4, got {list(scales)}")
        if precision not in (None, *get_args(Precision)):
            raise ValueError(f"precision: expected {' or '.join(get_args(Precision))}, got {precision!r}")
        self.scales, self.horizontal_flip = tuple(scales), horizontal_flip
        self.names = [BACKGROUND, *categories]
        self.path: Path | None = None
        self.mean, self.std = network.mean.to(device), network.std.to(device)
        self.device = self.mean.device  # with the index of a GPU
        on_cpu = self.device.type == "cpu"
        self.window = 1 if on_cpu else WINDOW
        self.dtype = getattr(torch, precision or ("float32" if on_cpu else "bfloat16"))
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
        precision: str | None = None,
        scales: Sequence[float] = (1.0,),
        horizontal_flip: bool = False,
    ) -> Segmenter:
        """Loads a trained segmenter.

        Args:
            path: Folder of a segmenter, its model.safetensors, or a .pth file released by NamedMask.
            categories: Names of classes 1, 2, ..., for weights without a categories.json.
            encoder: Encoder of such weights, by its timm name.
            device: Device as torch names it.
            precision: "float32" or "bfloat16"; None: bfloat16 on a GPU, float32 on the CPU.
            scales: Test-time augmentation: sizes of the network's input, relative to the photo, from 0.01 to 4.
            horizontal_flip: Test-time augmentation: average with the flipped photo.

        Raises:
            UserError: If a file is missing or damaged, or if weights, names and encoder do not match.
            ValueError: If a scale is out of range, or for another precision.
        """
        segmenter = cls(*load_segmenter(path, categories, encoder), device, precision, scales, horizontal_flip)
        path = Path(path)
        segmenter.path = path / "model.safetensors" if path.is_dir() else path
        return segmenter

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str = "cpu",
        precision: str | None = None,
        scales: Sequence[float] = (1.0,),
        horizontal_flip: bool = False,
    ) -> Segmenter:
        """Loads a segmenter from the Hugging Face Hub, or from a folder.

        Only safetensors and JSON are read, and nothing of the repository is executed. A version that is in the cache is
        used without asking the Hub: name a newer one by its `revision`.

        Args:
            name: USER/NAME of a repository, or a folder of `save_pretrained` or of `namedmask train`.
            revision: Branch, tag or commit; None: main.
            token: Token for private repositories; None: that of `hf auth login`.
            cache_dir: Cache of downloads; None: that of huggingface_hub (HF_HOME).
            local_files_only: Use the cache alone.
            device: Device as torch names it.
            precision: "float32" or "bfloat16"; None: bfloat16 on a GPU, float32 on the CPU.
            scales: See `load`.
            horizontal_flip: See `load`.

        Raises:
            UserError: If it is neither in the cache nor can be downloaded, or as `load` does.
        """
        folder = Path(name)
        if not folder.is_dir():
            repository = f"{name}@{revision}" if revision else str(name)
            folder = hub.segmenter(repository, token, cache_dir, local_files_only)
        return cls.load(folder, device=device, precision=precision, scales=scales, horizontal_flip=horizontal_flip)

    def save_pretrained(self, folder: str | Path, license: str | None = None, name: str | None = None) -> None:
        """Writes model.safetensors, categories.json and README.md, a model card, to a folder.

        The weights are those of the file that the segmenter was loaded from, whatever its device and precision. If the
        folder of that file has a README.md, that is the card.

        Args:
            folder: The folder; created if missing. Files of these names are replaced.
            license: License of the weights as the Hub names it, such as "cc-by-4.0"; None: the card names none.
            name: Name of the repository for the example of the card; None: the folder's.

        Raises:
            ValueError: If the segmenter was made of a network.
            UserError: If the weights cannot be read any more, or the folder cannot be written.
        """
        if self.path is None:
            raise ValueError(
                "this segmenter was not loaded from a file: use `save_segmenter` before its network is folded"
            )
        folder, card = Path(folder), self.path.parent / "README.md"
        text = (
            card.read_bytes()
            if card.is_file() and license is None
            else model_card(self.path, self.names[1:], self.network.encoder, license, name or folder.name).encode()
        )
        network, categories = load_segmenter(self.path, self.names[1:], self.network.encoder)
        make_folder(folder)
        save_segmenter(folder, network, categories)
        with atomic_write(folder / "README.md") as file:
            file.write(text)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        license: str | None = None,
        commit_message: str = "Upload segmenter",
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face Hub.

        Args:
            name: USER/NAME of the repository; created if missing.
            private: Create a private repository.
            token: Token that may write; None: that of `hf auth login`.
            license: License of the weights, see `save_pretrained`.
            commit_message: Message of the commit.

        Returns:
            The address of the repository.

        Raises:
            ValueError, UserError: As `save_pretrained`; or UserError if the Hub does not answer or refuses.
        """
        with tempfile.TemporaryDirectory(prefix="namedmask-push-") as folder:
            self.save_pretrained(folder, license, name)
            return hub.push(Path(folder), name, commit_message, private, token)

    def __call__(self, image: np.ndarray | Image.Image | str | os.PathLike) -> Segmentation:
        """Segments a photo.

        On one machine, the result does not depend on the number of threads.

        Args:
            image: RGB image, uint8 [H, W, 3], any other image that `decoding.pixels_of` takes, or a path. EXIF
                orientation of PIL images and files is applied.

        Returns:
            The mask, at the size of the photo, the names of the classes, and the scores.

        Raises:
            PhotoError: If the file cannot be read.
            ValueError: If an array has another shape or dtype, or an image no pixels.
        """
        if isinstance(image, (np.ndarray, Image.Image)):
            pixels = pixels_of(image)
        else:
            path = os.fsdecode(image)
            folder, name = os.path.split(path)
            try:
                pixels = PhotoSource(folder or ".").decode(name).pixels
            except PhotoError as error:
                raise PhotoError(path, error.reason) from error
            except ValueError:  # there is no such folder
                raise PhotoError(path, "no such file") from None
        return self.segmentations([pixels])[0]

    def segmentations(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        """Segments photos of one `network_size`, with scores.

        Args:
            images: Photos, uint8 [H, W, 3] each.
        """
        results = []
        for image, logits in zip(images, self.coarse_logits(images), strict=True):
            labels, pixels, certainty = scored_argmax(logits, *image.shape[:2])
            mask = labels.to(torch.int16).cpu().numpy().view(np.uint16)
            results.append(Segmentation(mask, self.names, self._scores(pixels.tolist(), certainty.tolist())))
        return results

    def _scores(self, pixels: list[int], certainty: list[float]) -> Scores:
        total = sum(pixels)
        found = [number for number in range(1, len(pixels)) if pixels[number]]
        return Scores(
            sum(certainty) / total,
            {self.names[n]: MaskScore(certainty[n] / pixels[n], pixels[n] / total) for n in found},
        )

    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Segments photos of one `network_size`.

        Args:
            images: Photos, uint8 [H, W, 3] each.

        Returns:
            Masks, uint16 [H, W] each.
        """
        outputs = zip(images, self.coarse_logits(images), strict=True)
        masks = [upsampled_argmax(logits, *image.shape[:2]).to(torch.int16) for image, logits in outputs]
        return [mask.cpu().numpy().view(np.uint16) for mask in masks]

    @torch.inference_mode()
    def coarse_logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """Logits at stride 4 of photos of one `network_size`.

        Photos of more than `MAX_PIXELS` are reduced to that many, with antialiasing: 2 megapixels already take 1.5 GB
        with a ResNet-50, and the network was trained on objects of a few hundred pixels.

        Args:
            images: n photos, uint8 [H, W, 3] each.

        Returns:
            float32 [n, classes, ceil(h / 4), ceil(w / 4)] for photos of h x w pixels after reduction. With several
            scales or flips, they are the logarithms of the mean probabilities, and h x w is the largest size.
        """
        flips = (False, True) if self.horizontal_flip else (False,)
        passes = list(itertools.product(sorted(self.scales, reverse=True), flips))
        if len(passes) == 1:
            return self._one_pass(images, *passes[0])
        probabilities = (self._one_pass(images, *one).softmax(1) for one in passes)
        total = next(probabilities)
        for probability in probabilities:
            total += F.interpolate(probability, total.shape[2:], mode="bilinear")
        return total.div_(len(passes)).clamp_min_(torch.finfo(torch.float32).tiny).log_()

    def _one_pass(self, images: Sequence[np.ndarray], scale: float, flip: bool) -> Tensor:
        """`coarse_logits` of photos resized by `scale`, from their mirror images if `flip`."""
        pixels = np.stack([reduced(image, scale) for image in images])
        photos = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        if flip:
            photos = photos.flip(3)
        photos = ((photos.float() / 255 - self.mean) / self.std).to(self.dtype)
        if self.device.type == "cpu":
            photos = photos.contiguous()
        logits = self.network.coarse_logits(photos).float()
        return logits.flip(3) if flip else logits

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
        self,
        source: PhotoSource,
        names: Iterable[str],
        predict: Callable[[list[Photo]], Sequence[Any]],
        shard: Callable[[str], int] = lambda name: 0,
    ) -> Iterator[list[Prediction]]:
        """Like `segment`, with other results than masks.

        Args:
            source: The photos.
            names: Names of the photos.
            predict: Results for photos of one `network_size`. It is called from several threads, on the CPU with one
                photo at a time.
            shard: Function of a name. Photos with different values are never in the same batch.

        Yields:
            A few photos at a time, in order: the name, the photo and its result; or the name, the error and None.
        """

        network_bytes = NETWORK_BYTES if self.device.type == "cpu" else 0

        def predict_batch(batch: list[Item]) -> dict[int, Prediction]:
            photos = [photo for *_, photo in batch if isinstance(photo, Photo)]
            results = iter(predict(photos) if photos else ())
            return {
                number: (name, photo, next(results) if isinstance(photo, Photo) else None)
                for number, name, photo in batch
            }

        def cost(batch: list[Item]) -> int:
            pixels = [photo.pixels.size // 3 for *_, photo in batch if isinstance(photo, Photo)]
            largest = max(self.scales) ** 2
            return sum(MASK_BYTES * count + network_bytes * min(int(count * largest), MAX_PIXELS) for count in pixels)

        decoded = ((number, *item) for number, item in enumerate(decode_ahead(source, names, source.decode)))
        shards = itertools.groupby(decoded, lambda item: shard(item[1]))
        batches = (batch for _, items in shards for batch in batches_by_shape(items, self.window))
        done: dict[int, Prediction] = {}
        following = 0
        for results in map_batches(predict_batch, batches, str(self.device), cost, processing_budget()):
            done |= results
            first = following
            while following in done:
                following += 1
            if following > first:
                yield [done.pop(number) for number in range(first, following)]


def network_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a photo goes through the network: its own, or of about `MAX_PIXELS` pixels."""
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    return (height, width) if scale >= 1 else (max(1, int(height * scale)), max(1, int(width * scale)))


def reduced(image: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Resizes a photo to `scale` times its `network_size`, by Pillow's antialiased bicubic filter.

    Args:
        image: Photo, uint8 [H, W, 3].
        scale: Size relative to the `network_size`. The result has at most `MAX_PIXELS` pixels for any scale.

    Returns:
        The photo itself if it has this size, else uint8 [h, w, 3].
    """
    height, width = network_size(*image.shape[:2])
    if scale != 1:
        height, width = network_size(*(max(1, round(scale * side)) for side in (height, width)))
    if (height, width) == image.shape[:2]:
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def batches_by_shape(photos: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Groups photos of one `network_size` into batches.

    Consecutive photos form windows of at most `most` photos with at most `BATCH_PIXELS` pixels together, or of one
    larger photo. The photos of a window are grouped by size, in the order in which the sizes first occur. Each group is
    cut into batches of at most `GPU_PIXELS` pixels of the network's input, or of one photo.

    Args:
        photos: Photos and errors. The errors of a window are a batch of their own.
        most: Maximum number of photos in a window.
    """
    window: list[Item] = []
    pixels = 0
    for item in photos:
        size = item[2].pixels.size // 3 if isinstance(item[2], Photo) else 0
        if window and (len(window) == most or pixels + size > BATCH_PIXELS):
            yield from _batches(window)
            window, pixels = [], 0
        window.append(item)
        pixels += size
    yield from _batches(window)


def _batches(window: list[Item]) -> Iterator[list[Item]]:
    by_size: dict[tuple[int, int] | None, list[Item]] = {}
    for item in window:
        size = network_size(*item[2].pixels.shape[:2]) if isinstance(item[2], Photo) else None
        by_size.setdefault(size, []).append(item)
    for size, items in by_size.items():
        count = max(1, GPU_PIXELS // math.prod(size)) if size else len(items)
        for first in range(0, len(items), count):
            yield items[first : first + count]


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
        int32 [height, width].
    """
    labels = torch.empty((height, width), dtype=torch.int32, device=logits.device)
    coarse = logits.argmax(0)
    for rows, part, columns in _blocks(logits, height, width):
        labels[rows] = _interpolated_argmax(logits, coarse, part, columns)
    return labels


def scored_argmax(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """`upsampled_argmax`, with the probability of the predicted classes.

    Near edges, probabilities are the softmax of the interpolated logits; elsewhere, the interpolated softmax.

    Args:
        logits: [classes, h, w].
        height: Height of the result.
        width: Width of the result.

    Returns:
        The labels, int32 [height, width]; the number of pixels of each class, int64 [classes]; and the sum of their
        probabilities of this class, float64 [classes].
    """
    labels = torch.empty((height, width), dtype=torch.int32, device=logits.device)
    pixels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    certainty = pixels.double()
    coarse, probability = logits.argmax(0), (logits.amax(0) - logits.logsumexp(0)).exp()
    for rows, part, columns in _blocks(logits, height, width):
        soft = torch.lerp(probability[part.low], probability[part.high], part.weight[:, None])
        soft = torch.lerp(soft[:, columns.low], soft[:, columns.high], columns.weight)
        labels[rows] = _interpolated_argmax(logits, coarse, part, columns, soft)
        flat = labels[rows].flatten()
        pixels += torch.bincount(flat, minlength=len(logits))
        certainty += torch.bincount(flat, soft.flatten().double(), minlength=len(logits))
    return labels, pixels, certainty


def _blocks(logits: Tensor, height: int, width: int) -> Iterator[tuple[slice, _Interpolation, _Interpolation]]:
    """Some rows of the result at a time: which, and the interpolation along rows and columns."""
    rows = _interpolation(logits.shape[1], height, logits.device)
    columns = _interpolation(logits.shape[2], width, logits.device)
    size = max(1, ROWS_AT_ONCE // width)
    for first in range(0, height, size):
        yield slice(first, first + size), _Interpolation(*(axis[first : first + size] for axis in rows)), columns


def _interpolated_argmax(
    logits: Tensor, coarse: Tensor, rows: _Interpolation, columns: _Interpolation, soft: Tensor | None = None
) -> Tensor:
    """`upsampled_argmax` for some rows of the result, int64; `coarse` is the argmax of the logits.

    With `soft`, the probabilities of the labels at pixels that are interpolated are written to it.
    """
    corners = [coarse[y][:, x] for y in (rows.low, rows.high) for x in (columns.low, columns.high)]
    labels = corners[0]
    mixed = (corners[1] != labels) | (corners[2] != labels) | (corners[3] != labels)
    ys, xs = mixed.nonzero(as_tuple=True)
    for y, x in zip(*(part.split(max(1, MAX_INTERPOLATED // len(logits))) for part in (ys, xs)), strict=True):
        upper, lower = (
            torch.lerp(logits[:, row, columns.low[x]], logits[:, row, columns.high[x]], columns.weight[x])
            for row in (rows.low[y], rows.high[y])
        )
        mixed_logits = torch.lerp(upper, lower, rows.weight[y])
        labels[y, x] = mixed_logits.argmax(0)
        if soft is not None:
            soft[y, x] = (mixed_logits.amax(0) - mixed_logits.logsumexp(0)).exp()
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
