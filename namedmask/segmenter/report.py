# SPDX-License-Identifier: MIT
"""The page of a segmented folder: which categories were found, where, and how much of the pixels they cover.

`namedmask report OUT` writes it, not `segment` itself: it reads all masks, which takes a while for many photos, and it
can show a folder that is not finished.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from ..errors import DamagedFile, UserError
from ..files import absolute, atomic_write
from ..formats import encode, label_palette, read_label_map
from ..memory import MemoryBudget
from ..pages import read_some_errors, template
from ..pages.pictures import BYTES_PER_PIXEL, Picture, data_uri, draw_thumbnail, thumbnail_size
from ..photos import SEGMENT_RECORD, PhotoError, PhotoSource
from ..record import read_record
from ..threads import map_ahead, thread_count
from .folder import mask_path, overlay_path, read_scores, segmented_categories, segmented_photos

MAX_PHOTOS = 200  # on the page, unless the categories are more
SIDE = 320  # pixels of the longer side of a photo on the page
_OPACITY = bytes([0, *[150] * 255])


class Shown(NamedTuple):
    """A photo on the page. `problem` is the reason if there is no picture."""

    photo: str
    link: str  # to its overlay, "" if there is none
    found: list[tuple[int, float]]  # its classes with their share of the pixels, greatest first
    confidence: float | None
    picture: Picture | None = None
    overlay: str = ""
    problem: str = ""


def write_segmented_report(out: str | os.PathLike[str], photos: str | None = None) -> Path:
    """Writes `out`/report.html, the page of an output folder of `namedmask segment`.

    The legend has the color of each category that was found, its share of the pixels of all photos and the number of
    photos that show it. `MAX_PHOTOS` photos are shown, evenly spaced in their order, and of each category that none of
    them shows, the photo with the most pixels of it. If there is `out`/scores.jsonl, the page shows confidences.
    The page depends on the folder and the photos alone.

    Args:
        out: The folder.
        photos: Where the photos are, if they have moved.

    Returns:
        Path of the page.

    Raises:
        UserError: If the folder was not made by `namedmask segment`, has no masks, or if one of its files is damaged.
    """
    out = Path(out)
    record = read_record(out, SEGMENT_RECORD)
    if record.photos is None:
        raise UserError(f"{out} is not an output folder of `namedmask segment`: {SEGMENT_RECORD} is missing")
    names = segmented_categories(out)
    listed = segmented_photos(out)
    paths = {photo: path for photo, name in listed.items() if (path := mask_path(out, name)).exists()}
    if not paths:
        raise UserError(f"{out} has no masks; run `namedmask segment` first")

    def count(photo: str) -> tuple[str, np.ndarray]:
        pixels = np.bincount(read_label_map(paths[photo]).ravel(), minlength=len(names) + 1)
        if len(pixels) > len(names) + 1:
            raise DamagedFile(paths[photo], f"class {len(pixels) - 1} has no name", remedy="segment the photo again")
        return photo, pixels

    segmented = list(paths)
    step = max(1.0, len(segmented) / MAX_PHOTOS)
    chosen = {segmented[int(number * step)] for number in range(min(len(segmented), MAX_PHOTOS))}
    pixels, present = np.zeros(len(names) + 1, np.int64), np.zeros(len(names) + 1, np.int64)
    best: dict[int, tuple[int, str]] = {}  # of each class: its most pixels in a photo, and that photo
    seen: set[int] = set()
    for photo, counts in map_ahead(count, iter(segmented), thread_count()):
        pixels += counts
        present += counts > 0
        found = np.flatnonzero(counts[1:]) + 1
        for one in found.tolist():
            if one not in best or counts[one] > best[one][0]:
                best[one] = int(counts[one]), photo
        if photo in chosen:
            seen.update(found.tolist())
    chosen |= {photo for one, (_, photo) in best.items() if one not in seen}
    scores = {photo: one.confidence for photo, one in read_scores(out).items() if photo in chosen}
    errors, error_count = read_some_errors(out / "errors.jsonl")
    page = template("segmented.html.j2").generate(
        title=Path(absolute(out)).name,
        photos=photos or record.photos,
        photo_count=len(segmented),
        unfinished=len(listed) - len(segmented) - error_count,
        categories=[
            {
                "number": number,
                "name": name,
                "color": "#" + label_palette()[number & 255].tobytes().hex(),
                "share": pixels[number] / max(1, pixels.sum()),
                "photos": int(present[number]),
            }
            for number, name in enumerate(names, 1)
            if present[number]
        ],
        absent=sum(not n for n in present[1:]),
        background=pixels[0] / max(1, pixels.sum()),
        names=["background", *names],
        shown=_draw_all(
            out, photos or record.photos, {photo: listed[photo] for photo in segmented if photo in chosen}, scores
        ),
        has_scores=bool(scores),
        errors=errors,
        error_count=error_count,
    )
    with atomic_write(out / "report.html") as file:
        file.writelines(chunk.encode() for chunk in page)
    return out / "report.html"


def _draw_all(out: Path, photos: str, masks: dict[str, str], scores: dict[str, float]) -> Iterator[Shown]:
    """Draws photos by the names of their masks, in order."""
    try:
        source, missing = PhotoSource(photos), ""
    except ValueError as error:
        source, missing = None, str(error)
    budget = MemoryBudget()

    def draw(item: tuple[str, str]) -> Shown:
        photo, name = item
        labels = read_label_map(mask_path(out, name))
        counts = np.bincount(labels.ravel())
        found = [
            (int(one), counts[one] / labels.size) for one in np.argsort(-counts, kind="stable") if one and counts[one]
        ]
        link = f"overlays/{quote(name, errors='surrogateescape')}.jpg"
        shown = Shown(photo, link if overlay_path(out, name).exists() else "", found, scores.get(photo))
        if source is None:
            return shown._replace(problem=missing)
        with budget.hold(labels.size * BYTES_PER_PIXEL):
            try:
                pixels = source.decode(photo).pixels
            except PhotoError as error:
                return shown._replace(problem=error.reason)
            if pixels.shape[:2] != labels.shape:
                return shown._replace(problem="the photo has changed: it has another size than its mask")
            size = thumbnail_size(labels.shape, SIDE)
            picture = Picture(data_uri(draw_thumbnail(pixels, SIDE), "jpeg"), *size)
        # Colors repeat beyond 255 classes, as in the overlays.
        small = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        small.putpalette(label_palette().tobytes())
        return shown._replace(picture=picture, overlay=data_uri(encode(small, "png", transparency=_OPACITY), "png"))

    return islice(map_ahead(draw, iter(masks.items()), thread_count()), len(masks))
