# SPDX-License-Identifier: MIT
"""The engine: a shard of photos -> decode -> detect -> refine -> records -> masks/00000.jsonl.

Each distinct photo of the archive is decoded, detected and refined once, and gives one record for every category it was
retrieved for. A shard's bytes depend on its photos and the settings alone, not on who made it or when.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from .archive import Archive
from .config import RunConfig
from .distributed import Worker
from .masks import ErrorRecord, MaskRecord, errors_path, mask_score, write_errors, write_shard
from .photos import Photo, PhotoError, PhotoSource, decode_ahead
from .refine import Refiner
from .saliency import Detection, make_detector
from .threads import kernels_on_one_thread, map_ahead

Work = list[tuple[str, list[tuple[str, float | None]]]]  # (photo, its categories with their scores), ...


def work_of(archive: Archive) -> Work:
    """The archive by photo: distinct photos by name, so that those of a tar stand together, with their categories."""
    work: dict[str, list[tuple[str, float | None]]] = {}
    for category in archive.categories:
        for entry in archive.photos[category]:
            work.setdefault(entry.photo, []).append((category, entry.score))
    return sorted(work.items())


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.jsonl"


def missing_shards(archive: Archive, folder: Path, shard_size: int) -> list[int]:
    """The numbers of the shards of masks that are not made yet."""
    return [s for s in range(-(-len(work_of(archive)) // shard_size)) if not shard_path(folder, s).exists()]


class Labeled(NamedTuple):
    """What the engine makes of a photo: its refined mask, bool [H, W], its score, and the mask before refinement."""

    mask: np.ndarray
    score: float
    detected: np.ndarray


class Labeler:
    """Detector and refiner of a run, and the seconds that each step has taken so far, summed over threads.

    On the CPU each thread takes a batch through all steps by itself.
    """

    def __init__(self, config: RunConfig, device: str):
        self.detector = make_detector(config.detector, device)
        self.refiner = Refiner(config.refine)
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.counting = Lock()

    def label(self, source: PhotoSource, names: Iterable[str]) -> Iterator[list[tuple[str, Labeled | PhotoError]]]:
        """Each photo's mask and score, or what is wrong with it, a batch at a time and in order."""

        def decode(name: str) -> Photo:
            with self._timed("decode"):
                return source.decode(name)

        with kernels_on_one_thread(self.device) as threads:
            yield from map_ahead(self._label_batch, self._batches(decode_ahead(decode, names)), threads)

    def _label_batch(self, batch: list[tuple[str, Photo | PhotoError]]) -> list[tuple[str, Labeled | PhotoError]]:
        photos = [photo for _, photo in batch if isinstance(photo, Photo)]
        with self._timed("detect"):
            detections = self.detector.detect(photos) if photos else []
        with self._timed("refine"):
            labeled = iter(self._refined(photos, detections))
        return [(name, photo if isinstance(photo, PhotoError) else next(labeled)) for name, photo in batch]

    def _refined(self, photos: list[Photo], detections: list[Detection]) -> list[Labeled]:
        softs = self.refiner.refine(photos, [detection.mask for detection in detections])
        masks = [(soft > 0.5).numpy() for soft in softs]
        scores = [mask_score(mask, found.confidence) for mask, found in zip(masks, detections, strict=True)]
        before = [(found.mask > 0.5).numpy() for found in detections]
        return [Labeled(*one) for one in zip(masks, scores, before, strict=True)]

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self.counting:
            self.seconds[step] += time.perf_counter() - start

    def _batches(self, decoded: Iterable[tuple[str, Photo | PhotoError]]) -> Iterator[list]:
        batch, tokens = [], 0
        for name, photo in decoded:
            cost = self.detector.tokens(photo) if isinstance(photo, Photo) else 0
            if batch and tokens + cost > self.detector.tokens_per_batch:
                yield batch
                batch, tokens = [], 0
            batch.append((name, photo))
            tokens += cost
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
    """Makes every shard of masks that is not there yet; `advance(photos, found=...)` is called as photos are done.

    With `keep_detected` the masks before refinement go into `detected` beside `folder`, with the same scores.

    Returns the labeler, for its timings; None when nothing was left to do.
    """
    work = work_of(archive)
    labeler = None
    for shard in worker.claim("pseudolabel", -(-len(work) // config.pseudolabel.shard_size)):
        part = work[shard * config.pseudolabel.shard_size : (shard + 1) * config.pseudolabel.shard_size]
        if shard_path(folder, shard).exists():
            advance(len(part), found=True)
            continue
        labeler = labeler or Labeler(config, device)
        records, detected, errors = [], [], []
        categories = dict(part)
        for batch in labeler.label(source, categories):
            for name, found in batch:
                if isinstance(found, PhotoError):
                    errors.append(ErrorRecord(name, "pseudolabel", found.reason))
                else:
                    records += [MaskRecord.from_mask(name, found.mask, *c, found.score) for c in categories[name]]
                    detected += [MaskRecord.from_mask(name, found.detected, *c, found.score) for c in categories[name]]
            advance(len(batch))
        write_errors(errors_path(shard_path(folder, shard)), errors)
        if config.pseudolabel.keep_detected:  # before the masks, which say that the shard is done
            (folder.parent / "detected").mkdir(exist_ok=True)
            write_shard(shard_path(folder.parent / "detected", shard), detected)
        write_shard(shard_path(folder, shard), records)
    return labeler
