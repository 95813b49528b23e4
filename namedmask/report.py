# SPDX-License-Identifier: MIT
"""The report of a run: one self-contained HTML page that shows which masks to trust and which not.

Masks are streamed. For each category only the scores, the best records and the lowest records are kept, so memory is a
few bytes per mask and the size of the page is bounded. The page depends on the run folder and the photos alone: the
same run gives the same bytes.
"""

import base64
import hashlib
import heapq
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from .archive import read_archive
from .config import to_toml
from .errors import DamagedFile
from .files import absolute, atomic_write
from .masks import ErrorRecord, MaskRecord, best_masks, read_errors, read_masks
from .memory import MemoryBudget
from .photos import PhotoError, PhotoSource
from .record import read_config, read_record

MAX_THUMBNAILS = 1500  # on the page, unless two per category are more
PER_CATEGORY = 30
ERRORS_SHOWN = 200
SHEETS = "sheets.json"  # in the run folder

_SIDE = 224  # pixels of the longer side of a thumbnail
_BINS = 20
_THREADS = 4
_BYTES_PER_PIXEL = 24  # of a photo while it is decoded, or reduced together with its mask
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Any single color is invisible on some photo. Therefore the background is dimmed and the outline is black and white.
_BACKGROUND, _OBJECT, _LIGHT, _DARK = range(4)
_PALETTE = [0, 0, 0, 255, 40, 140, 255, 255, 255, 0, 0, 0]
_OPACITY = bytes([80, 72, 255, 200])


def write_report(out: str | os.PathLike[str], sheets: Mapping[str, str] | None = None) -> Path:
    """Writes `out`/report.html, the report of the run folder `out`.

    The page shows the masks of the category experts (`out`/refined) if they have finished, else those of the detector
    (`out`/masks). For each category it shows the best masks (by `score`, then `category_score`, then the order of the
    run) and the lowest ones, drawn over the photos, with a histogram of the scores; then the errors and the settings.
    It draws at most `PER_CATEGORY` masks per category and about `MAX_THUMBNAILS` in total. If a photo cannot be shown
    any more, its tile says why.

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
        with atomic_write(out / SHEETS) as file:
            file.write(json.dumps({"sheets": dict(sheets), "results": results_digest(out)}, indent=1).encode())
    config, masks = read_config(out), best_masks(out)
    archive = read_archive(out / "archive.json")
    categories = {name: _Category(name, len(archive.photos[name])) for name in archive.categories}
    photo_count = _collect(read_masks(masks), categories)
    errors, error_count = _read_errors(out / "errors.jsonl")
    pictures = _read_sheets(out)

    # Merged or hand-edited runs may hold categories that the archive does not name. Now all of them are known.
    limit = _tiles_per_category(len(categories))
    chosen = [(category, *category.best_and_lowest(limit)) for category in categories.values()]
    tiles = _draw_all(config.photos, [record for _, best, lowest in chosen for record in (*best, *lowest)])
    scores = np.concatenate([np.zeros(0), *(np.asarray(category.scores) for category in categories.values())])
    low, high = (0.0, 1.0) if not scores.size else (min(0.0, scores.min()), max(1.0, scores.max()))

    record, maker = read_record(out), "experts" if masks.name == "refined" else "pseudolabel"
    page = _template().generate(
        title=Path(absolute(out)).name,
        photos=config.photos,
        refined=masks.name == "refined",
        facts=record.stages[maker].made_with if maker in record.stages else {},
        settings=to_toml(config).splitlines(),
        photo_count=photo_count,
        mask_count=scores.size,
        empty_count=sum(category.empty for category in categories.values()),
        mean=scores.mean() if scores.size else None,
        histogram=_histogram(scores, low, high),
        low=low,
        high=high,
        categories=[
            {
                "name": category.name,
                "archived": category.archived,
                "count": len(category.scores),
                "empty": category.empty,
                "mean": np.mean(category.scores) if category.scores else None,
                "histogram": _histogram(category.scores, low, high),
                "best": list(islice(tiles, len(best))),
                "lowest": list(islice(tiles, len(lowest))),
            }
            for category, best, lowest in chosen
        ],
        errors=errors,
        error_count=error_count,
        sheets={caption: _data_uri(picture, "jpeg", quality=88) for caption, picture in pictures.items()},
    )
    with atomic_write(out / "report.html") as file:
        file.writelines(chunk.encode() for chunk in page)
    return out / "report.html"


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


class _Category:
    """What is kept of a category while its masks are streamed."""

    def __init__(self, name: str, archived: int):
        self.name = name
        self.archived = archived  # number of photos in the archive
        self.scores = array("d")
        self.empty = 0
        self._best: list[tuple[tuple, MaskRecord]] = []
        self._lowest: list[tuple[tuple, MaskRecord]] = []

    def add(self, record: MaskRecord, limit: int) -> None:
        category_score = -np.inf if record.category_score is None else record.category_score
        # The number of the mask makes every key unique: the earlier mask wins ties, and records are never compared.
        number = len(self.scores)
        self.scores.append(record.score)
        self.empty += record.area == 0
        for heap, key in (
            (self._best, (record.score, category_score, -number)),
            (self._lowest, (-record.score, -category_score, number)),
        ):
            if len(heap) < limit:
                heapq.heappush(heap, (key, record))
            else:
                heapq.heappushpop(heap, (key, record))

    def best_and_lowest(self, limit: int) -> tuple[list[MaskRecord], list[MaskRecord]]:
        """The best and the lowest masks, each list best first; at most `limit` in total, no mask in both."""
        lowest = min(max(1, limit // 5), len(self.scores) // 5)
        best = min(limit, len(self.scores)) - lowest
        return (
            [record for _, record in sorted(self._best, key=lambda item: item[0], reverse=True)[:best]],
            [record for _, record in sorted(self._lowest, key=lambda item: item[0])[len(self._lowest) - lowest :]],
        )


class _Tile(NamedTuple):
    """A mask on the page. `image` and `overlay` are data URIs; `problem` is the reason if there is no image."""

    record: MaskRecord
    width: int = 0
    height: int = 0
    image: str = ""
    overlay: str = ""
    problem: str = ""


def _tiles_per_category(categories: int) -> int:
    return max(2, min(PER_CATEGORY, MAX_THUMBNAILS // max(1, categories)))


def _collect(records: Iterable[MaskRecord], categories: dict[str, _Category]) -> int:
    """Adds the records to their categories and returns the number of distinct photos."""
    limit = _tiles_per_category(len(categories))
    photos = array("q")  # hashes of the names: 8 bytes per mask
    for record in records:
        photos.append(hash(record.photo))
        if record.category not in categories:
            categories[record.category] = _Category(record.category, 0)
        categories[record.category].add(record, limit)
    return np.unique(photos).size


def _read_errors(path: Path) -> tuple[list[ErrorRecord], int]:
    """The first `ERRORS_SHOWN` errors of a run and the total number."""
    if not path.exists():
        return [], 0
    errors = read_errors(path)
    shown = list(islice(errors, ERRORS_SHOWN))
    return shown, len(shown) + sum(1 for _ in errors)


def _draw_all(photos: str, records: list[MaskRecord]) -> Iterator[_Tile]:
    """The tiles of the records, in the same order. A photo with several masks is decoded once."""
    by_photo: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_photo.setdefault(record.photo, []).append(number)
    try:
        source = PhotoSource(photos)
    except ValueError as error:
        problem = str(error)
        return (_Tile(record, problem=problem) for record in records)

    budget = MemoryBudget()

    def draw(numbers: list[int]) -> list[_Tile]:
        height, width = records[numbers[0]].size
        with budget.hold(height * width * _BYTES_PER_PIXEL):
            return _draw(source, [records[number] for number in numbers])

    tiles: dict[int, _Tile] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for numbers, drawn in zip(by_photo.values(), pool.map(draw, by_photo.values()), strict=True):
            tiles.update(zip(numbers, drawn, strict=True))
    return (tiles[number] for number in range(len(records)))


def _draw(source: PhotoSource, records: list[MaskRecord]) -> list[_Tile]:
    """The tiles of one photo's masks."""
    try:
        pixels = source.decode(records[0].photo).pixels
    except PhotoError as error:
        return [_Tile(record, problem=error.reason) for record in records]
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    thumbnail = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2)
    image = _data_uri(thumbnail, "jpeg", quality=80, optimize=True)
    tiles = []
    for record in records:
        if record.size != (height, width):
            expected, actual = f"{record.size[1]} x {record.size[0]}", f"{width} x {height}"
            tiles.append(_Tile(record, problem=f"the photo has changed: the mask is {expected}, the photo {actual}"))
            continue
        try:
            overlay = _draw_overlay(record.mask(), size) if record.area else ""
            tiles.append(_Tile(record, *size, image, overlay))
        except ValueError:
            tiles.append(_Tile(record, problem="the mask is damaged"))
    return tiles


def _draw_overlay(mask: np.ndarray, size: tuple[int, int]) -> str:
    """The mask tinted and outlined, the background dimmed; an image of its own, so that the page can hide it."""
    coverage = np.asarray(Image.fromarray(mask.view(np.uint8) * 255).resize(size, Image.Resampling.BOX))
    # A mask of a few pixels covers less than half of every thumbnail pixel, but must not look empty.
    small = coverage >= min(128, max(1, coverage.max()))
    padded = np.pad(small, 2)  # zeros, so that an object that touches the border of the photo is outlined there too
    offsets = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    neighbors = [np.roll(padded, offset, (0, 1))[2:-2, 2:-2] for offset in offsets]
    colors = np.where(small, _OBJECT, _BACKGROUND).astype(np.uint8)
    colors[np.logical_or.reduce(neighbors) & ~small] = _DARK
    colors[small & ~np.logical_and.reduce(neighbors)] = _LIGHT
    image = Image.fromarray(colors)
    image.putpalette(_PALETTE)
    return _data_uri(image, "png", bits=2, transparency=_OPACITY)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getbuffer()).decode()}"


def _histogram(scores: np.ndarray | array, low: float, high: float) -> str:
    """The bars of a histogram as an SVG path, `_BINS` wide and 1 high."""
    counts, _ = np.histogram(scores, _BINS, (low, high))
    heights = counts / max(1, counts.max())
    return "".join(f"M{x} 1V{1 - y:.3f}h.9V1z" for x, y in enumerate(heights) if y)


def _escape_unprintable(value: Any) -> Any:
    """Escapes control characters, and the lone surrogates of names that are not UTF-8, as Python does."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def _template() -> jinja2.Template:
    # finalize is applied to every value that is put into the page.
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_escape_unprintable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
