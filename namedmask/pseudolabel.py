# SPDX-License-Identifier: MIT
"""Pseudo-labels: decodes the photos of an archive, detects and refines their objects, and writes masks/00000.jsonl.

Each distinct photo of the archive is processed once and has one record per category it was retrieved for. The bytes of
a shard depend only on its photos and the settings, not on which worker computed it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from namedmask_kernels import Ragged

from .archive import Archive
from .config import RunConfig
from .distributed import Worker
from .files import make_folder
from .masks import ErrorRecord, MaskRecord, errors_path, mask_score, write_errors, write_shard
from .memory import BATCH_PIXELS, processing_budget
from .photos import Photo, PhotoError, PhotoSource, decode_ahead
from .refine import Refiner
from .saliency import Detection, make_detector, photo_sizes
from .threads import kernels_on_one_thread, map_ahead

Work = list[tuple[str, list[tuple[str, float | None]]]]  # per photo: its name, its categories with their scores


def work_of(archive: Archive) -> Work:
    """The distinct photos of the archive with their categories, sorted by name, which groups the photos of a tar."""
    work: dict[str, dict[str, float | None]] = {}
    for category in archive.categories:
        for entry in archive.photos[category]:
            work.setdefault(entry.photo, {}).setdefault(category, entry.score)  # an archive may be written by hand
    return sorted((photo, list(categories.items())) for photo, categories in work.items())


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard of masks."""
    return folder / f"{shard:05}.jsonl"


def missing_shards(archive: Archive, folder: Path, shard_size: int) -> list[int]:
    """The numbers of the shards of masks that do not exist yet."""
    return [s for s in range(-(-len(work_of(archive)) // shard_size)) if not shard_path(folder, s).exists()]


class Labeled(NamedTuple):
    """Pseudo-label of a photo.

    Attributes:
        mask: Refined mask, bool [H, W].
        score: Score of the mask, in [0, 1].
        detected: Mask before refinement, bool [H, W].
    """

    mask: np.ndarray
    score: float
    detected: np.ndarray


def at_size_of(photo: Photo, mask: Tensor) -> np.ndarray:
    """A mask, bool [h, w], as bool [H, W] at the size of the photo: the nearest pixel, by Pillow's rule for ties."""
    height, width = photo.pixels.shape[:2]
    if mask.shape == (height, width):
        return mask.numpy()
    resized = Image.fromarray(mask.byte().numpy()).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized).view(bool)


class Labeler:
    """Detector and refiner of a run. On the CPU, each thread processes its own batches.

    Attributes:
        seconds: Time spent so far in each step ("decode", "detect", "refine"), summed over threads.
    """

    def __init__(self, config: RunConfig, device: str):
        self.detector = make_detector(config.detector, device)
        self.at_photo_size = config.refine.size == "photo"
        self.refiner = Refiner(config.refine)
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lock = Lock()

    def label(self, source: PhotoSource, names: Iterable[str]) -> Iterator[list[tuple[str, Labeled | PhotoError]]]:
        """Labels photos.

        Args:
            source: The photos.
            names: Names of the photos to label.

        Yields:
            For each batch, in order: the names of its photos with their labels, or with their errors.
        """

        def decode(name: str) -> Photo:
            with self._timed("decode"):
                return source.decode(name)

        def cost(batch: list[tuple[str, Photo | PhotoError]]) -> int:
            photos = [photo for _, photo in batch if isinstance(photo, Photo)]
            refined = sum(math.prod(self._size(photo)) for photo in photos)
            return (
                sum(map(self._pixels, photos)) * self.detector.bytes_per_pixel + refined * self.refiner.bytes_per_pixel
            )

        with kernels_on_one_thread(self.device) as threads:
            batches = self._batches(decode_ahead(source, names, decode))
            yield from map_ahead(self._label_batch, batches, threads, cost=cost, limit=processing_budget())

    def _label_batch(self, batch: list[tuple[str, Photo | PhotoError]]) -> list[tuple[str, Labeled | PhotoError]]:
        try:
            return self._label_photos(batch)
        except ValueError as error:  # a photo that a kernel rejects: the others of the batch do without it
            if len(batch) == 1:
                return [(batch[0][0], PhotoError(batch[0][0], f"cannot be labeled: {error}"))]
            return [labeled for one in batch for labeled in self._label_batch([one])]

    def _label_photos(self, batch: list[tuple[str, Photo | PhotoError]]) -> list[tuple[str, Labeled | PhotoError]]:
        photos = [photo for _, photo in batch if isinstance(photo, Photo)]
        try:
            with self._timed("detect"):
                sizes = [self._size(photo) for photo in photos]
                detections = self.detector.detect(photos, sizes) if photos else []
        except FloatingPointError as error:  # of one photo: the others are labeled without it
            if len(batch) > 1:
                return [label for one in batch for label in self._label_batch([one])]
            name = batch[0][0]
            return [(name, PhotoError(name, str(error)))]
        with self._timed("refine"):
            labeled = iter(self._refined(photos, detections))
        return [(name, photo if isinstance(photo, PhotoError) else next(labeled)) for name, photo in batch]

    def _refined(self, photos: list[Photo], detections: list[Detection]) -> list[Labeled]:
        resized = photos if self.at_photo_size else [self.detector.resize(photo) for photo in photos]
        if not photos:
            return []
        images = Ragged.pack([photo.pixels for photo in resized])
        softs = self.refiner.refine(images, Ragged.pack([detection.mask for detection in detections])).grids()
        masks = [at_size_of(photo, soft > 0.5) for photo, soft in zip(photos, softs, strict=True)]
        scores = [mask_score(mask, detection.confidence) for mask, detection in zip(masks, detections, strict=True)]
        detected = [at_size_of(photo, d.mask > 0.5) for photo, d in zip(photos, detections, strict=True)]
        return [Labeled(*fields) for fields in zip(masks, scores, detected, strict=True)]

    def _size(self, photo: Photo) -> tuple[int, int]:
        """Height and width at which the mask of a photo is detected and refined."""
        return photo_sizes([photo])[0] if self.at_photo_size else self.detector.size(photo)

    def _pixels(self, photo: Photo) -> int:
        """Number of pixels of a photo or of its mask before it is resized, whichever is more."""
        return max(photo.pixels.size // 3, math.prod(self._size(photo)))

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self.lock:
            self.seconds[step] += time.perf_counter() - start

    def _batches(
        self, decoded: Iterable[tuple[str, Photo | PhotoError]]
    ) -> Iterator[list[tuple[str, Photo | PhotoError]]]:
        batch: list[tuple[str, Photo | PhotoError]] = []
        tokens = pixels = 0
        for name, photo in decoded:
            cost, size = 0, 0
            if isinstance(photo, Photo):
                cost, size = self.detector.tokens(photo), self._pixels(photo)
            if batch and (tokens + cost > self.detector.tokens_per_batch or pixels + size > BATCH_PIXELS):
                yield batch
                batch, tokens, pixels = [], 0, 0
            batch.append((name, photo))
            tokens += cost
            pixels += size
        if batch:
            yield batch


def pseudolabel(
    source: PhotoSource,
    archive: Archive,
    folder: Path,
    config: RunConfig,
    worker: Worker,
    device: str,
    advance: Callable[..., None],
) -> Labeler | None:
    """Computes all shards of masks that do not exist yet. Every worker calls it.

    Args:
        source: The photos.
        archive: The photos of each category.
        folder: Folder of the shards. With `keep_detected`, the masks before refinement are written to the folder
            `detected` beside it, with the same scores.
        config: Settings of the run.
        worker: This worker.
        device: "cpu", or this worker's GPU as torch names it.
        advance: Called as `advance(photos, existing=...)` when photos are done; `existing`: their shard existed.

    Returns:
        The labeler, for its timings; None if this worker had nothing to do.
    """
    work = work_of(archive)
    labeler = None
    for shard in worker.claim("pseudolabel", -(-len(work) // config.pseudolabel.shard_size)):
        part = work[shard * config.pseudolabel.shard_size : (shard + 1) * config.pseudolabel.shard_size]
        if shard_path(folder, shard).exists():
            advance(len(part), existing=True)
            continue
        labeler = labeler or Labeler(config, device)
        records: list[MaskRecord] = []
        detected: list[MaskRecord] = []
        errors: list[ErrorRecord] = []
        categories = dict(part)
        for batch in labeler.label(source, categories):
            for name, label in batch:
                if isinstance(label, PhotoError):
                    errors.append(ErrorRecord(name, "pseudolabel", label.reason))
                else:
                    records += [MaskRecord.from_mask(name, label.mask, *c, label.score) for c in categories[name]]
                    detected += [MaskRecord.from_mask(name, label.detected, *c, label.score) for c in categories[name]]
            advance(len(batch))
        write_errors(errors_path(shard_path(folder, shard)), errors)
        if config.pseudolabel.keep_detected:  # before the masks, whose file marks the shard as finished
            make_folder(folder.parent / "detected")
            write_shard(shard_path(folder.parent / "detected", shard), detected)
        write_shard(shard_path(folder, shard), records)
    return labeler
