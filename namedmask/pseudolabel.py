# SPDX-License-Identifier: MIT
"""Pseudo-labels: decodes the photos of an archive, detects and refines their objects, and writes masks/00000.jsonl.

Each distinct photo of the archive is labeled once and has one record per category it was retrieved for; it is labeled
once per category if the name of the category selects the mask. The bytes of a shard depend only on its photos and the
settings, not on which worker computed it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from namedmask_kernels import Ragged

from .archive import Archive
from .batches import Size, nearest, upload
from .config import RunConfig
from .distributed import Worker
from .errors import first_line, is_out_of_memory
from .files import make_folder
from .masks import (
    EncodedMask,
    ErrorRecord,
    MaskRecord,
    encode_masks,
    errors_path,
    read_masks,
    write_errors,
    write_shard,
)
from .memory import BATCH_PIXELS, processing_budget
from .names import NameScorer, blur
from .photos import Photo, PhotoError, PhotoSource, decode_ahead
from .progress import warn
from .refine import Refiner
from .saliency import make_detector
from .saliency.candidates import Choice, chosen, merit, prior, quality, shortlist
from .saliency.detector import Detections
from .threads import map_batches
from .timing import StepTimes, traced

# Batches that are formed at a time, of photos sorted by size, so that photos of equal size stand together.
WINDOW = {"cpu": 1, "cuda": 4}

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


# A photo to label, with the category whose name selects its mask; None if its mask is the same for all categories.
Unit = tuple[str, str | None]


def units_of(work: Work, config: RunConfig) -> list[Unit]:
    """What to label for photos with their categories, in order."""
    if config.detector.selection == "name":
        return [(photo, category) for photo, categories in work for category, _ in categories]
    return [(photo, None) for photo, _ in work]


class Labeled(NamedTuple):
    """Pseudo-label of a photo, with masks at the size of the photo.

    Attributes:
        mask: Refined mask.
        score: Score of the mask, in [0, 1].
        detected: Mask before refinement; None unless the settings keep it.
    """

    mask: EncodedMask
    score: float
    detected: EncodedMask | None


def known_labels(folders: Iterable[Path], config: RunConfig) -> dict[Unit, Labeled]:
    """The pseudo-labels of photos in folders of masks from before an update.

    They do not depend on the category of a photo. All of them are held in memory, as run lengths. With masks that names
    select there are none, because the score of a name depends on all others.

    Args:
        folders: Folders of masks.
        config: Settings of the run. If masks before refinement are kept, labels without one are left out.

    Raises:
        DamagedFile: If a file cannot be read.
    """
    keep_detected = config.pseudolabel.keep_detected
    labels: dict[Unit, Labeled] = {}
    for folder in folders if config.detector.selection != "name" else ():
        before = folder.parent / "detected"
        detected = {record.photo: _encoded(record) for record in read_masks(before)} if keep_detected else {}
        for record in read_masks(folder):
            if record.photo in detected or not keep_detected:
                labels[record.photo, None] = Labeled(_encoded(record), record.score, detected.get(record.photo))
    return labels


def _encoded(record: MaskRecord) -> EncodedMask:
    """The mask of a record, without its border, which its score takes into account already."""
    return EncodedMask(record.size, record.rle, record.area, record.bbox, border=0)


Decoded = tuple[Unit, Photo | PhotoError]
Labels = list[tuple[Unit, Labeled | PhotoError]]


class Labeler:
    """Detector and refiner of a run. Batches stay on the device from upload to run lengths.

    Args:
        config: Settings of the run.
        device: Device as torch names it.
        categories: Names of all categories, for masks that their names select.

    Attributes:
        times: Time of each step: "decode", "upload", "network", the detector's own steps, "names", "refine",
            "encode" and "score".
    """

    def __init__(self, config: RunConfig, device: str, categories: Sequence[str] = ()):
        self.detector = make_detector(config.detector, device)
        self.selects = config.detector.selection != "none"
        self.names = NameScorer(config.index, categories, device) if config.detector.selection == "name" else None
        self.at_photo_size = config.refine.size == "photo"
        self.keep_detected = config.pseudolabel.keep_detected
        self.refiner = Refiner(config.refine)
        self.device = device
        self.times = StepTimes(device)
        self.detector.step = lambda name: self.times.step(name)  # `times` may be replaced
        self.has_warned = False

    def label(
        self,
        source: PhotoSource,
        units: Iterable[Unit],
        shard: Callable[[str], int] = lambda name: 0,
        trace: Path | None = None,
    ) -> Iterator[Labels]:
        """Labels photos.

        Args:
            source: The photos.
            units: What to label.
            shard: Function of a photo's name. Photos with different values are never in the same batch.
            trace: File for torch's profiler trace of some of the batches.

        Yields:
            For each batch: its units with their labels, or with their errors. The batches are in the order of the
            units, but for photos of a few consecutive batches on a GPU, which are sorted by size.
        """
        ahead: deque[Unit] = deque()  # of the photos that are being decoded

        def names() -> Iterator[str]:
            for unit in units:
                ahead.append(unit)
                yield unit[0]

        def decode(name: str) -> Photo:
            with self.times.on_host("decode"):
                return source.decode(name)

        def cost(batch: list[Decoded]) -> int:
            photos = [photo for _, photo in batch if isinstance(photo, Photo)]
            refined = sum(math.prod(self._size(photo)) for photo in photos)
            detected = self.detector.bytes_per_pixel + (self.names.bytes_per_pixel if self.names else 0)
            return sum(map(self._pixels, photos)) * detected + refined * self.refiner.bytes_per_pixel

        loaded = ((ahead.popleft(), photo) for _, photo in decode_ahead(source, names(), decode))
        shards = itertools.groupby(loaded, lambda item: shard(item[0][0]))
        batches = (batch for _, decoded in shards for batch in self._batches(decoded))
        labels = map_batches(self._label_batch, batches, self.device, cost=cost, limit=processing_budget())
        yield from traced(labels, trace)

    @torch.inference_mode()
    def _label_batch(self, batch: list[Decoded]) -> Labels:
        photos = [(photo, category) for (_, category), photo in batch if isinstance(photo, Photo)]
        labels = iter(self._labels_or_errors(photos))
        return [(unit, photo if isinstance(photo, PhotoError) else next(labels)) for unit, photo in batch]

    def _labels_or_errors(self, photos: list[tuple[Photo, str | None]]) -> list[Labeled | PhotoError]:
        """Labels photos for their categories; halves them until those that cannot be labeled are alone."""
        if not photos:
            return []
        try:
            return list(self._label_photos(*map(list, zip(*photos, strict=True))))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"there is not enough memory to label it: {first_line(error)}"
            if len(photos) > 1 and not self.has_warned:
                self.has_warned = True
                warn(f"a batch of {len(photos)} photos does not fit into memory and is halved")
        except FloatingPointError as error:
            reason = str(error)
        except ValueError as error:
            reason = f"cannot be labeled: {error}"
        if len(photos) == 1:
            return [PhotoError(photos[0][0].name, reason)]
        half = len(photos) // 2
        return self._labels_or_errors(photos[:half]) + self._labels_or_errors(photos[half:])

    def _label_photos(self, photos: list[Photo], categories: list[str | None]) -> Iterator[Labeled]:
        step, at = self.times.step, [photo.size for photo in photos]
        with step("upload"):
            images = upload([photo.pixels for photo in photos], self.detector.backbone.device)
        found = self._detect(images, [self._size(photo) for photo in photos], categories)
        with step("refine"):
            refined = self.refiner.refine(images if self.at_photo_size else self.detector.resize(images), found.masks)
        with step("encode"):
            masks = encode_masks(_binary(refined, at))
            detected = encode_masks(_binary(found.masks, at)) if self.keep_detected else [None] * len(masks)
        with step("score"):
            if isinstance(found, Choice):
                scores = quality(found, refined).tolist()
            else:
                pairs = zip(masks, found.confidence.tolist(), strict=True)
                scores = [mask.score(confidence) for mask, confidence in pairs]
        self.times.collect()
        for mask, score, before in zip(masks, scores, detected, strict=True):
            yield Labeled(mask, score if mask.area else 0.0, before)

    def _detect(self, images: Ragged, sizes: list[Size], categories: list[str | None]) -> Detections | Choice:
        if not self.selects:
            return self.detector.detect(images, sizes)
        masks, names = self.detector.candidates(images), None
        found = prior(masks)
        if self.names:
            numbers = shortlist(found)
            with self.times.step("names"):
                of = [str(name) for name in categories]
                score = functools.partial(self.names.score, images, masks, categories=of, blurred=blur(images))
                # First the best by the prior, then only those that a certain name would make better.
                best = score(numbers[:, :1])
                wins = merit(found, numbers[:, 1:], 1.0) > merit(found, numbers[:, :1], best)
                names = numbers, torch.cat([best, score(numbers[:, 1:].where(wins, -1))], 1)
        return chosen(masks, found, sizes, names)

    def _size(self, photo: Photo) -> Size:
        """Height and width at which the mask of a photo is detected and refined."""
        return photo.size if self.at_photo_size else self.detector.fit(photo.size).size

    def _pixels(self, photo: Photo) -> int:
        """Number of pixels of a photo or of its mask before it is resized, whichever is more."""
        return max(math.prod(photo.size), math.prod(self._size(photo)))

    def _batches(self, decoded: Iterable[Decoded]) -> Iterator[list[Decoded]]:
        """Batches of decoded photos. Which photos they have depends only on the sizes of the photos."""
        factor = WINDOW[self.device.split(":")[0]]
        for window in self._groups(decoded, factor):
            window.sort(key=lambda item: item[1].size if isinstance(item[1], Photo) else ())
            yield from self._groups(window, 1)

    def _groups(self, decoded: Iterable[Decoded], factor: int) -> Iterator[list[Decoded]]:
        """Consecutive photos with at most `factor` times the tokens and pixels of a batch."""
        group: list[Decoded] = []
        tokens = pixels = 0
        for unit, photo in decoded:
            cost, size = 0, 0
            if isinstance(photo, Photo):
                cost, size = self.detector.tokens(photo.size), self._pixels(photo)
            too_many = tokens + cost > factor * self.detector.tokens_per_batch
            if group and (too_many or pixels + size > factor * BATCH_PIXELS):
                yield group
                group, tokens, pixels = [], 0, 0
            group.append((unit, photo))
            tokens += cost
            pixels += size
        if group:
            yield group


def _binary(soft: Ragged, sizes: list[Size]) -> Ragged:
    """Soft masks [P] as binary ones at the sizes of the photos."""
    return nearest(soft.with_rows(soft.rows > 0.5), sizes)


def pseudolabel(
    source: PhotoSource,
    archive: Archive,
    folder: Path,
    config: RunConfig,
    worker: Worker,
    device: str,
    advance: Callable[..., None],
    trace: Path | None = None,
    known: Mapping[Unit, Labeled] = MappingProxyType({}),
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
        advance: Called as `advance(count, existing=...)` when units (see `units_of`) are done; `existing`: they had
            masks already.
        trace: File for torch's profiler trace of some of the batches.
        known: Labels that are taken over.

    Returns:
        The labeler, for its timings; None if this worker had nothing to do.
    """
    work, size = work_of(archive), config.pseudolabel.shard_size
    numbers = {name: number for number, (name, _) in enumerate(work)}

    def part(shard: int) -> Work:
        return work[shard * size : (shard + 1) * size]

    def new_units(shard: int) -> list[Unit]:
        return [unit for unit in units_of(part(shard), config) if unit not in known]

    def write(shard: int, labels: Mapping[Unit, Labeled | PhotoError]) -> None:
        every = units_of(part(shard), config)
        of_part = {unit: known[unit] if unit in known else labels[unit] for unit in every}
        _write_shard(folder, shard, part(shard), of_part, config.pseudolabel.keep_detected)

    def claimed() -> Iterator[Unit]:
        """Photos of the shards that this worker claims, one after another, as the photos before them are decoded."""
        for shard in worker.claim("pseudolabel", -(-len(work) // size)):
            count, new = len(units_of(part(shard), config)), new_units(shard)
            if shard_path(folder, shard).exists():
                advance(count, existing=True)
                continue
            if len(new) < count:
                advance(count - len(new), existing=True)
            if not new:
                write(shard, {})
            yield from new

    ahead = claimed()
    first = next(ahead, None)
    if first is None:
        return None
    labeler = Labeler(config, device, archive.categories)
    labels: dict[Unit, Labeled | PhotoError] = {}  # of photos of the shard that is being labeled
    for batch in labeler.label(source, itertools.chain([first], ahead), lambda name: numbers[name] // size, trace):
        labels |= batch
        advance(len(batch))
        shard = numbers[batch[0][0][0]] // size
        if len(labels) == len(new_units(shard)):
            write(shard, labels)
            labels = {}
    return labeler


def _write_shard(
    folder: Path, shard: int, part: Work, labels: Mapping[Unit, Labeled | PhotoError], keep_detected: bool
) -> None:
    """Writes the masks and errors of the photos `part`, in their order."""
    records: list[MaskRecord] = []
    detected: list[MaskRecord] = []
    errors: dict[str, ErrorRecord] = {}  # by photo
    for name, categories in part:
        for own in categories:
            label = labels[name, own[0]] if (name, own[0]) in labels else labels[name, None]
            if isinstance(label, PhotoError):
                errors[name] = ErrorRecord(name, "pseudolabel", label.reason)
                continue
            records.append(MaskRecord.from_encoded(name, label.mask, *own, label.score))
            if label.detected:
                detected.append(MaskRecord.from_encoded(name, label.detected, *own, label.score))
    write_errors(errors_path(shard_path(folder, shard)), errors.values())
    if keep_detected:  # before the masks, whose file marks the shard as finished
        make_folder(folder.parent / "detected")
        write_shard(shard_path(folder.parent / "detected", shard), detected)
    write_shard(shard_path(folder, shard), records)
