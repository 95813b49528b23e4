# SPDX-License-Identifier: MIT
"""The data set that is written: photos with their masks, in splits, wherever they come from.

Masks are read once. Those that remain after the selection are kept in a temporary file, from which each photo takes its
own, so that memory holds neither masks nor photos.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import UserError, counted
from ..files import fitted, name_digest, writing
from ..formats import encode, read_label_map
from ..masks import RESIZED, ErrorRecord, Key, MaskRecord
from ..photos import SEGMENT_RECORD, PhotoError, open_source
from ..record import FILE, read_record
from ..review import Review, current_masks, read_review, warn_of_others
from ..segmenter.folder import mask_path, read_scores, segmented_categories, segmented_photos
from ..selection import Selection, select
from ..suffixes import SUFFIXES
from ..threads import map_ahead, thread_count

if TYPE_CHECKING:
    from PIL import Image

    from . import Options, PhotoMode

TRAIN, VAL, TEST = "train", "val", "test"
MAX_NAME = 200  # bytes of NAME
JPEG_QUALITY = 95
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Item:
    """A photo with its masks.

    Attributes:
        photo: Name of the photo in its source.
        name: NAME of its files in the data set: unique, without folders and suffix.
        file: NAME with the suffix of the photo's format.
        split: train, val or test.
        size: (height, width) of the upright photo.
        number: Number of the photo, from 1, over all splits.
        first: Number of its first mask, from 1, over all splits.
        masks: Its masks, none of them empty, in the order of the run.
    """

    photo: str
    name: str
    file: str
    split: str
    size: tuple[int, int]
    number: int
    first: int
    masks: Sequence[MaskRecord]


@dataclass(slots=True)
class _Entry:
    """What is held in memory of a photo."""

    photo: str
    size: tuple[int, int]
    places: list[tuple[int, int]]  # offset and length of its masks in the temporary file
    split: str = TRAIN
    name: str = ""
    number: int = 0
    first: int = 0
    rotated: bool = False
    suffix: str = ""


class Dataset:
    """The photos and masks of a run or of a folder of `namedmask segment`, to be written into a folder.

    Use it as a context manager. A photo without any mask left is left out, except photos in which `segment` found
    nothing: they are examples of background.

    Attributes:
        folder: The folder to write.
        options: The options.
        source: The photos.
        categories: Names of classes 1, 2, ...
        ids: The class of each category.
        has_scores: Whether masks have scores.
        splits: Names of photos by split, in the order of the run.
        masks: Number of masks.
        left_out: Number of masks that the selection has left out.
        rejected: Number of masks that the review has left out.
        errors: Photos that cannot be used, with the reason.
        root: Folder that `reference` starts from, if the data set refers to the photos where they are.

    Raises:
        UserError: If `path` is neither a run nor a folder of `segment`, if photos are not found or lie in tars and
            `mode` is "path" or "link", or if options do not fit.
    """

    def __init__(
        self, path: Path, folder: Path, mode: PhotoMode, options: Options, photos: str | os.PathLike | None = None
    ):
        self.folder, self.mode, self.options = folder, mode, options
        self.errors: list[ErrorRecord] = []
        self.rejected = 0
        with ExitStack() as stack:
            with writing(folder):  # unbuffered: after an error, closing it would write the rest and fail again
                self._file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            review: Review = {}
            empty: dict[str, tuple[int, int]] = {}  # sizes of photos without masks
            self.has_scores = True
            if (path / FILE).exists():
                recorded, self.categories, review = read_record(path).photos, _run_categories(path), read_review(path)
                records: Iterable[MaskRecord] = current_masks(path, review)
            elif (path / SEGMENT_RECORD).exists():
                recorded, self.categories = read_record(path, SEGMENT_RECORD).photos, segmented_categories(path)
                self.has_scores = (path / "scores.jsonl").exists()
                records = self._segmented(path, empty)
            else:
                raise UserError(f"{path} is neither a run folder nor the --out of `namedmask segment`")
            if not self.has_scores and options.selection != Selection():
                raise UserError(f"{path} has no scores.jsonl, so masks cannot be chosen by score; segment them again")
            try:
                self.source = open_source(photos or recorded or "")
            except UserError as error:
                raise (
                    error if photos else UserError(f"{error}; if they have moved, say where they are (--photos)")
                ) from None
            self.ids = {name: number for number, name in enumerate(self.categories, 1)}
            entries = self._choose(path, records, review, empty)
            self.splits: dict[str, list[str]] = {}
            self._entries = self._usable(entries)
            self._arrange()
            self.root = self.source.root
            # Readers that look below a folder do not find such names of a list.
            self._moves_root = any(photo[:1] == "/" or ".." in photo.split("/") for photo in self._entries)
            if mode == "path" and self._moves_root:
                self.root = os.path.commonpath({os.path.dirname(self._resolved(photo)) for photo in self._entries})  # noqa: PTH120
            self._stack = stack.pop_all()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def map(self, function: Callable[[Item], _Result], split: str | None = None) -> Iterator[_Result]:
        """Yields `function(item)` for the photos of a split, or of all, in order; it is called in several threads."""
        entries = (self._entries[photo] for one in ([split] if split else self.splits) for photo in self.splits[one])
        return map_ahead(lambda entry: function(self._item(entry)), entries, thread_count())

    def label_map(self, item: Item, objects: bool = False) -> np.ndarray:
        """The class of every pixel of a photo, uint16 [height, width]; 0 is the background.

        Where masks overlap, the one with the highest score counts, then the highest `category_score`, then the earlier
        one.

        Args:
            item: The photo.
            objects: The number of the mask of every pixel, from 1, instead of its class.
        """
        labels = np.zeros(item.size, np.uint16)

        for number in sorted(range(len(item.masks)), key=lambda number: (*item.masks[number].rank, -number)):
            record = item.masks[number]
            labels[record.mask()] = number + 1 if objects else self.ids[record.category]
        return labels

    def photo_bytes(self, item: Item) -> bytes:
        """The file of a photo, upright if the options ask for it."""
        with _expect_unchanged():
            if not self.options.upright or not self._entries[item.photo].rotated:
                return self.source.read(item.photo)
            with self.source.image(item.photo) as (image, _):
                return _upright(image)

    def pixels(self, item: Item) -> np.ndarray:
        """The pixels of a photo, upright, uint8 [height, width, 3]."""
        with _expect_unchanged():
            return self.source.decode(item.photo).pixels

    @property
    def rotated(self) -> list[str]:
        """Names of photos that the data set stores rotated, as their files do; complete when all are placed."""
        return [] if self.options.upright else [entry.photo for entry in self._entries.values() if entry.rotated]

    def place(self, item: Item, path: Path, data: bytes | None = None) -> None:
        """Puts a photo into the data set, as a link or as a file.

        Args:
            item: The photo.
            path: Path of the photo.
            data: Its bytes, upright, if they differ from those of its file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        turn = self.options.upright and self._entries[item.photo].rotated
        if data is not None:
            self._entries[item.photo].rotated = False
        with writing(path):
            if data is not None or self.mode == "copy" or turn:
                path.write_bytes(self.photo_bytes(item) if data is None else data)
            else:
                file = self.source.file(item.photo)
                assert file is not None  # checked before
                path.symlink_to(Path(file).absolute())

    def write(self, path: str, data: bytes) -> None:
        """Writes a file of the data set."""
        file = self.folder / path
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def write_json(self, path: str, value: object) -> None:
        """Writes a small JSON file, in ASCII."""
        self.write(path, json.dumps(value, indent=1).encode() + b"\n")

    def write_lines(
        self, path: str, lines: Iterable[str], begin: str = "", between: str = "\n", end: str = "\n"
    ) -> None:
        """Writes a text file line by line, in UTF-8."""
        file = self.folder / path
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8", newline="\n") as text:
                text.write(begin)
                for number, line in enumerate(lines):
                    text.write((between if number else "") + line)
                text.write(end)

    def reference(self, item: Item) -> str:
        """Puts a photo into images/ unless the data set refers to it where it is.

        Returns:
            Its path: below `root`, or below images/.
        """
        if self.mode == "path":
            return os.path.relpath(self._resolved(item.photo), self.root) if self._moves_root else item.photo
        self.place(item, self.folder / "images" / item.split / item.file)
        return f"{item.split}/{item.file}"

    def _segmented(self, path: Path, empty: dict[str, tuple[int, int]]) -> Iterator[MaskRecord]:
        """The masks in the label maps of `segment`; photos in which it has found nothing go into `empty`."""
        scores = read_scores(path)

        def records_of(item: tuple[str, str]) -> tuple[str, tuple[int, int], list[MaskRecord]] | None:
            photo, name = item
            if not (file := mask_path(path, name)).exists():
                return None
            labels = read_label_map(file)
            found = [int(label) for label in np.unique(labels) if label]
            if found and found[-1] > len(self.categories):
                raise UserError(f"{file} has class {found[-1]}; its categories end with class {len(self.categories)}")
            records = []
            for label in found:
                category = self.categories[label - 1]
                found_score = scores[photo].categories.get(category) if photo in scores else None
                score = found_score.confidence if found_score else 1.0
                records.append(MaskRecord.from_mask(photo, labels == label, category, None, score))
            return photo, (labels.shape[0], labels.shape[1]), records

        photos = segmented_photos(path).items()
        for (photo, _), result in zip(photos, map_ahead(records_of, photos, thread_count()), strict=True):
            if result is None:
                self.errors.append(ErrorRecord(photo, "convert", "it has no mask"))
                continue
            _, size, records = result
            if not records:
                empty[photo] = size
            yield from records

    def _choose(
        self, path: Path, records: Iterable[MaskRecord], review: Review, empty: dict[str, tuple[int, int]]
    ) -> list[_Entry]:
        """Writes masks into the temporary file and selects those to use."""
        places: list[tuple[int, int]] = []
        reviewed: set[Key] = set()
        blank = 0

        def light() -> Iterator[MaskRecord]:
            """The records without their masks: `area` is the number of the mask in `places` instead."""
            nonlocal blank
            end = 0
            for record in records:
                if record.key in review:
                    reviewed.add(record.key)
                if not record.area:
                    blank += 1
                    continue
                if review.get(record.key) == "reject":
                    self.rejected += 1
                    continue
                if record.category not in self.ids:
                    raise UserError(f"{path} has a mask of {record.category!r}, which is none of its categories")
                self._append(line := record.to_json().encode())
                places.append((end, len(line)))
                end += len(line)
                yield replace(record, rle="", area=len(places) - 1)

        chosen = select(light(), self.options.selection, review)
        warn_of_others(path, review, reviewed)
        self.left_out = len(places) - len(chosen)
        entries: dict[str, _Entry] = {}
        if not places and not empty:
            if self.rejected:
                raise UserError(f"no mask of {path} is left: its review.jsonl rejects them")
            if blank:
                raise UserError(f"all masks of {path} are empty, so there is nothing to convert")
            raise UserError(f"{path} has no masks; `namedmask run` makes them")
        if not chosen and not empty:
            raise UserError(f"none of {counted(len(places), 'mask')} of {path} is chosen; lower --min-score")
        for record in chosen:
            entry = entries.setdefault(record.photo, _Entry(record.photo, record.size, []))
            entry.places.append(places[record.area])
        entries |= {photo: _Entry(photo, size, []) for photo, size in empty.items()}
        return list(entries.values())

    def _resolved(self, photo: str) -> str:
        """The path of the file of a photo, without ".." and links to folders."""
        folder, name = os.path.split(self.source.file(photo) or "")
        return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118

    def _append(self, data: bytes) -> None:
        """Writes to the end of the temporary file."""
        with writing(self.folder):
            while data:
                data = data[self._file.write(data) :]

    def _usable(self, entries: list[_Entry]) -> dict[str, _Entry]:
        """The photos that can be used. Notes which ones are rotated."""

        def check(entry: _Entry) -> str | None:
            try:
                size, entry.rotated, kind = self.source.layout(entry.photo)
                entry.suffix = SUFFIXES[kind]
                return None if size == entry.size else RESIZED
            except PhotoError as error:
                return error.reason

        usable: dict[str, _Entry] = {}
        for entry, problem in zip(entries, map_ahead(check, entries, thread_count()), strict=True):
            if problem:
                self.errors.append(ErrorRecord(entry.photo, "convert", problem))
                continue
            if self.mode in ("path", "link") and self.source.file(entry.photo) is None:
                raise UserError(f"{entry.photo} is in a tar or at a URL, where other tools do not find it: add --copy")
            usable[entry.photo] = entry
        return usable

    def _arrange(self) -> None:
        """Assigns splits, names and numbers."""
        splits = split_photos(list(self._entries), self.options.split, self.options.seed)
        taken: set[str] = set()
        number, first = 1, 1
        for entry in self._entries.values():
            entry.split, entry.name = splits[entry.photo], file_name(entry.photo, taken)
        shares = self.options.split or (1, 0, 0)
        self.splits = {one: [] for one, share in zip((TRAIN, VAL, TEST), shares, strict=True) if share}
        for entry in self._entries.values():
            self.splits[entry.split].append(entry.photo)
        for photos in self.splits.values():
            for photo in photos:
                entry = self._entries[photo]
                entry.number, entry.first = number, first
                number, first = number + 1, first + len(entry.places)
        self.masks = first - 1

    def _item(self, entry: _Entry) -> Item:
        lines = [os.pread(self._file.fileno(), length, offset) for offset, length in entry.places]
        masks = list(map(MaskRecord.from_json, lines))
        if self.options.largest_part:
            masks = list(map(_largest_part, masks))
        file = entry.name + entry.suffix
        return Item(entry.photo, entry.name, file, entry.split, entry.size, entry.number, entry.first, masks)


def file_name(photo: str, taken: set[str]) -> str:
    """NAME of the files of a photo, which is added to those that are taken.

    It is the photo's name without its suffix. Characters other than letters, digits, "-" and "_" become "_", the "/" of
    folders included. If another photo has that NAME, or if it is too long, "~" and a digest of the photo's name follow.
    """
    stem = os.path.splitext(photo)[0]  # noqa: PTH122 (names are kept byte by byte)
    name = re.sub(r"[^\w-]", "_", stem)
    if len(name.encode()) > MAX_NAME or name.lower() in taken:
        name = f"{fitted(name, MAX_NAME - 20).partition('~')[0]}~{name_digest(photo)}"
    taken.add(name.lower())  # some file systems ignore case
    return name


def split_photos(photos: Sequence[str], shares: tuple[float, float, float] | None, seed: int = 0) -> dict[str, str]:
    """Assigns photos to train, val and test.

    Photos are sorted by a hash of seed and name and cut at the shares: the result depends on the names alone, not on
    their order, and a few more photos move few others.

    Args:
        photos: Names of photos.
        shares: Shares of train, val and test, which sum to 1; None: all photos are in train.
        seed: Seed.

    Returns:
        The split of each photo.

    Raises:
        UserError: If the shares do not sum to 1, or if a split would be empty.
    """
    if shares is None:
        return dict.fromkeys(photos, TRAIN)
    if len(shares) != 3 or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:  # NaN is neither
        raise UserError(f"--split {' '.join(map(str, shares))}: expected three shares that sum to 1, such as .8 .1 .1")

    def key(photo: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{photo}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    ranked = sorted(photos, key=key)
    result: dict[str, str] = {}
    first = 0
    for share, end, split in zip(shares, np.cumsum(shares), (TRAIN, VAL, TEST), strict=True):
        last = round(end * len(ranked))
        if share and ranked and last == first:
            count = counted(len(ranked), "photo")
            raise UserError(f"--split: of {count}, {split} would have none; choose other shares")
        result |= dict.fromkeys(ranked[first:last], split)
        first = last
    return result


def printable(text: str) -> str:
    """Text that every format can hold: bytes of names that are not UTF-8, and characters that XML or YAML cannot
    represent, are escaped as in JSON."""
    return _NOT_TEXT.sub(lambda character: f"\\u{ord(character[0]):04x}", text)


def _largest_part(record: MaskRecord) -> MaskRecord:
    import namedmask_kernels as nk

    mask = np.asarray(nk.largest_component(record.mask())).astype(bool)
    return MaskRecord.from_mask(record.photo, mask, record.category, record.category_score, record.score)


@contextmanager
def _expect_unchanged() -> Iterator[None]:
    try:
        yield
    except PhotoError as error:
        raise UserError(f"{error}; replace or remove it, and run the same command again") from None


def _upright(image: Image.Image) -> bytes:
    """Rotates a photo by its EXIF orientation and encodes it in its format again."""
    from PIL import ImageOps

    kind, profile = image.format or "", image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    options: dict[str, Any] = {"quality": JPEG_QUALITY}
    if kind == "WEBP":
        options = {"lossless": True}
    elif kind == "TIFF" and "jpeg" not in str(upright.info.get("compression")):  # others have no quality
        options = {}
    return encode(upright, kind, icc_profile=profile, **options)


def _run_categories(path: Path) -> list[str]:
    from ..archive import read_archive

    return read_archive(path / "archive.json").categories
