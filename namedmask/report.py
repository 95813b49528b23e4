# SPDX-License-Identifier: MIT
"""The report of a run: one self-contained HTML page that shows which masks to trust and which not.

Masks are streamed. For each category only the scores, the best records and the lowest records are kept, so memory is a
few bytes per mask and the size of the page is bounded. The page depends on the run folder and the photos alone: the
same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import curation
from .archive import read_archive
from .config import to_toml
from .errors import DamagedFile
from .files import absolute, atomic_write, write_json
from .formats import encode
from .masks import Key, MaskRecord, has_shards, is_refined, mask_iou, read_masks
from .memory import MemoryBudget
from .pages import anchor, histogram, read_some_errors, script_json, template
from .pages.pictures import (
    BYTES_PER_PIXEL,
    Picture,
    data_uri,
    draw_thumbnail,
    overlay_uri,
    thumbnail_size,
)
from .photos import PhotoError, PhotoSource
from .record import read_config, read_record
from .review import read_review

MAX_THUMBNAILS = 1500  # on the page, unless two per category are more
PER_CATEGORY = 30
LARGE_PICTURES = 150  # on the page, besides the thumbnails
SHEETS = "sheets.json"  # in the run folder
CUTS = 100  # steps of the score slider

_LARGE_SIDE = 896  # maximum of a larger picture
_LARGE_BYTES = 150_000  # of a larger picture, as JPEG
_THREADS = 4
_LABELS = {"refined": "Expert", "masks": "Detector", "detected": "Detector, before refining"}


def write_report(out: str | os.PathLike[str], sheets: Mapping[str, str] | None = None) -> Path:
    """Writes `out`/report.html, the report of the run folder `out`.

    The page shows the masks of the category experts (`out`/refined) if they have finished, else those of the detector
    (`out`/masks). For each category it shows the best masks (by `score`, then `category_score`, then the order of the
    run) and the lowest ones, drawn over the photos, with a histogram of the scores; then the errors and the settings.
    It draws at most `PER_CATEGORY` masks per category and about `MAX_THUMBNAILS` in total. The masks of the other
    stages are drawn beside them. The first masks of each category, `LARGE_PICTURES` in total, have a larger picture:
    the part of the photo that shows the object, at most 896 pixels wide and high and 150 kB. If a photo cannot be
    shown any more, its tile says why.

    Masks can be accepted and rejected on the page. It begins with the verdicts of `out`/review.jsonl.

    Pictures of your own, such as contact sheets, can be shown before the masks. They are recorded in `out`/sheets.json
    together with a digest of the results: later reports of the same folder show them again until the results change.

    Args:
        out: Run folder.
        sheets: Path of each picture, relative to `out` -> its caption, in the order of the page. Missing pictures are
            left out. None: the recorded pictures.

    Returns:
        Path of the report.

    Raises:
        UserError: If stages.json or archive.json is missing, or if a file in the run folder is damaged.
    """
    out = Path(out)
    if sheets is not None:
        write_json(out / SHEETS, {"sheets": dict(sheets), "results": results_digest(out)})
    contents = Contents(out)
    pictures = _read_sheets(out)
    limit = _tiles_per_category(len(contents.categories))  # now all of them are known
    large = LARGE_PICTURES // max(1, len(contents.categories))
    chosen = [category.best_and_lowest(limit) for category in contents.categories.values()]
    shown = [record for best, lowest in chosen for record in (*best, *lowest)]
    enlarged = {record.key for best, lowest in chosen for record in [*best, *lowest][:large]}
    others = contents.other_masks({record.key for record in shown})
    tiles = _draw_all(contents.config.photos, shown, others, enlarged, contents.labels)
    galleries = [(list(islice(tiles, len(best))), list(islice(tiles, len(lowest)))) for best, lowest in chosen]
    images = {caption: data_uri(encode(picture, "jpeg", quality=88), "jpeg") for caption, picture in pictures.items()}
    page = contents.page(galleries=galleries, sheets=images)
    with atomic_write(out / "report.html") as file:
        file.writelines(chunk.encode() for chunk in page)
    return out / "report.html"


class Contents:
    """What the page of a run shows besides the masks themselves. One pass over the masks of each stage.

    Args:
        out: Run folder.
        read: Reads the best masks from their folder.

    Attributes:
        config: Settings of the run.
        folders: Folders of masks, those of the best ones first.
        labels: What the page calls the masks of each folder.
        categories: By name; those of the archive first.
        review: Verdicts by photo and category.
        scores: Scores of the masks in `review`.

    Raises:
        UserError: As `write_report`.
    """

    def __init__(self, out: Path, read: Callable[[Path], Iterable[MaskRecord]] = read_masks):
        self.out, self.config = out, read_config(out)
        names = ("refined", "masks", "detected") if is_refined(out) else ("masks", "detected")
        self.folders = [out / name for name in names if has_shards(out / name)]
        self.labels = [_LABELS[folder.name] for folder in self.folders]
        self.review = read_review(out)
        archive = read_archive(out / "archive.json")
        self.categories = {name: Category(name, len(archive.photos[name])) for name in archive.categories}
        limit = _tiles_per_category(len(self.categories))
        self.scores: dict[Key, float] = {}
        photos = array("q")  # hashes of the names: 8 bytes per mask
        for record in read(self.folders[0]) if self.folders else ():
            photos.append(hash(record.photo))
            # Merged or hand-edited runs may hold categories that the archive does not name.
            if record.category not in self.categories:
                self.categories[record.category] = Category(record.category, 0)
            self.categories[record.category].add(record, limit)
            if record.key in self.review:
                self.scores[record.key] = record.score
        self.photo_count = np.unique(photos).size

    @property
    def is_refined(self) -> bool:
        """Whether the best masks are those of the experts."""
        return bool(self.folders) and self.folders[0].name == "refined"

    @property
    def has_choice(self) -> bool:
        """Whether the detector's mask can be chosen instead of the expert's."""
        return self.is_refined and self.out / "masks" in self.folders

    @property
    def dropped(self) -> dict[str, str]:
        """How many photos have lost their places in the archive and why; {} if none has."""
        path = self.out / curation.FILE
        reasons = Counter(one.reason for one in curation.read_dropped(path)) if path.exists() else {}
        return {"dropped from the archive": f"{curation.summary(reasons)}, see {curation.FILE}"} if reasons else {}

    def other_masks(self, keys: Set[Key]) -> list[dict[Key, MaskRecord]]:
        """The masks with these keys in each of `folders` but the first."""
        return [{one.key: one for one in read_masks(folder) if one.key in keys} for folder in self.folders[1:]]

    def page(
        self,
        galleries: list[tuple[list[Tile], list[Tile]]] | None = None,
        sheets: Mapping[str, str] = {},
        note: str = "",
    ) -> Iterator[str]:
        """The page, in parts.

        Args:
            galleries: The best and the lowest masks of each category; None: the page asks the server for them.
            sheets: Data URI of each picture by its caption.
            note: A line below the title.
        """
        categories = list(self.categories.values())
        scores = np.concatenate([np.zeros(0), *(np.asarray(category.scores) for category in categories)])
        low, high = (0.0, 1.0) if not scores.size else (min(0.0, scores.min()), max(1.0, scores.max()))
        cuts = [round(low + step * (high - low) / CUTS, 4) for step in range(CUTS + 1)]
        record, maker = read_record(self.out), "experts" if self.is_refined else "pseudolabel"
        errors, error_count = read_some_errors(self.out / "errors.jsonl")
        return template("report.html.j2").generate(
            title=Path(absolute(self.out)).name,
            note=note,
            photos=self.config.photos,
            refined=self.is_refined,
            has_choice=self.has_choice,
            labels=self.labels,
            served=galleries is None,
            facts={**(record.stages[maker].made_with if maker in record.stages else {}), **self.dropped},
            settings=to_toml(self.config).splitlines(),
            photo_count=self.photo_count,
            mask_count=scores.size,
            empty_count=sum(category.empty for category in categories),
            mean=scores.mean() if scores.size else None,
            histogram=histogram(scores, low, high),
            low=low,
            high=high,
            categories=[
                {
                    "name": category.name,
                    "archived": category.archived,
                    "count": len(category.scores),
                    "empty": category.empty,
                    "mean": np.mean(category.scores) if category.scores else None,
                    "histogram": histogram(category.scores, low, high),
                    "hint": self._category_hint(category),
                    "best": galleries[number][0] if galleries else [],
                    "lowest": galleries[number][1] if galleries else [],
                }
                for number, category in enumerate(categories)
            ],
            hint=self.hint,
            errors=errors,
            error_count=error_count,
            sheets=sheets,
            data=script_json(
                {
                    "served": galleries is None,
                    "cuts": cuts,
                    # Per category: its name, and how many masks have a score of at least each of `cuts`.
                    "categories": [[category.name, category.counts(cuts)] for category in categories],
                    # Photo, category, verdict and score; null for a verdict about a mask that the run does not have.
                    "review": [[*key, verdict, self.scores.get(key)] for key, verdict in self.review.items()],
                }
            ),
        )

    def hint(self, record: MaskRecord) -> str:
        """What could improve this mask; "" if nothing is known."""
        problem = problem_of(record)
        return f"{problem}: {remedy}" if problem and (remedy := self._remedy(problem)) else ""

    def _category_hint(self, category: Category) -> str:
        """A hint about a problem that a fifth of the masks of a category have."""
        for problem, count in category.problems.most_common(1):
            if count >= max(2, len(category.scores) / 5) and (remedy := self._remedy(problem)):
                return f"{count:,} of {len(category.scores):,} masks: {problem}; {remedy}"
        return ""

    def _remedy(self, problem: str) -> str:
        if self.is_refined:  # trained on the detector's masks: the options below act before that
            return "compare it with the detector's" if self.has_choice else ""
        if problem == TINY:
            return "try a larger --image-size"
        if problem == FRAMES and not self.config.refine.largest_component:
            return "try --largest-component"
        return "try another --detector"


# Problems that show in the fields of a record.
EMPTY, FRAMES, TINY = "no object found", "frames the photo", "tiny object"


def problem_of(record: MaskRecord) -> str:
    """The problem that the fields of a record show, or "".

    A mask that reaches all four sides, but covers less than 60% of the photo, is seldom an object.
    """
    height, width = record.size
    if not record.area:
        return EMPTY
    if tuple(record.bbox) == (0, 0, width, height) and record.area < 0.6 * height * width:
        return FRAMES
    return TINY if record.area < 0.002 * height * width else ""


def iou(a: MaskRecord, b: MaskRecord) -> float | None:
    """The IoU of two masks of a photo, 1 if both are empty; None if the photo had different sizes."""
    return mask_iou(a, b) if a.size == b.size else None


def results_digest(out: Path) -> str:
    """Returns a SHA-256 digest of the archive, the masks and the segmenter of a run folder, as far as they exist."""
    digest = hashlib.sha256()
    for pattern in ("archive.json", "masks/*.jsonl", "refined/*.jsonl", "segmenter/model.safetensors"):
        for path in sorted(out.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_sheets(out: Path) -> dict[str, Image.Image]:
    """The pictures recorded in sheets.json by caption; none if the results are not those that were recorded.

    Raises DamagedFile if the file or a picture is damaged.
    """
    if not (out / SHEETS).exists():
        return {}
    try:
        record = json.loads((out / SHEETS).read_bytes())
        sheets = {str(name): str(caption) for name, caption in record["sheets"].items()}
        if record["results"] != results_digest(out):
            return {}
        paths = {caption: out / name for name, caption in sheets.items()}
        return {caption: Image.open(path).convert("RGB") for caption, path in paths.items() if path.exists()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "delete it; the report is written without these pictures"
        raise DamagedFile(out / SHEETS, error, remedy=remedy) from None


class Category:
    """What is kept of a category while its masks are streamed."""

    def __init__(self, name: str, archived: int):
        self.name = name
        self.archived = archived  # number of photos in the archive
        self.scores = array("d")
        self.empty = 0
        self.problems: Counter[str] = Counter()
        self._best: list[tuple[tuple, MaskRecord]] = []
        self._lowest: list[tuple[tuple, MaskRecord]] = []

    def add(self, record: MaskRecord, limit: int) -> None:
        # The number of the mask makes every key unique: the earlier mask wins ties, and records are never compared.
        number = len(self.scores)
        self.scores.append(record.score)
        self.empty += record.area == 0
        if problem := problem_of(record):
            self.problems[problem] += 1
        for heap, key in (
            (self._best, (*record.rank, -number)),
            (self._lowest, (*(-part for part in record.rank), number)),
        ):
            if len(heap) < limit:
                heapq.heappush(heap, (key, record))
            else:
                heapq.heappushpop(heap, (key, record))

    def counts(self, cuts: list[float]) -> list[int]:
        """How many masks have a score of at least each of these, in ascending order."""
        return (len(self.scores) - np.searchsorted(np.sort(self.scores), cuts)).tolist()

    def best_and_lowest(self, limit: int) -> tuple[list[MaskRecord], list[MaskRecord]]:
        """The best and the lowest masks, each list best first; at most `limit` in total, no mask in both."""
        lowest = min(max(1, limit // 5), len(self.scores) // 5)
        best = min(limit, len(self.scores)) - lowest
        return (
            [record for _, record in sorted(self._best, key=lambda item: item[0], reverse=True)[:best]],
            [record for _, record in sorted(self._lowest, key=lambda item: item[0])[len(self._lowest) - lowest :]],
        )


class View(NamedTuple):
    """The mask of a stage, drawn for the size of a thumbnail, and for that of the larger picture if there is one.

    `overlay` and `large` are data URIs or URLs, "" for an empty mask. `iou` is that with the mask of the tile.
    """

    label: str
    score: float
    iou: float | None
    overlay: str = ""
    large: str = ""


class Tile(NamedTuple):
    """A mask on the page. `problem` is the reason if there is no picture. The first of `views` is the mask itself."""

    record: MaskRecord
    thumbnail: Picture | None = None
    views: Sequence[View] = ()
    large: Picture | None = None
    problem: str = ""

    @property
    def id(self) -> str:
        return anchor(self.record.category, self.record.photo)

    @property
    def key(self) -> str:
        """Photo and category as JSON, in ASCII."""
        return json.dumps(self.record.key).replace("\x7f", "\\u007f")

    @property
    def has_choice(self) -> bool:
        """Whether the detector's mask can be chosen instead."""
        return any(view.label == _LABELS["masks"] for view in self.views[1:])


def _tiles_per_category(categories: int) -> int:
    return max(2, min(PER_CATEGORY, MAX_THUMBNAILS // max(1, categories)))


def _draw_all(
    photos: str,
    records: list[MaskRecord],
    others: Sequence[Mapping[Key, MaskRecord]] = (),
    enlarged: Set[Key] = frozenset(),
    labels: Sequence[str] = ("Detector",),
) -> Iterator[Tile]:
    """The tiles of the records, in the same order. A photo with several masks is decoded once.

    Args:
        photos: Path of the photos.
        records: The masks.
        others: Masks of other stages by photo and category.
        enlarged: The masks that have a larger picture.
        labels: Names of the stages, that of `records` first.
    """
    by_photo: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_photo.setdefault(record.photo, []).append(number)
    try:
        source = PhotoSource(photos)
    except ValueError as error:
        problem = str(error)
        return (Tile(record, problem=problem) for record in records)

    budget = MemoryBudget()

    def draw(numbers: list[int]) -> list[Tile]:
        height, width = records[numbers[0]].size
        masks = []
        for record in (records[number] for number in numbers):
            found = [
                (label, one[record.key]) for label, one in zip(labels[1:], others, strict=True) if record.key in one
            ]
            masks.append([(labels[0], record), *found])
        with budget.hold(height * width * BYTES_PER_PIXEL):
            return _draw(source, masks, enlarged)

    tiles: dict[int, Tile] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for numbers, drawn in zip(by_photo.values(), pool.map(draw, by_photo.values()), strict=True):
            tiles.update(zip(numbers, drawn, strict=True))
    return (tiles[number] for number in range(len(records)))


def _draw(
    source: PhotoSource, masks: list[list[tuple[str, MaskRecord]]], enlarged: Set[Key] = frozenset()
) -> list[Tile]:
    """The tiles of one photo. Each of `masks` has the mask of the tile, then those of other stages, with labels."""
    records = [one[0][1] for one in masks]
    try:
        pixels = source.decode(records[0].photo).pixels
    except PhotoError as error:
        return [Tile(record, problem=error.reason) for record in records]
    thumbnail = Picture(data_uri(draw_thumbnail(pixels), "jpeg"), *thumbnail_size(pixels.shape[:2]))
    tiles = []
    for record, labeled in zip(records, masks, strict=True):
        if problem := changed(record, pixels):
            tiles.append(Tile(record, problem=problem))
            continue
        try:
            large = _enlarge(pixels, [one for _, one in labeled]) if record.key in enlarged else None
            views = []
            for label, one in labeled:
                if one.size != record.size:
                    continue
                mask = one.mask()
                overlay = overlay_uri(mask, (thumbnail.width, thumbnail.height)) if one.area else ""
                view = View(label, one.score, None if one is record else iou(record, one), overlay)
                if large and one.area:
                    picture, (left, top, right, bottom) = large
                    part = mask[top:bottom, left:right]
                    view = view._replace(large=overlay_uri(part, (picture.width, picture.height)))
                views.append(view)
            tiles.append(Tile(record, thumbnail, views, large[0] if large else None))
        except ValueError:
            tiles.append(Tile(record, problem="the mask is damaged"))
    return tiles


def changed(record: MaskRecord, pixels: np.ndarray) -> str:
    """Why a mask cannot be drawn over these pixels, or ""."""
    height, width = pixels.shape[:2]
    if record.size == (height, width):
        return ""
    return f"the photo has changed: the mask is {record.size[1]} x {record.size[0]}, the photo {width} x {height}"


def _enlarge(pixels: np.ndarray, records: list[MaskRecord]) -> tuple[Picture, tuple[int, int, int, int]]:
    """The part of a photo that shows the object by any of its masks, with a margin, and its box: left, top, right,
    bottom. Its size is that of the photo, unless that is too much for a page."""
    height, width = pixels.shape[:2]
    boxes = [one.bbox for one in records if one.area and one.size == (height, width)] or [(0, 0, width, height)]
    left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes)
    right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    margin = 16 + max(right - left, bottom - top) // 8
    left, top = max(0, left - margin), max(0, top - margin)
    right, bottom = min(width, right + margin), min(height, bottom + margin)
    image = Image.fromarray(pixels[top:bottom, left:right])
    image.thumbnail((_LARGE_SIDE, _LARGE_SIDE), Image.Resampling.LANCZOS, reducing_gap=2)
    data = encode(image, "jpeg", quality=85)
    while len(data) > _LARGE_BYTES:
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)
        data = encode(image, "jpeg", quality=75)
    picture = Picture(
        data_uri(data, "jpeg"),
        *image.size,
        share=image.width / (right - left),
        part=(left, top, right, bottom) != (0, 0, width, height),
    )
    return picture, (left, top, right, bottom)
