# SPDX-License-Identifier: MIT
"""Imports masks: COCO RLEs in JSON files, as the authors' code writes them."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..archive import Archive, Retrieved, expect_distinct, read_archive, write_archive
from ..config import PseudolabelConfig
from ..errors import UserError, counted, quoted
from ..files import absolute, composed, find_files, locked, make_folder
from ..masks import ErrorRecord, MaskRecord, cover, errors_path, mask_score, run_lengths, write_errors, write_shard
from ..photos import PhotoError, decode_ahead, open_source
from ..progress import logger, warn
from ..pseudolabel import shard_path, work_of
from ..record import UNFINISHED, StageRecord, read_config, read_record
from . import (
    category_of,
    imported_results,
    match_photos,
    match_stems,
    read_json,
    unreadable,
    without_suffix,
)

OBJECT = "object"  # the category of a new run whose masks are not in class folders


def import_masks(
    path: Path, out: Path, photos: str | os.PathLike | None = None, overwrite: bool = False
) -> tuple[int, int]:
    """Writes the masks of a run folder.

    Args:
        path: A folder with one JSON file per photo, {"size": [height, width], "counts": run lengths}, whose name is
            that of the photo without its suffix; or one JSON file {photo: RLE}. In a folder, the files below a
            subfolder with the name of a category are the masks of that category alone.
        out: The run folder.
        photos: Where the photos are now; needed for a new run. Its categories are the class folders of the masks if
            there are any, else `OBJECT`.
        overwrite: Replace existing masks and what was made from them.

    Returns:
        The number of masks, and the number of photos without one, which are listed in errors.jsonl.

    Raises:
        UserError: If there is no mask of any photo, or if the run has masks already. Nothing is written then.
    """
    masks = _Masks(path)
    given: dict[str, Any] = {"photos": absolute(photos)} if photos is not None else {}
    record = read_record(out)
    made_with = [record.stages.get(name, StageRecord()).made_with for name in ("archive", "pseudolabel")]
    begun = all(UNFINISHED in one for one in made_with)  # as a new run, by an import that has failed or was killed
    is_new = begun or not (out / "archive.json").exists()
    if is_new and not begun and (photos is None or record.photos is not None):
        raise UserError(
            f"{out / 'archive.json'} is missing; make it with `namedmask archive` or `namedmask import archive`, or "
            "start a new run of these masks with --photos"
        )
    source = open_source(photos if photos is not None else read_config(out).photos)
    if is_new:
        sources = masks.find(masks.candidates(source.names(lambda _: None)), source.path)
        found: defaultdict[str, list[Retrieved]] = defaultdict(list)
        for name, category in sorted(sources):
            found[category].append(Retrieved(name, None))
        archive = Archive(sorted(found), dict(sorted(found.items())))
        given |= {"categories": archive.categories}
    else:
        archive = read_archive(out / "archive.json")
        listed = {category: [entry.photo for entry in entries] for category, entries in archive.photos.items()}
        sources = masks.find(listed, source.path)
    shard_size = PseudolabelConfig().shard_size if is_new else read_config(out).pseudolabel.shard_size
    given |= {"pseudolabel": {"shard_size": shard_size}}
    work = work_of(archive)
    records: dict[str, list[MaskRecord]] = {}
    errors: dict[str, list[ErrorRecord]] = defaultdict(list)
    for (name, categories), (_, size) in zip(
        work, decode_ahead(source, (name for name, _ in work), source.size), strict=True
    ):
        records[name] = []
        for category, score in categories:
            try:
                if isinstance(size, PhotoError):
                    raise size
                if (name, category) not in sources:
                    raise PhotoError(name, f"{path} has no mask of it")
                mask = masks.decode(sources[name, category], size)
                records[name].append(MaskRecord.from_mask(name, mask, category, score, mask_score(mask, 1.0)))
            except PhotoError as error:
                errors[name].append(ErrorRecord(name, "import", error.reason))
            except (OSError, ValueError) as error:
                errors[name].append(ErrorRecord(name, "import", f"{masks.file(sources[name, category])}: {error}"))
    count, failed = sum(map(len, records.values())), sum(not found for found in records.values())
    if not count:
        reasons = [error.reason for found in errors.values() for error in found]
        first = f"{work[0][0]!r}: {reasons[0]}" if reasons else masks.unused(sources.values())[0]
        which = f"photos in {source.path}" if is_new else f"{counted(len(work), 'photo')} of {out}"
        raise UserError(f"{path} has no usable mask of the {which}, such as {first}")
    stages = ["archive", "pseudolabel"] if is_new else ["pseudolabel"]
    with locked(out), imported_results(out, given, stages, overwrite, path):
        if is_new:
            write_archive(out / "archive.json", archive)
            logger.info(f"categories of the new run: {quoted(archive.categories)}")
        make_folder(out / "masks")
        for shard in range(-(-len(work) // shard_size)):
            names = [name for name, _ in work[shard * shard_size : (shard + 1) * shard_size]]
            file = shard_path(out / "masks", shard)
            write_errors(errors_path(file), dict.fromkeys(error for name in names for error in errors[name]))
            write_shard(file, [record for name in names for record in records[name]])
    if failed:
        warn(f"photos without a mask: {failed:,} of {len(work):,}; see {out / 'errors.jsonl'}")
    if partly := sum(bool(found and errors[name]) for name, found in records.items()):
        warn(f"photos with masks of some of their categories only: {partly:,}; see {out / 'errors.jsonl'}")
    if unused := masks.unused(sources.values()):
        warn(f"masks that are not used: {len(unused):,} of {len(masks.keys):,}, such as {unused[0]}")
    return count, failed


class _Masks:
    """The masks below a folder or in a file, by their keys: relative paths without ".json", or names of photos."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] | None = None
        if path.is_dir():
            files = [name for name in find_files(path, ".json") if name.endswith(".json")]
            self.keys = [name.removesuffix(".json") for name in files]
        else:
            try:
                values = read_json(path)
            except (OSError, ValueError) as error:
                raise unreadable(path, error) from None
            if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
                raise UserError(
                    f'{path} cannot be imported: expected {{photo: {{"size": ..., "counts": ...}}}}; a single mask is '
                    "imported as a file in a folder"
                )
            self.values, self.keys = values, list(values)
        self.unmatched: dict[str, str] = {}  # why no photo was found for a key
        if not self.keys:
            raise UserError(f"{path} holds no masks" + (" (*.json)" if self.values is None else ""))

    def file(self, key: str) -> str:
        return f"{self.path}, {key!r}" if self.values is not None else f"{self.path / key}.json"

    def decode(self, key: str, size: tuple[int, int]) -> np.ndarray:
        """The mask of a photo of this size, bool [H, W]. Raises ValueError or OSError if it is damaged."""
        value = self.values[key] if self.values is not None else read_json(self.path / f"{key}.json")
        return decode_rle(value, size)

    def unused(self, used: Iterable[str]) -> list[str]:
        """Where the masks with other keys are, and why."""
        known, other = set(used), "another mask of its photo is more specific"
        return [f"{self.file(key)}: {self.unmatched.get(key, other)}" for key in self.keys if key not in known]

    def candidates(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The photos that may be of each category of a new run, by the names of files and folders."""
        folders = {key: key.partition("/")[0] if "/" in key else "" for key in self.keys}
        outside = [key for key, folder in folders.items() if not any(map(str.isalpha, folder))]  # or in 00001
        if self.values is not None or outside:
            if self.values is None and len(outside) < len(self.keys):
                logger.info(f"{self.file(outside[0])} is in no class folder: all masks get the category {OBJECT!r}")
            folders = dict.fromkeys(self.keys, OBJECT)
        categories = dict.fromkeys(folders.values())
        expect_distinct(categories, str(self.path))
        claims: defaultdict[str, set[str]] = defaultdict(set)
        for key, category in folders.items():
            claims[_file_stem(key)].add(category)
        of_folder = functools.cache(lambda folder: category_of(folder, categories))
        photos: dict[str, list[str]] = {category: [] for category in categories}
        for name in names:
            own = {of_folder(folder) for folder in name.split("/")[:-1]} - {None}
            claiming = claims.get(_file_stem(name), set())
            for category in claiming & own if own else claiming:  # a photo of the folder cat is no dog
                photos[category].append(name)
        return photos

    def find(self, photos: dict[str, list[str]], root: str) -> dict[tuple[str, str], str]:
        """The key of each photo and category that have a mask, given the photos of each category."""
        folders: dict[str, dict[str, str]] = {category: {} for category in photos}
        if self.values is None:
            of_folder = functools.cache(lambda folder: category_of(folder, photos.keys()))
            for key in self.keys:
                folder, _, below = key.partition("/")
                if below and (own_category := of_folder(folder)) is not None:
                    folders[own_category][below] = key
        below_folders = {key for own in folders.values() for key in own.values()}
        others = {key: key for key in self.keys if key not in below_folders}
        general = self._match(others, (name for names in photos.values() for name in names), root)
        found = {(name, c): general[name] for c, names in photos.items() for name in names if name in general}
        for category, names in photos.items():
            own = folders[category]
            whole = self._match({key: key for key in own.values()}, names, root)  # in class folders like the photos
            special = self._match(own, names, root) | whole
            found |= {(name, category): key for name, key in special.items()}
        return found

    def _match(self, keys: dict[str, str], names: Iterable[str], root: str) -> dict[str, str]:
        """The key of each photo. Photos are found by their whole names, or by their names without suffix."""
        names = list(dict.fromkeys(names))  # an archive may be written by hand
        matched, others = match_photos(keys.keys(), names, root)
        by_stem, reasons = match_stems(others.keys(), names, root)
        matched |= by_stem
        self.unmatched |= {keys[path]: reason for path, reason in reasons.items()}
        result: dict[str, str] = {}
        for path, name in matched.items():
            if name in result:
                raise UserError(f"{self.path} has several masks of {name!r}: {quoted([result[name], keys[path]])}")
            result[name] = keys[path]
        return result


def _file_stem(name: str) -> str:
    return composed(without_suffix(name.rpartition("/")[2]))


def decode_rle(value: Any, size: tuple[int, int]) -> np.ndarray:
    """Decodes a COCO RLE.

    Args:
        value: {"size": [height, width], "counts": compressed string or list of run lengths}.
        size: Height and width that the mask must have. They are compared before anything is allocated.

    Returns:
        bool [H, W].

    Raises:
        ValueError: If the value is something else, or of another size.
    """
    if not isinstance(value, dict) or not {"size", "counts"} <= set(value):
        raise ValueError('expected {"size": [height, width], "counts": ...}')
    given, counts = value["size"], value["counts"]
    if not isinstance(given, list) or [type(side) for side in given] != [int, int]:
        raise ValueError(f"size: expected [height, width], got {given!r:.60}")
    if tuple(given) != tuple(size):
        turned = "; it was made of the photo without its EXIF orientation" if tuple(given) == tuple(size[::-1]) else ""
        raise ValueError(f"the mask is {given!r:.60}, the upright photo {list(size)} (height, width){turned}")
    pixels = size[0] * size[1]
    if isinstance(counts, str):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and counts and all(type(run) is int and 0 <= run <= pixels for run in counts):
        runs = np.array(counts, np.int64)
    else:
        runs = None
    if runs is None or not cover(runs, pixels):
        raise ValueError(f"counts: expected run lengths of {pixels:,} pixels in all")
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[1], size[0])
    return np.ascontiguousarray(columns.T)
