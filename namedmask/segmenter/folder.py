# SPDX-License-Identifier: MIT
"""The output folder of `namedmask segment`.

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
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import AUGMENTATION, find_setting
from ..errors import UserError
from ..files import (
    OLD,
    absolute,
    atomic_write,
    files_below,
    make_folder,
    put_back_files,
    remove_files,
    remove_stale,
    set_aside,
    sha256,
    write_json,
    write_json_lines,
)
from ..formats import read_categories
from ..masks import ONLY_FIELDS, ErrorRecord, parse_line, read_lines
from ..photos import SEGMENT_RECORD, PhotoSource, note_unlisted
from ..record import RunRecord, StageRecord, expect_no_files, made_with, read_record
from .mask_names import MaskNames
from .predict import MaskScore, Scores

STAGE = "segment"  # in the record
OUTPUTS = ("masks", "overlays", "photos.jsonl", "categories.json", "scores.jsonl", "errors.jsonl")
UNFINISHED, SCORES, ERRORS = ".segmenting", ".scores.jsonl", ".errors.jsonl"


def mask_path(out: Path, name: str) -> Path:
    """The mask of NAME in the output folder `out`."""
    return out / "masks" / f"{name}.png"


def overlay_path(out: Path, name: str) -> Path:
    """The overlay of NAME in the output folder `out`."""
    return out / "overlays" / f"{name}.jpg"


def segmented_categories(out: Path) -> list[str]:
    """The names of classes 1, 2, ... in categories.json of the output folder `out`. Raises DamagedFile."""
    return read_categories(out, "segment the photos again with --overwrite")


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


def read_scores(out: Path) -> dict[str, Scores]:
    """The scores in scores.jsonl of the output folder `out`, by photo. Raises DamagedFile."""
    return dict(map(_parse_scores, score_lines(out).values()))


def score_line(name: str, scores: Scores) -> bytes:
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


def score_lines(out: Path) -> dict[str, bytes]:
    """The lines of scores.jsonl and those that workers have written since, by photo. Raises DamagedFile."""

    def parse(line: bytes) -> tuple[str, bytes]:
        return _parse_scores(line)[0], line

    path = out / "scores.jsonl"
    remedy = "delete it and run the same command again, which segments the photos again"
    lines = dict(read_lines(path, parse, remedy)) if path.exists() else {}
    return lines | dict(map(parse, unfinished_lines(out, SCORES)))


def unfinished_lines(out: Path, kind: str) -> Iterator[bytes]:
    """The whole lines that workers have written; the last one of a killed worker may be cut off."""
    for path in sorted((out / UNFINISHED).glob(f"*{kind}")):
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def write_scores(out: Path, lines: dict[str, bytes], names: Iterable[str], masks: dict[str, str]) -> None:
    """Writes scores.jsonl: the lines of the photos `names`, then those of other photos that still have a mask."""
    with atomic_write(out / "scores.jsonl") as file:
        for name in dict.fromkeys((*names, *masks)):
            if name in lines and mask_path(out, masks[name]).exists():
                file.write(lines[name])


def settle(
    out: Path, weights: Path, settings: dict[str, Any], source: PhotoSource, overwrite: bool
) -> list[ErrorRecord]:
    """Checks that `out` is new, or was made with this segmenter from these photos; records what is to be done.

    Args:
        out: Output folder.
        weights: File or folder of weights.
        settings: Names of the categories, encoder, precision and augmentation.
        source: The photos.
        overwrite: Whether to segment all photos again.

    Returns:
        The photos that could not be listed.
    """
    errors: list[ErrorRecord] = []
    names = list(source.names(note_unlisted(errors)))
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
        # Records of earlier versions lack settings that were added later: these had their defaults.
        defaults = {name: find_setting(f"detector.{name}").default for name in AUGMENTATION}
        old = StageRecord(defaults | old.settings, files=old.files)
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
    listed = ({"photo": name, "mask": f"masks/{mask}.png"} for name, mask in masks.items())
    write_json_lines(out / "photos.jsonl", listed)
    write_json(out / "categories.json", {"categories": settings["categories"]})
    if scores := score_lines(out):  # of an interrupted command, too
        write_scores(out, scores, names, masks)
    for path in files_below(out / UNFINISHED):
        path.unlink()
    write_json_lines(out / UNFINISHED / "photos.jsonl", ({"photo": name} for name in names))
    return errors


def _expect_moved(out: Path, before: str, source: PhotoSource, known: Collection[str]) -> None:
    """Masks may be continued where their photos have moved, but photos of other folders may have the same names."""
    same = Path(before).exists() and Path(before).samefile(source.path)
    missing = [name for name in known if not source.exists(name)]
    if not same and (Path(before).exists() or len(missing) > len(known) / 2):
        raise UserError(
            f"{out} was made from the photos in {before}: choose another --out, or start over with --overwrite"
        )


def finish(out: Path, complete: bool) -> None:
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
