# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

Several workers share the photos: they claim shards of SHARD photos and find all they need in the output folder
(`folder`). A photo that has its mask, its score and, if wanted, its overlay is skipped.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import distributed, launcher
from ..config import AUGMENTATION
from ..distributed import Worker
from ..errors import UserError
from ..files import NAME_ERRORS, atomic_write, files_below, locked, remove_files, write_error
from ..formats import encode_jpeg, write_label_map
from ..masks import ErrorRecord, parse_line, parse_photo, read_lines, write_errors
from ..memory import DECODE_SHARE, photo_budget
from ..photos import SEGMENT_RECORD, Photo, PhotoError, PhotoSource, open_source
from ..progress import Progress
from ..record import read_record
from ..threads import map_ahead, thread_count
from .deeplab import load_segmenter
from .folder import (
    ERRORS,
    SCORES,
    STAGE,
    UNFINISHED,
    finish,
    mask_path,
    overlay_path,
    score_line,
    score_lines,
    segmented_photos,
    settle,
    unfinished_lines,
    write_scores,
)
from .overlay import Overlays, overlay, shown_photos
from .predict import MASK_BYTES, WINDOW, Prediction, Segmenter

SHARD = WINDOW  # photos that a worker claims at a time
LOADED = ("categories", "encoder", "precision", *AUGMENTATION)  # settings that a worker loads it with


def segment_photos(
    weights: Path,
    photos: str | os.PathLike[str],
    out: Path,
    *,
    categories: Sequence[str] | None = None,
    encoder: str = "resnet50",
    precision: str | None = None,
    scales: Sequence[float] = (1.0,),
    horizontal_flip: bool = False,
    overlays: Overlays = "sample",
    workers: int = 1,
    gpus: int | None = None,
    overwrite: bool = False,
) -> tuple[int, int] | None:
    """Segments the photos that have no mask in `out` yet; prints progress.

    On the CPU, the files are the same for any number of workers and after any interruption. Under torchrun or SLURM
    this process is one of many already and takes its place among them.

    Args:
        weights: Folder of a segmenter, its model.safetensors, or a .pth file released by NamedMask.
        photos: Folder, list file or tar.
        out: Output folder.
        categories: Names of classes 1, 2, ..., for weights without a categories.json.
        encoder: Encoder of such weights, by its timm name.
        precision: "float32" or "bfloat16"; None: bfloat16 on a GPU, float32 on the CPU.
        scales: Test-time augmentation: sizes of the network's input, relative to the photo.
        horizontal_flip: Test-time augmentation: average with the flipped photo.
        overlays: Photos that get an overlay; "sample": `SAMPLE` photos, evenly spaced in the list of photos.
        workers: Number of processes on the CPU.
        gpus: Number of processes with a GPU each, instead; None: one if there is a GPU.
        overwrite: Segment all photos again. The earlier results are in OUT/.replaced until all new ones exist, and are
            restored if there is none.

    Returns:
        How many photos have masks, and how many could not be used. None for all but the main worker of torchrun or
        SLURM.

    Raises:
        UserError: If weights or photos cannot be read, if `out` was made with another segmenter or from other photos
            or has files of other origin, or if there are no photos. Nothing is changed then.
    """
    gpus = distributed.count_gpus(gpus, workers)
    device = "cuda" if gpus else "cpu"
    worker = distributed.current()
    if not worker.is_main:
        worker.barrier("settled")
        _work(out, worker, device, overlays)
        return None
    with locked(out):
        try:
            source = open_source(photos)
            network, names = load_segmenter(weights, categories, encoder)
            precision = precision or ("bfloat16" if gpus else "float32")
            augmentation: dict[str, Any] = {"scales": list(scales), "horizontal_flip": horizontal_flip}
            settings = {"categories": names, "encoder": network.encoder, "precision": precision, **augmentation}
            errors = settle(out, weights, settings, source, overwrite and worker.attempt == 0)
        except UserError as error:
            worker.fail(str(error))
            raise
        worker.barrier("settled")
        try:
            if worker.count > 1 or max(workers, gpus) == 1:
                segmenter = Segmenter(network, names, worker.device(device), precision, **augmentation)
                _work(out, worker, device, overlays, segmenter)
            else:
                launcher.launch(__name__, out, device, gpus or workers, overlays)
            made, failed = _assemble(out, errors)
        except Exception:
            if worker.count == 1:  # else the other workers may still write
                finish(out, complete=False)
            raise
        finish(out, complete=made > 0)
    return made, failed


class _Work:
    """What is to be done in a folder, and what has been done, as every worker reads it.

    Attributes:
        names: Photos of this command, in order.
        masks: NAME of each photo.
        shown: Photos that get an overlay.
        scores: Lines of scores.jsonl, by photo.
        errors: Photos that could not be used.
    """

    def __init__(self, out: Path, overlays: Overlays = "none"):
        self.out, self.masks = out, segmented_photos(out)
        self.names = list(read_lines(out / UNFINISHED / "photos.jsonl", parse_photo))
        self.shown = shown_photos(self.names, overlays)
        self.scores = score_lines(out)
        errors = (parse_line(ErrorRecord, line) for line in unfinished_lines(out, ERRORS))
        self.errors = {error.photo: error for error in errors}

    def is_done(self, name: str) -> bool:
        """Whether a photo has a mask, a score and, if wanted, an overlay, or cannot be used."""
        mask = self.masks[name]
        has_files = mask_path(self.out, mask).exists() and (
            name not in self.shown or overlay_path(self.out, mask).exists()
        )
        return name in self.errors or (name in self.scores and has_files)


def _work(out: Path, worker: Worker, device: str, overlays: Overlays, segmenter: Segmenter | None = None) -> None:
    """This worker's part of the photos.

    Args:
        out: Output folder, in which `settle` has recorded what is to be done.
        worker: This worker.
        device: "cpu" or "cuda".
        overlays: Photos that get an overlay.
        segmenter: The segmenter; None: it is loaded if there is something to do.
    """
    record = read_record(out, SEGMENT_RECORD)
    settings, source = record.stages[STAGE].settings, open_source(record.photos or "")

    def load() -> Segmenter:
        known = {name: settings[name] for name in LOADED}
        return segmenter or Segmenter.load(settings["weights"], device=worker.device(device), **known)

    try:
        with Progress(STAGE, worker) as progress:
            work = _Work(out, overlays)
            progress.total = len(work.names)
            _segment(work, worker, load, source, progress.advance)
            worker.barrier("photos are segmented")
            if worker.is_main and worker.count > 1:  # shards that a lost worker had claimed
                _segment(_Work(out, overlays), Worker(), load, source, progress.advance_new)
    except Exception as error:
        worker.fail(str(error))
        raise


def _segment(
    work: _Work, worker: Worker, load: Callable[[], Segmenter], source: PhotoSource, advance: Callable[..., None]
) -> None:
    """Segments the photos of the shards that a worker claims, and writes their scores and errors to `UNFINISHED`."""
    numbers = {name: number for number, name in enumerate(work.names)}

    def claimed() -> Iterator[str]:
        """Photos that are not done, as the photos before them are decoded."""
        for shard in worker.claim(STAGE, -(-len(work.names) // SHARD)):
            part = work.names[shard * SHARD : (shard + 1) * SHARD]
            todo = [name for name in part if not work.is_done(name)]
            advance(len(part) - len(todo), existing=True)
            yield from todo

    names = claimed()
    first = next(names, None)
    if first is None:
        return
    segmenter = load()

    def write(item: Prediction) -> tuple[str, bytes]:
        """Writes the files of a photo; returns its line for the scores or for the errors."""
        name, photo, result = item
        try:
            if isinstance(photo, PhotoError):
                raise photo
            _write(work.out, work.masks[name], photo, result.mask, len(segmenter.names), name in work.shown)
        except PhotoError as error:
            return ERRORS, ErrorRecord(name, STAGE, error.reason).to_line()
        return SCORES, score_line(name, result.scores)

    def cost(item: Prediction) -> int:
        return MASK_BYTES * item[2].mask.size if item[2] is not None else 0

    batches = segmenter.map_photos(
        source,
        itertools.chain([first], names),
        lambda photos: segmenter.segmentations([photo.pixels for photo in photos]),
        lambda name: numbers[name] // SHARD,
    )
    predicted = (item for batch in batches for item in batch)
    own = secrets.token_hex(8)  # files of its own: the last line of those of a killed worker may be cut off
    limit = int(photo_budget() * DECODE_SHARE)
    for kind, line in map_ahead(write, predicted, thread_count(), cost=cost, limit=limit):
        path = work.out / UNFINISHED / f"{own}{kind}"
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise write_error(path, error) from error
        advance(1)


def _write(out: Path, name: str, photo: Photo, mask: np.ndarray, classes: int, with_overlay: bool) -> None:
    """Writes the overlay, if wanted, and the mask. Raises PhotoError if their files cannot have these names."""
    try:
        mask_path(out, name).parent.mkdir(parents=True, exist_ok=True)
        if with_overlay:
            data = encode_jpeg(overlay(photo.pixels, mask), quality=88)
            overlay_path(out, name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(overlay_path(out, name)) as file:
                file.write(data)
        write_label_map(mask_path(out, name), mask, classes)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        raise PhotoError(photo.name, str(error)) from error


def _assemble(out: Path, errors: list[ErrorRecord]) -> tuple[int, int]:
    """Writes errors.jsonl and scores.jsonl, in the order of the photos, and removes `UNFINISHED`.

    Args:
        out: Output folder.
        errors: Photos that could not be listed.

    Returns:
        How many photos have masks, and how many could not be used.
    """
    work = _Work(out)
    made = [name for name in work.names if name not in work.errors]
    if not all(name in work.scores for name in made):
        raise UserError("a worker died before it finished its photos; run the same command again to continue")
    errors = errors + [work.errors[name] for name in work.names if name in work.errors]
    write_errors(out / "errors.jsonl", errors)
    write_scores(out, work.scores, work.names, work.masks)
    remove_files(out, files_below(out / UNFINISHED))
    return len(made), len(errors)


if __name__ == "__main__":
    launcher.as_worker(_work)
