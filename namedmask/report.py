# SPDX-License-Identifier: MIT
"""The gallery of a run: one self-contained HTML page that shows which masks to trust and which not.

Masks are streamed: of each category only its scores and the records of both ends are kept, so a run of any size takes
a few bytes a mask and a page of bounded size. The page holds nothing that is not in the run folder or the photos, so
the same run gives the same bytes.
"""

import base64
import heapq
import io
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
from .demo.folder import contact_sheets
from .errors import UserError
from .files import atomic_write
from .masks import ErrorRecord, MaskRecord, best_masks, read_errors, read_masks
from .photos import PhotoError, PhotoSource
from .record import read_config, read_record

MAX_THUMBNAILS = 1500  # on the page, unless two a category are more
PER_CATEGORY = 30
ERRORS_SHOWN = 200

_SIDE = 224  # of a thumbnail, the longer one, in pixels
_BINS = 20
_THREADS = 4  # each may hold a photo of 100 megapixels
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Any single color is lost on some photo. So the rest of the photo is dimmed, and the outline is white beside black.
_BESIDE, _INSIDE, _LIGHT, _DARK = range(4)
_PALETTE = [0, 0, 0, 255, 40, 140, 255, 255, 255, 0, 0, 0]
_OPACITY = bytes([80, 72, 255, 200])


def write_report(out: str | os.PathLike, sheets: Mapping[str, Image.Image] | None = None) -> Path:
    """Writes `out`/report.html from the run folder `out` and returns its path.

    sheets: pictures to show before the masks, by their captions; None: those of the demo that has made the folder.

    The masks are those of the experts (OUT/refined) where there are any, else the detector's (OUT/masks).
    The page shows each category's best masks (by `score`, then `category_score`, then the order of the run) and its
    lowest ones, drawn over the photos, with histograms, errors and settings. At most `PER_CATEGORY` masks a category
    and about `MAX_THUMBNAILS` in all are drawn. A photo that cannot be shown any more gets a tile that says why.

    Raises UserError if the run folder lacks stages.json or archive.json, or if a file in it is damaged.
    """
    out = Path(out)
    sheets = contact_sheets(out) if sheets is None else sheets
    config, masks = read_config(out), best_masks(out)
    try:
        archive = read_archive(out / "archive.json")
        categories = {name: _Category(name, len(archive.photos[name])) for name in archive.categories}
        photos = _gather(read_masks(masks), categories)
        errors, error_count = _read_errors(out / "errors.jsonl")
    except ValueError as error:
        raise UserError(f"{error}: the run folder is damaged") from error

    # Merged or hand-edited runs may hold categories that the archive does not name: share again, now that all are here.
    share = _share(len(categories))
    chosen = [(category, *category.ends(share)) for category in categories.values()]
    tiles = _draw_all(config.photos, [record for _, best, lowest in chosen for record in (*best, *lowest)])
    scores = np.concatenate([category.scores for category in categories.values()] or [[]])
    low, high = (0.0, 1.0) if not scores.size else (min(0.0, scores.min()), max(1.0, scores.max()))

    page = _template().generate(
        title=out.resolve().name,
        photos=config.photos,
        refined=masks.name == "refined",
        facts=read_record(out).made_with,
        settings=to_toml(config).splitlines(),
        photo_count=photos,
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
        sheets={caption: _data_uri(sheet, "jpeg", quality=88) for caption, sheet in (sheets or {}).items()},
    )
    with atomic_write(out / "report.html") as file:
        file.writelines(chunk.encode() for chunk in page)
    return out / "report.html"


class _Category:
    """What is kept of a category while its masks stream by."""

    def __init__(self, name: str, archived: int):
        self.name = name
        self.archived = archived  # photos the archive has for it
        self.scores = array("d")
        self.empty = 0
        self._best: list[tuple[tuple, MaskRecord]] = []
        self._lowest: list[tuple[tuple, MaskRecord]] = []

    def add(self, record: MaskRecord, share: int) -> None:
        fit = -np.inf if record.category_score is None else record.category_score
        # The number of the mask makes every key unique: ties fall to the earlier mask, and records are never compared.
        number = len(self.scores)
        self.scores.append(record.score)
        self.empty += record.area == 0
        for heap, key in (
            (self._best, (record.score, fit, -number)),
            (self._lowest, (-record.score, -fit, number)),
        ):
            if len(heap) < share:
                heapq.heappush(heap, (key, record))
            else:
                heapq.heappushpop(heap, (key, record))

    def ends(self, share: int) -> tuple[list[MaskRecord], list[MaskRecord]]:
        """The best masks and the lowest, best first; at most `share` together, no mask in both."""
        lowest = min(max(1, share // 5), len(self.scores) // 5)
        best = min(share, len(self.scores)) - lowest
        return (
            [record for _, record in sorted(self._best, key=lambda item: item[0], reverse=True)[:best]],
            [record for _, record in sorted(self._lowest, key=lambda item: item[0])[len(self._lowest) - lowest :]],
        )


class _Tile(NamedTuple):
    """A mask on the page. `image` and `overlay` are data URIs; `problem` says why there is no image."""

    record: MaskRecord
    width: int = 0
    height: int = 0
    image: str = ""
    overlay: str = ""
    problem: str = ""


def _share(categories: int) -> int:
    return max(2, min(PER_CATEGORY, MAX_THUMBNAILS // max(1, categories)))


def _gather(records: Iterable[MaskRecord], categories: dict[str, _Category]) -> int:
    """Adds the records to their categories; the number of distinct photos."""
    share = _share(len(categories))
    photos = array("q")  # hashes: 8 bytes a mask where a set of names would grow with the run
    for record in records:
        photos.append(hash(record.photo))
        if record.category not in categories:
            categories[record.category] = _Category(record.category, 0)
        categories[record.category].add(record, share)
    return np.unique(photos).size


def _read_errors(path: Path) -> tuple[list[ErrorRecord], int]:
    """The first errors of a run, and how many there are."""
    try:
        errors = read_errors(path)
        shown = list(islice(errors, ERRORS_SHOWN))
        return shown, len(shown) + sum(1 for _ in errors)
    except FileNotFoundError:
        return [], 0


def _draw_all(photos: str, records: list[MaskRecord]) -> Iterator[_Tile]:
    """The tiles of the records, in their order. A photo that stands under several names is decoded once."""
    by_photo: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_photo.setdefault(record.photo, []).append(number)
    try:
        source = PhotoSource(photos)
    except ValueError as error:
        problem = str(error)
        return (_Tile(record, problem=problem) for record in records)

    def draw(numbers: list[int]) -> list[_Tile]:
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
    small = max(1, round(width * scale)), max(1, round(height * scale))
    thumbnail = Image.fromarray(pixels).resize(small, Image.Resampling.LANCZOS, reducing_gap=2)
    image = _data_uri(thumbnail, "jpeg", quality=80, optimize=True)
    tiles = []
    for record in records:
        if record.size != (height, width):
            was, now = f"{record.size[1]} x {record.size[0]}", f"{width} x {height}"
            tiles.append(_Tile(record, problem=f"the photo has changed: the mask is {was}, the photo {now}"))
            continue
        try:
            overlay = _draw_overlay(record.mask(), small) if record.area else ""
            tiles.append(_Tile(record, *small, image, overlay))
        except ValueError:
            tiles.append(_Tile(record, problem="the mask is damaged"))
    return tiles


def _draw_overlay(mask: np.ndarray, size: tuple[int, int]) -> str:
    """The mask tinted and outlined, the rest dimmed; an image of its own, so that it can be switched off."""
    cover = np.asarray(Image.fromarray(mask.view(np.uint8) * 255).resize(size, Image.Resampling.BOX))
    # A mask of a few pixels covers half of no thumbnail pixel, but must not look empty.
    small = cover >= min(128, max(1, cover.max()))
    framed = np.pad(small, 2)  # zeros around, so an object that is cut by the photo's border is outlined there too
    plus = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    near = [np.roll(framed, shift, (0, 1))[2:-2, 2:-2] for shift in plus]
    colors = np.where(small, _INSIDE, _BESIDE).astype(np.uint8)
    colors[np.logical_or.reduce(near) & ~small] = _DARK
    colors[small & ~np.logical_and.reduce(near)] = _LIGHT
    image = Image.fromarray(colors)
    image.putpalette(_PALETTE)
    return _data_uri(image, "png", bits=2, transparency=_OPACITY)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getbuffer()).decode()}"


def _histogram(scores: Iterable[float], low: float, high: float) -> str:
    """The outline of the bars as the path of an SVG, `_BINS` wide and 1 high."""
    counts, _ = np.histogram(scores, _BINS, (low, high))
    heights = counts / max(1, counts.max())
    return "".join(f"M{x} 1V{1 - y:.3f}h.9V1z" for x, y in enumerate(heights) if y)


def _showable(value: Any) -> Any:
    """Control characters and the lone surrogates of names that are not UTF-8, written out as Python writes them."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return _UNSHOWABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def _template() -> jinja2.Template:
    # finalize sees every value that is put into the page: none can be forgotten.
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_showable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
