# SPDX-License-Identifier: MIT
"""`namedmask convert`: the masks of a run, or of `namedmask segment`, as a data set for other tools.

A module per format writes a `dataset.Dataset` into a folder, photo by photo. The folder appears whole or not at all
(`folder`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import NothingUsable, UserError, counted, quoted
from ..selection import Selection

PhotoMode = Literal["path", "link", "copy", "inside"]


class Format(NamedTuple):
    """How a data set of a format is written.

    Attributes:
        writer: Function `module:name` that takes a Dataset and writes it into `dataset.folder`.
        photos: What happens with photos by default: "path", the data set refers to them where they are; "link", tools
            look for them in the data set; "inside", their bytes are part of its files.
    """

    writer: str
    photos: PhotoMode


FORMATS = {
    "coco": Format("coco:write", "path"),
    "yolo-seg": Format("yolo:write_segments", "link"),
    "yolo-semantic": Format("yolo:write_label_maps", "link"),
    "voc": Format("voc:write", "link"),
    "png": Format("png:write", "path"),
    "cvat": Format("cvat:write", "path"),
    "label-studio": Format("label_studio:write", "path"),
    "parquet": Format("parquet:write", "inside"),
    "webdataset": Format("webdataset:write", "inside"),
}
LABEL_MAPS = ("png", "voc", "parquet", "webdataset", "yolo-semantic")  # formats that hold label maps
FormatName = Literal["coco", "yolo-seg", "yolo-semantic", "voc", "png", "cvat", "label-studio", "parquet", "webdataset"]


@dataclass(frozen=True)
class Options:
    """What `convert` writes.

    Attributes:
        selection: Which masks to use.
        largest_part: Keep only the largest connected part of each mask.
        photos: "link" or "copy" photos into the data set; None: the default of the format.
        upright: Rotate photos by their EXIF orientation. Implies "copy" where the default is "path".
        split: Shares of the photos for train, val and test; None: all photos are in train.
        seed: Which photos are in which split.
        gray: Write label maps as grayscale PNGs instead of indexed ones.

    Raises:
        UserError: If `photos` is none of these.
        TypeError: If `selection` is no Selection.
    """

    selection: Selection = field(default_factory=Selection)
    largest_part: bool = False
    photos: Literal["link", "copy"] | None = None
    upright: bool = False
    split: tuple[float, float, float] | None = None
    seed: int = 0
    gray: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.selection, Selection):
            raise TypeError(f"selection: expected a Selection, got {self.selection!r}")
        if self.photos not in (None, "link", "copy"):
            raise UserError(f"photos: expected 'link', 'copy' or None, got {self.photos!r}")


class Converted(NamedTuple):
    """What `convert` has written.

    Attributes:
        photos: Number of photos by split.
        masks: Number of masks.
        left_out: Number of masks that the selection has left out.
        rejected: Number of masks that the review has left out.
        failed: Number of photos that could not be used; they are in OUT/errors.jsonl.
        rotated: Names of the photos whose files store them rotated (EXIF), unless they were written upright.
        root: Folder that the data set's paths of photos start from.
    """

    photos: dict[str, int]
    masks: int
    left_out: int
    rejected: int
    failed: int
    rotated: Sequence[str]
    root: Path


def convert(
    path: str | os.PathLike,
    to: FormatName,
    out: str | os.PathLike,
    options: Options = Options(),
    photos: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes the masks of a run, or of a folder of `namedmask segment`, as a data set.

    The bytes depend on masks, photos, options and the versions of libraries alone. Memory holds the
    names and scores of masks, not the masks.

    Args:
        path: The run folder, or the output folder of `namedmask segment`.
        to: Name of the format.
        out: The folder to write. It appears when it is complete.
        options: Which masks, and how they are written.
        photos: Where the photos are, if they have moved.
        overwrite: Replace a data set in `out` that `convert` has written. Other files in it are kept.

    Raises:
        UserError: If masks, photos or `out` cannot be used as asked; nothing is changed then.
        NothingUsable: If no photo can be used.
    """
    from ..masks import write_errors
    from .dataset import Dataset
    from .folder import new_folder

    if to not in FORMATS:
        raise UserError(f"there is no format {to!r}; expected one of {', '.join(FORMATS)}")
    out, (writer, mode) = Path(out), FORMATS[to]
    if mode == "inside" and options.photos:
        raise UserError(f"--to {to} stores the photos in its files: leave out --{options.photos}")
    if mode != "inside":
        mode = options.photos or ("copy" if options.upright and mode == "path" else mode)
    if options.gray and to not in LABEL_MAPS:
        raise UserError(f"--gray has no effect on --to {to}; it is for {', '.join(LABEL_MAPS)}")
    module, _, function = writer.partition(":")
    write = getattr(importlib.import_module(f".{module}", __name__), function)
    with new_folder(out, overwrite) as folder, Dataset(Path(path), folder, mode, options, photos) as dataset:
        if not len(dataset):
            why = f" ({dataset.errors[0].photo}: {dataset.errors[0].reason})" if dataset.errors else ""
            raise NothingUsable(f"{path}: no photo of the chosen masks can be used{why}; see --photos")
        write(dataset)
        if rotated := dataset.rotated:
            dataset.write("rotated.txt", b"".join(os.fsencode(name) + b"\n" for name in rotated))
        if dataset.errors:
            write_errors(folder / "errors.jsonl", dataset.errors)
        counts = {split: len(entries) for split, entries in dataset.splits.items()}
        # The label maps of "png" do not refer to photos; photos.jsonl has their names in the source.
        root = Path(dataset.source.root if to == "png" else dataset.root) if mode == "path" else out
        return Converted(counts, dataset.masks, dataset.left_out, dataset.rejected, len(dataset.errors), rotated, root)


def describe(converted: Converted, to: str, out: Path) -> list[str]:
    """What a command prints about a result, one line each."""
    splits = ", ".join(f"{count:,} {split}" for split, count in converted.photos.items())
    total = counted(sum(converted.photos.values()), "photo")
    lines = [f"{counted(converted.masks, 'mask')} of {total} ({splits}) in {out}"]
    if converted.left_out:
        lines.append(f"left out by score: {counted(converted.left_out, 'mask')}")
    if converted.rejected:
        lines.append(f"rejected by the review: {counted(converted.rejected, 'mask')}")
    if FORMATS[to].photos == "path" and converted.root != out:
        lines.append(f"paths of photos start from {converted.root}")
    if converted.rotated:
        names = quoted(converted.rotated)
        lines.append(
            f"stored rotated (EXIF): {len(converted.rotated)} of {total}, {names}; {out / 'rotated.txt'} lists "
            "them. Masks fit photos as viewers show them; for tools that ignore EXIF, add --upright"
        )
    if converted.failed:
        lines.append(f"could not be used: {counted(converted.failed, 'photo')}, listed in {out / 'errors.jsonl'}")
    return lines
