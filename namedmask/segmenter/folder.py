# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

OUT/
  segment.json          the record (see `record`): photos, weights with their digest, names, precision
  photos.jsonl          the mask of each photo, {"photo": name, "mask": "masks/NAME.png"}; written before the first mask
  categories.json       names of classes 1, 2, ...
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the mask's colors blended over it, objects outlined
  errors.jsonl          photos that could not be used, with the reason; written last

NAME is the photo's name without its suffix; a digest is added if two photos would have the same NAME, and replaces what
is too long for a file name. A photo whose mask exists is skipped. Files of other origin are neither used nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import (
    MAX_NAME,
    NAME_ERRORS,
    OLD,
    absolute,
    atomic_write,
    fitted,
    make_folder,
    name_digest,
    put_back_files,
    remove_files,
    remove_stale,
    set_aside,
    sha256,
)
from ..formats import label_palette, write_label_map
from ..masks import ONLY_FIELDS, ErrorRecord, parse_line, read_lines, write_errors
from ..memory import DECODE_SHARE, photo_budget
from ..photos import SEGMENT_RECORD, Photo, PhotoError, PhotoSource
from ..progress import Progress
from ..record import RunRecord, StageRecord, expect_no_files, made_with, read_record
from ..threads import map_ahead, thread_count
from .predict import MASK_BYTES, Prediction, Segmenter

STAGE = "segment"  # in the record
OUTPUTS = ("masks", "overlays", "photos.jsonl", "categories.json", "errors.jsonl")
OVERLAY = 0.5  # opacity of the colors
MAX_PATH = 3000  # bytes of NAME; Linux allows 4096 for the whole path
JPEG_SIDE = 65500  # maximum side of a JPEG
ROWS = 256  # of an overlay that are computed at once


def segment_photos(
    segmenter: Segmenter, weights: Path, source: PhotoSource, out: Path, progress: Progress, overwrite: bool = False
) -> tuple[int, int]:
    """Segments the photos of `source` that have no mask in `out` yet.

    Args:
        segmenter: The segmenter.
        weights: The file or folder that `segmenter` was loaded from.
        source: The photos.
        out: Output folder, of which the caller holds the lock.
        progress: Advances with every photo.
        overwrite: Segment all photos again. The earlier results are in OUT/.replaced until all new ones exist, and are
            restored if there is none.

    Returns:
        How many photos have masks, and how many could not be used.

    Raises:
        UserError: If `out` was made with another segmenter or from other photos, or has files of other origin, or if
            there are no photos. Nothing is changed then.
    """
    errors: list[ErrorRecord] = []
    names = list(source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason))))
    if not names and not errors:
        raise UserError(f"there are no photos in {source.path}")
    unlisted = len(errors)
    masks = _settle(out, segmenter, weights, source, names, overwrite)
    progress.total = len(names)
    remaining = [name for name in names if not _mask_path(out, masks[name]).exists()]
    progress.advance(len(names) - len(remaining), existing=True)

    def write(item: Prediction) -> ErrorRecord | None:
        name, photo, mask = item
        try:
            if isinstance(photo, PhotoError):
                raise photo
            _write(out, masks[name], photo, mask, len(segmenter.names))
        except PhotoError as error:
            return ErrorRecord(name, "segment", error.reason)
        return None

    def cost(item: Prediction) -> int:
        return MASK_BYTES * item[2].size if item[2] is not None else 0

    try:
        predicted = (item for batch in segmenter.segment(source, remaining) for item in batch)
        for error in map_ahead(write, predicted, thread_count(), cost=cost, limit=int(photo_budget() * DECODE_SHARE)):
            errors += [error] if error else []
            progress.advance(1)
        write_errors(out / "errors.jsonl", errors)
    except Exception:
        _finish(out, masks.values(), complete=False)
        raise
    made = len(names) + unlisted - len(errors)
    _finish(out, masks.values(), complete=made > 0)
    return made, len(errors)


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


def _mask_path(out: Path, name: str) -> Path:
    return out / "masks" / f"{name}.png"


def _overlay_path(out: Path, name: str) -> Path:
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


def _write(out: Path, name: str, photo: Photo, mask: np.ndarray, classes: int) -> None:
    """Writes overlay and mask. Raises PhotoError if their files cannot have these names."""
    image = Image.fromarray(overlay(photo.pixels, mask))
    image.thumbnail((JPEG_SIDE, JPEG_SIDE))
    try:
        for path in (_overlay_path(out, name), _mask_path(out, name)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(_overlay_path(out, name)) as file:
            image.save(file, "jpeg", quality=88)
        write_label_map(_mask_path(out, name), mask, classes)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        raise PhotoError(photo.name, str(error)) from error


def _settle(
    out: Path, segmenter: Segmenter, weights: Path, source: PhotoSource, names: list[str], overwrite: bool
) -> dict[str, str]:
    """Checks that `out` is new, or was made with this segmenter from these photos; writes all but the masks.

    Returns:
        The names of the masks by photo.
    """
    record, photos = read_record(out, SEGMENT_RECORD), absolute(source.path)
    if record.replaced is None:  # if a kill interrupted set_aside
        put_back_files(out, _files_below(out / OLD))
    if not record.stages:
        expect_no_files(out, OUTPUTS, SEGMENT_RECORD)
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    values = {"weights": absolute(weights), "categories": segmenter.names[1:]}
    values |= {"encoder": segmenter.network.encoder, "precision": str(segmenter.dtype)[6:]}
    new = StageRecord(values, files={"weights": sha256(weights)}, made_with=made_with())
    known = segmented_photos(out)
    own = _own_files(out, known.values())
    has_results = any(_mask_path(out, mask).exists() for mask in known.values())
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
        for path in (_mask_path(out, masks[name]), _overlay_path(out, masks[name])):
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
    make_folder(out)
    settled.write(out, SEGMENT_RECORD)
    with atomic_write(out / "photos.jsonl") as file:
        for name, mask in masks.items():
            file.write(json.dumps({"photo": name, "mask": f"masks/{mask}.png"}).encode() + b"\n")
    with atomic_write(out / "categories.json") as file:
        file.write(json.dumps({"categories": segmenter.names[1:]}, indent=1).encode())
    return masks


def _expect_moved(out: Path, before: str, source: PhotoSource, known: Collection[str]) -> None:
    """Masks may be continued where their photos have moved, but photos of other folders may have the same names."""
    same = Path(before).exists() and Path(before).samefile(source.path)
    missing = [name for name in known if not source.exists(name)]
    if not same and (Path(before).exists() or len(missing) > len(known) / 2):
        raise UserError(
            f"{out} was made from the photos in {before}: choose another --out, or start over with --overwrite"
        )


def _finish(out: Path, masks: Collection[str], complete: bool) -> None:
    """Removes the results that --overwrite has replaced; restores them if there are no new ones."""
    record = read_record(out, SEGMENT_RECORD)
    if record.replaced is None:
        return
    if complete:
        remove_files(out, _files_below(out / OLD))
        record.replaced = None
        record.write(out, SEGMENT_RECORD)
    elif not any(_mask_path(out, mask).exists() for mask in masks):
        remove_files(out, _own_files(out, masks))
        record.replaced.write(out, SEGMENT_RECORD)
        put_back_files(out, _files_below(out / OLD))


def _own_files(out: Path, masks: Collection[str]) -> list[Path]:
    """The existing files of `out` that segmenting the photos of these masks makes, the list of photos last."""
    paths = [path for mask in masks for path in (_mask_path(out, mask), _overlay_path(out, mask))]
    paths += [out / name for name in ("errors.jsonl", "categories.json", "photos.jsonl")]
    return [path for path in paths if path.exists()]


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


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
