# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

OUT/
  segment.json          the record (see `record`): photos, weights with their digest, names, precision
  photos.jsonl          names of the photos whose masks the folder has or will have; written before the first mask
  categories.json       names of classes 1, 2, ...
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the mask's colors blended over it, objects outlined
  errors.jsonl          photos that could not be used, with the reason; written last

NAME is the photo's name without its suffix. A photo whose mask exists is skipped. Files of other origin are neither
used nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import (
    OLD,
    absolute,
    atomic_write,
    make_folder,
    put_back_files,
    remove_files,
    remove_stale,
    set_aside,
    sha256,
)
from ..formats import label_palette, write_label_map
from ..masks import ErrorRecord, parse_photo, read_lines, write_errors
from ..photos import Photo, PhotoError, PhotoSource
from ..progress import Progress
from ..record import RunRecord, StageRecord, expect_no_files, made_with, read_record
from .predict import Segmenter

RECORD = "segment.json"
STAGE = "segment"  # in the record
OUTPUTS = ("masks", "overlays", "photos.jsonl", "categories.json", "errors.jsonl")
OVERLAY = 0.5  # opacity of the colors


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
        UserError: If `out` was made with another segmenter or from other photos, or has files of other origin; if there
            are no photos; or if two photos have the same name apart from the suffix. Nothing is changed then.
    """
    errors: list[ErrorRecord] = []
    names = list(by_stem(source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason)))).values())
    if not names and not errors:
        raise UserError(f"there are no photos in {source.path}")
    unlisted = len(errors)
    _settle(out, segmenter, weights, source, names, overwrite)
    progress.total = len(names)
    remaining = [name for name in names if not mask_path(out, name).exists()]
    progress.advance(len(names) - len(remaining), existing=True)
    try:
        for batch in segmenter.segment(source, remaining):
            for name, photo, mask in batch:
                if isinstance(photo, Photo):
                    _write(out, name, photo.pixels, mask, len(segmenter.names))
                else:
                    errors.append(ErrorRecord(name, "segment", photo.reason))
            progress.advance(len(batch))
        write_errors(out / "errors.jsonl", errors)
    except Exception:
        _finish(out, names, complete=False)
        raise
    made = len(names) + unlisted - len(errors)
    _finish(out, names, complete=made > 0)
    return made, len(errors)


def mask_path(out: Path, name: str) -> Path:
    """The mask of a photo in the output folder `out`."""
    return out / "masks" / f"{stem(name)}.png"


def segmented_photos(out: Path) -> list[str]:
    """The names in photos.jsonl of the output folder `out`. Raises DamagedFile at an invalid line."""
    path = out / "photos.jsonl"
    remedy = "segment the photos again with --overwrite, into another --out"
    return list(read_lines(path, parse_photo, remedy)) if path.exists() else []


def stem(name: str) -> str:
    """Name of the mask of a photo: "sub/photo.jpg" -> "sub/photo". The result never leads out of its folder."""
    path = PurePosixPath(name)
    parts = ["up" if part == ".." else part for part in path.with_suffix("").parts if not part.startswith("/")]
    return "/".join(parts)


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
    colors = label_palette()[mask.astype(np.uint8)]  # colors repeat beyond 255 classes
    image = np.where((mask > 0)[..., None], (1 - OVERLAY) * pixels + OVERLAY * colors, pixels).astype(np.uint8)
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    image[edge] = 255
    return image


def _write(out: Path, name: str, pixels: np.ndarray, mask: np.ndarray, classes: int) -> None:
    for path in (_overlay_path(out, name), mask_path(out, name)):
        make_folder(path.parent)
    with atomic_write(_overlay_path(out, name)) as file:
        Image.fromarray(overlay(pixels, mask)).save(file, "jpeg", quality=88)
    write_label_map(mask_path(out, name), mask, classes)


def _overlay_path(out: Path, name: str) -> Path:
    return out / "overlays" / f"{stem(name)}.jpg"


def _settle(
    out: Path, segmenter: Segmenter, weights: Path, source: PhotoSource, names: list[str], overwrite: bool
) -> None:
    """Checks that `out` is new, or was made with this segmenter from these photos; writes all but the masks."""
    record, photos = read_record(out, RECORD), absolute(source.path)
    if record.replaced is None:  # if a kill interrupted set_aside
        put_back_files(out, _files_below(out / OLD))
    if not record.stages:
        expect_no_files(out, OUTPUTS, RECORD)
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    values = {"weights": absolute(weights), "categories": segmenter.names[1:]}
    values |= {"encoder": segmenter.network.encoder, "precision": str(segmenter.dtype)[6:]}
    new = StageRecord(values, files={"weights": sha256(weights)}, made_with=made_with())
    known = segmented_photos(out)
    own = _own_files(out, known)
    has_results = any(mask_path(out, name) in own for name in known)
    if old := record.stages.get(STAGE):
        differences = old.differences(new)
        if differences and has_results and not overwrite:
            raise UserError(
                f"{out} was made with other settings: {'; '.join(differences)}; choose another --out, or start over "
                "with --overwrite"
            )
        if record.photos != photos and has_results and not overwrite:
            _expect_moved(out, record.photos or "", source, known)
    for name in set(names).difference(known):
        for path in (mask_path(out, name), _overlay_path(out, name)):
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
    settled.write(out, RECORD)
    listed = names if overwrite else list(dict.fromkeys((*known, *names)))
    with atomic_write(out / "photos.jsonl") as file:
        file.writelines(json.dumps({"photo": name}).encode() + b"\n" for name in listed)
    with atomic_write(out / "categories.json") as file:
        file.write(json.dumps({"categories": segmenter.names[1:]}, indent=1, ensure_ascii=False).encode())


def _expect_moved(out: Path, before: str, source: PhotoSource, known: list[str]) -> None:
    """Masks may be continued where their photos have moved, but photos of other folders may have the same names."""
    same = Path(before).exists() and Path(before).samefile(source.path)
    missing = [name for name in known if not source.exists(name)]
    if not same and (Path(before).exists() or len(missing) > len(known) / 2):
        raise UserError(
            f"{out} was made from the photos in {before}: choose another --out, or start over with --overwrite"
        )


def _finish(out: Path, names: list[str], complete: bool) -> None:
    """Removes the results that --overwrite has replaced; restores them if there are no new ones."""
    record = read_record(out, RECORD)
    if record.replaced is None:
        return
    if complete:
        remove_files(out, _files_below(out / OLD))
        record.replaced = None
        record.write(out, RECORD)
    elif not any(mask_path(out, name).exists() for name in names):
        remove_files(out, _own_files(out, names))
        record.replaced.write(out, RECORD)
        put_back_files(out, _files_below(out / OLD))


def _own_files(out: Path, names: list[str]) -> list[Path]:
    """The existing files of `out` that segmenting these photos makes, the list of photos last."""
    paths = [path for name in names for path in (mask_path(out, name), _overlay_path(out, name))]
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

    def fail(error: PhotoError) -> None:
        raise UserError(str(error))

    names = by_stem(name for name in source.names(fail) if stem(name) in stems)
    if missing := sorted(stems - names.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}")
    for batch in segmenter.segment(source, sorted(names.values())):
        for name, photo, mask in batch:
            if isinstance(photo, PhotoError):
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield stem(name), mask
