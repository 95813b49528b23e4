# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

OUT/
  segment.json          the record (see `record`): photos, weights with their digest, names, precision
  photos.jsonl          the mask of each photo, {"photo": name, "mask": "masks/NAME.png"}; written before the first mask
  categories.json       names of classes 1, 2, ...
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the mask's colors blended over it, objects outlined; of all photos or of a sample
  scores.jsonl          the confidence of each photo and of its masks, in the order of the photos; written at the end
  errors.jsonl          photos that could not be used, with the reason
  .segmenting/          until the command has finished: the names of its photos, and scores and errors of each worker

NAME is the photo's name without its suffix; a digest is added if two photos would have the same NAME, and replaces what
is too long for a file name. A photo that has its mask, its score and, if wanted, its overlay is skipped. Files of other
origin are neither used nor changed.

Several workers share the photos: they claim shards of SHARD photos and find all they need in OUT.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from .. import distributed, launcher
from ..distributed import Worker
from ..errors import UserError
from ..files import (
    MAX_NAME,
    NAME_ERRORS,
    OLD,
    absolute,
    atomic_write,
    files_below,
    fitted,
    locked,
    make_folder,
    name_digest,
    put_back_files,
    remove_files,
    remove_stale,
    set_aside,
    sha256,
    write_error,
)
from ..formats import encode_jpeg, label_palette, read_categories, write_label_map
from ..masks import ONLY_FIELDS, ErrorRecord, parse_error, parse_line, parse_photo, read_lines, write_errors
from ..memory import DECODE_SHARE, photo_budget
from ..photos import SEGMENT_RECORD, Photo, PhotoError, PhotoSource, open_source
from ..progress import Progress
from ..record import RunRecord, StageRecord, expect_no_files, made_with, read_record
from ..threads import map_ahead, thread_count
from .deeplab import load_segmenter
from .predict import MASK_BYTES, WINDOW, MaskScore, Prediction, Scores, Segmenter

Overlays = Literal["none", "sample", "all"]

STAGE = "segment"  # in the record
OUTPUTS = ("masks", "overlays", "photos.jsonl", "categories.json", "scores.jsonl", "errors.jsonl")
UNFINISHED, SCORES, ERRORS = ".segmenting", ".scores.jsonl", ".errors.jsonl"
SHARD = WINDOW  # photos that a worker claims at a time
SAMPLE = 100  # overlays of a sample
OVERLAY = 0.5  # opacity of the colors
MAX_PATH = 3000  # bytes of NAME; Linux allows 4096 for the whole path
LOADED = ("categories", "encoder", "precision", "scales", "horizontal_flip")  # settings that a worker loads it with
ROWS = 256  # of an overlay that are computed at once


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
            errors = _settle(out, weights, settings, source, overwrite and worker.attempt == 0)
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
                _finish(out, complete=False)
            raise
        _finish(out, complete=made > 0)
    return made, failed


def shown_photos(names: Sequence[str], overlays: Overlays) -> set[str]:
    """The photos that get an overlay: none, all, or at most `SAMPLE`, evenly spaced in the list."""
    if overlays == "none":
        return set()
    if overlays == "all" or len(names) <= SAMPLE:
        return set(names)
    return {names[number * len(names) // SAMPLE] for number in range(SAMPLE)}


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
        self.scores = _score_lines(out)
        self.errors = {error.photo: error for error in map(parse_error, _unfinished_lines(out, ERRORS))}

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
        out: Output folder, in which `_settle` has recorded what is to be done.
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

                def advance(photos: int, existing: bool = False) -> None:
                    if not existing:
                        progress.advance(photos)

                _segment(_Work(out, overlays), Worker(), load, source, advance)
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
        return SCORES, _score_line(name, result.scores)

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
    _write_scores(out, work.scores, work.names, work.masks)
    remove_files(out, files_below(out / UNFINISHED))
    return len(made), len(errors)


# -- scores ----------------------------------------------------------------------------------------------------------


def read_scores(out: Path) -> dict[str, Scores]:
    """The scores in scores.jsonl of the output folder `out`, by photo. Raises DamagedFile."""
    return dict(map(_parse_scores, _score_lines(out).values()))


def _score_line(name: str, scores: Scores) -> bytes:
    categories = {
        category: {"confidence": round(score.confidence, 4), "area": round(score.area, 6)}
        for category, score in scores.categories.items()
    }
    line = {"photo": name, "confidence": round(scores.confidence, 4), "categories": categories}
    return json.dumps(line).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class _Scored:
    """A line of scores.jsonl."""

    photo: str
    confidence: float
    categories: dict[str, MaskScore]
    __pydantic_config__ = ONLY_FIELDS


def _parse_scores(line: bytes) -> tuple[str, Scores]:
    scored = parse_line(_Scored, line)
    return scored.photo, Scores(scored.confidence, scored.categories)


def _score_lines(out: Path) -> dict[str, bytes]:
    """The lines of scores.jsonl and those that workers have written since, by photo. Raises DamagedFile."""

    def parse(line: bytes) -> tuple[str, bytes]:
        return _parse_scores(line)[0], line

    path = out / "scores.jsonl"
    remedy = "delete it and run the same command again, which segments the photos again"
    lines = dict(read_lines(path, parse, remedy)) if path.exists() else {}
    return lines | dict(map(parse, _unfinished_lines(out, SCORES)))


def _unfinished_lines(out: Path, kind: str) -> Iterator[bytes]:
    """The whole lines that workers have written; the last one of a killed worker may be cut off."""
    for path in sorted((out / UNFINISHED).glob(f"*{kind}")):
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _write_scores(out: Path, lines: dict[str, bytes], names: Iterable[str], masks: dict[str, str]) -> None:
    """Writes scores.jsonl: the lines of the photos `names`, then those of other photos that still have a mask."""
    with atomic_write(out / "scores.jsonl") as file:
        for name in dict.fromkeys((*names, *masks)):
            if name in lines and mask_path(out, masks[name]).exists():
                file.write(lines[name])


def segmented_photos(out: Path) -> dict[str, str]:
    """The photos in photos.jsonl of the output folder `out` with the NAME of each. Raises DamagedFile."""
    path = out / "photos.jsonl"
    remedy = "segment the photos again with --overwrite, into another --out"
    return dict(read_lines(path, _parse_photo, remedy)) if path.exists() else {}


@dataclass(frozen=True, slots=True)
class _Written:
    """A line of photos.jsonl."""

    photo: str
    mask: str
    __pydantic_config__ = ONLY_FIELDS


def _parse_photo(line: bytes) -> tuple[str, str]:
    written = parse_line(_Written, line)
    photo, mask = written.photo, written.mask
    parts = PurePosixPath(mask).parts
    if len(parts) < 2 or parts[0] != "masks" or ".." in parts or not mask.endswith(".png"):
        raise ValueError(f"mask: expected masks/NAME.png, got {mask!r}")
    return photo, mask.removeprefix("masks/").removesuffix(".png")


def segmented_categories(out: Path) -> list[str]:
    """The names of classes 1, 2, ... in categories.json of the output folder `out`. Raises DamagedFile."""
    return read_categories(out, "segment the photos again with --overwrite")


def mask_path(out: Path, name: str) -> Path:
    """The mask of NAME in the output folder `out`."""
    return out / "masks" / f"{name}.png"


def overlay_path(out: Path, name: str) -> Path:
    """The overlay of NAME in the output folder `out`."""
    return out / "overlays" / f"{name}.jpg"


def stem(name: str) -> str:
    """Name of the mask of a photo: "sub/photo.jpg" -> "sub/photo". The result never leads out of its folder.

    Names that no file can have are shortened and end with a digest.
    """
    parts = ["up" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    last, _, suffix = parts[-1].rpartition(".") if parts else ("", "", "")
    if last.strip(".") and suffix:
        parts[-1] = last
    fit = [fitted(part) for part in parts[:-1]] + [fitted(part, MAX_NAME - len(".png")) for part in parts[-1:]]
    result = "/".join(fit)
    if not result or "\0" in result or len(result.encode("utf-8", "surrogatepass")) > MAX_PATH:
        return f"photo~{name_digest(name)}"
    return result


class MaskNames:
    """Assigns each photo a mask of its own.

    Args:
        recorded: Names of masks by photo that are assigned already.
    """

    def __init__(self, recorded: dict[str, str]):
        self.files: set[str] = set()
        self.folders: set[str] = set()
        for mask in recorded.values():
            self._claim(mask)

    def assign(self, name: str) -> str:
        """The name of the mask of a further photo: its `stem`, with a digest if another mask is in the way."""
        mask = stem(name)
        if self._is_taken(mask):
            folder, slash, last = mask.rpartition("/")
            last = f"{fitted(last, 200)}~{name_digest(name)}"
            mask = folder + slash + last
            if self._is_taken(mask):  # "a.png/b" beside "a": a folder that has the name of a mask
                mask = last
        self._claim(mask)
        return mask

    def _claim(self, mask: str) -> None:
        self.files.add(mask)
        while mask := mask.rpartition("/")[0]:
            self.folders.add(mask)

    def _is_taken(self, mask: str) -> bool:
        if mask in self.files or not self.folders.isdisjoint((f"{mask}.png", f"{mask}.jpg")):
            return True
        while mask := mask.rpartition("/")[0]:
            if mask.endswith((".png", ".jpg")) and mask[:-4] in self.files:
                return True
        return False


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """The names of photos by the names of their masks, in order.

    Raises:
        UserError: If two photos would have the same mask.
    """
    photos: dict[str, str] = {}
    for name in names:
        if (other := photos.setdefault(stem(name), name)) != name:
            raise UserError(f"{other} and {name} would both become {stem(name)}.png; rename one of them")
    return photos


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blends the colors of a mask over a photo and outlines its objects in white.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        mask: Class of every pixel, uint16 [H, W].

    Returns:
        uint8 [H, W, 3].
    """
    image = pixels.copy()
    for first in range(0, len(mask), ROWS):  # temporary float64 arrays of a few rows only
        part, photo = mask[first : first + ROWS], pixels[first : first + ROWS]
        colors = label_palette()[part.astype(np.uint8)]  # colors repeat beyond 255 classes
        blended = ((1 - OVERLAY) * photo + OVERLAY * colors).astype(np.uint8)
        np.copyto(image[first : first + ROWS], blended, where=(part > 0)[..., None])
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    image[edge] = 255
    return image


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


def _settle(
    out: Path, weights: Path, settings: dict[str, Any], source: PhotoSource, overwrite: bool
) -> list[ErrorRecord]:
    """Checks that `out` is new, or was made with this segmenter from these photos; records what is to be done.

    Args:
        out: Output folder.
        weights: File or folder of weights.
        settings: Names of the categories, encoder and precision.
        source: The photos.
        overwrite: Whether to segment all photos again.

    Returns:
        The photos that could not be listed.
    """
    errors: list[ErrorRecord] = []
    names = list(source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason))))
    if not names and not errors:
        raise UserError(f"there are no photos in {source.path}")
    record, photos = read_record(out, SEGMENT_RECORD), absolute(source.path)
    if record.replaced is None:  # if a kill interrupted set_aside
        put_back_files(out, files_below(out / OLD))
    if not record.stages:
        expect_no_files(out, OUTPUTS, SEGMENT_RECORD)
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    new = StageRecord(
        {"weights": absolute(weights), **settings}, files={"weights": sha256(weights)}, made_with=made_with()
    )
    known = segmented_photos(out)
    own = _own_files(out, known.values())
    has_results = any(mask_path(out, mask).exists() for mask in known.values())
    if old := record.stages.get(STAGE):
        differences = old.differences(new)
        if differences and has_results and not overwrite:
            raise UserError(
                f"{out} was made with other settings: {'; '.join(differences)}; choose another --out, or start over "
                "with --overwrite"
            )
        if record.photos != photos and has_results and not overwrite:
            _expect_moved(out, record.photos or "", source, known)
    masks = {} if overwrite else dict(known)
    assigner = MaskNames(masks)
    for name in names:
        if name not in masks:
            masks[name] = assigner.assign(name)
    for name in names:
        if known.get(name) == masks[name]:
            continue
        for path in (mask_path(out, masks[name]), overlay_path(out, masks[name])):
            if path.exists():
                raise UserError(
                    f"{path} exists and was not made by `namedmask segment` ({out / 'photos.jsonl'} does not list "
                    f"{name}); move it away or choose another --out"
                )
    remove_stale(out)
    for folder in (out / "masks", out / "overlays"):
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            remove_stale(path)
    settled = RunRecord(photos, {STAGE: new}, replaced=record.replaced)
    if overwrite and has_results and record.replaced is None:
        set_aside(out, own)
        settled.replaced = RunRecord(record.photos, record.stages)
    elif overwrite or not has_results:
        remove_files(out, own)
    make_folder(out / UNFINISHED)
    settled.write(out, SEGMENT_RECORD)
    with atomic_write(out / "photos.jsonl") as file:
        for name, mask in masks.items():
            file.write(json.dumps({"photo": name, "mask": f"masks/{mask}.png"}).encode() + b"\n")
    with atomic_write(out / "categories.json") as file:
        file.write(json.dumps({"categories": settings["categories"]}, indent=1).encode())
    if scores := _score_lines(out):  # of an interrupted command, too
        _write_scores(out, scores, names, masks)
    for path in files_below(out / UNFINISHED):
        path.unlink()
    with atomic_write(out / UNFINISHED / "photos.jsonl") as file:
        for name in names:
            file.write(json.dumps({"photo": name}).encode() + b"\n")
    return errors


def _expect_moved(out: Path, before: str, source: PhotoSource, known: Collection[str]) -> None:
    """Masks may be continued where their photos have moved, but photos of other folders may have the same names."""
    same = Path(before).exists() and Path(before).samefile(source.path)
    missing = [name for name in known if not source.exists(name)]
    if not same and (Path(before).exists() or len(missing) > len(known) / 2):
        raise UserError(
            f"{out} was made from the photos in {before}: choose another --out, or start over with --overwrite"
        )


def _finish(out: Path, complete: bool) -> None:
    """Removes the results that --overwrite has replaced; restores them if there are no new ones."""
    record = read_record(out, SEGMENT_RECORD)
    if record.replaced is None:
        return
    masks = segmented_photos(out).values()
    if complete:
        remove_files(out, files_below(out / OLD))
        record.replaced = None
        record.write(out, SEGMENT_RECORD)
    elif not any(mask_path(out, mask).exists() for mask in masks):
        remove_files(out, _own_files(out, masks))
        record.replaced.write(out, SEGMENT_RECORD)
        put_back_files(out, files_below(out / OLD))


def _own_files(out: Path, masks: Collection[str]) -> list[Path]:
    """The existing files of `out` that segmenting the photos of these masks makes, the list of photos last."""
    paths = [path for mask in masks for path in (mask_path(out, mask), overlay_path(out, mask))]
    paths += files_below(out / UNFINISHED)
    paths += [out / name for name in ("errors.jsonl", "scores.jsonl", "categories.json", "photos.jsonl")]
    return [path for path in paths if path.exists()]


def predictions(segmenter: Segmenter, source: PhotoSource, stems: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Segments some photos of a source.

    Args:
        segmenter: The segmenter.
        source: The photos.
        stems: Names of the photos to segment, without suffixes.

    Yields:
        The name of a photo without its suffix, and its mask, uint16 [H, W].

    Raises:
        UserError: If a photo is missing or cannot be used.
    """
    errors: list[PhotoError] = []
    names = by_stem(name for name in source.names(errors.append) if stem(name) in stems)
    if missing := sorted(stems - names.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f" ({errors[0]})" if errors else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}{why}")
    for name, mask in masks_of(segmenter, source, sorted(names.values())):
        yield stem(name), mask


def masks_of(segmenter: Segmenter, source: PhotoSource, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names of photos with their masks, uint16 [H, W]. Raises UserError if a photo cannot be used."""
    for batch in segmenter.segment(source, names):
        for name, photo, mask in batch:
            if isinstance(photo, PhotoError):
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield name, mask


if __name__ == "__main__":
    launcher.as_worker(_work)
