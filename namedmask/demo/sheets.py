# SPDX-License-Identifier: MIT
"""Contact sheets of the demo's photos, masks and segmentations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..segmenter.overlay import overlay
from .scenes import KINDS, evaluation_scene, index_photo
from .score import ScoredPhoto
from .score_scenes import ShownScene

TILE = 128  # pixels per side
LABEL = 16  # pixels per line of the label below a tile
LINE = 21  # most characters of a line, which fit the width of a tile
TINT = (255, 40, 140)


def draw_scenes(seed: int, per_kind: int = 4) -> Image.Image:
    """The first photos of each kind in the index, and evaluation scenes."""
    chosen: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    number = 0
    while any(len(photos) < per_kind for photos in chosen.values()):
        scene = index_photo(seed, number)
        if scene.kinds and len(chosen[scene.kinds[0]]) < per_kind:
            chosen[scene.kinds[0]].append(scene.image)
        number += 1
    tiles = [(photo, kind) for kind, photos in chosen.items() for photo in photos]
    for number in range(12):
        scene = evaluation_scene(seed, number)
        tiles.append((scene.image, ", ".join(scene.kinds)))
    return _grid(tiles, columns=12)


def draw_masks(photos: Sequence[ScoredPhoto]) -> Image.Image:
    """Photo, mask of the detector, refined mask and ground truth, two photos per row."""
    tiles = []
    for photo in photos:
        tiles.append((photo.image, photo.kind))
        for mask, label in ((photo.detector, "detector"), (photo.refined, "refined"), (photo.truth, "truth")):
            tiles.append((_tinted(photo.image, mask), label))
    return _grid(tiles, columns=8)


def draw_segments(scenes: Sequence[ShownScene]) -> Image.Image:
    """Scene, pseudo-label, prediction of the segmenter and ground truth, one color per kind, two scenes per row."""
    tiles = []
    for scene in scenes:
        tiles.append((scene.image, "scene"))
        for labels, caption in ((scene.pseudo, "CLIP"), (scene.segmented, "segmenter"), (scene.truth, "truth")):
            area = np.bincount(labels.ravel(), minlength=len(KINDS) + 1)[1:] / labels.size
            kinds = [KINDS[index] for index in np.argsort(-area)[:2] if area[index] > 0.01]
            tiles.append((overlay(scene.image, labels), f"{caption}: {', '.join(kinds)}"))
    return _grid(tiles, columns=8)


def _tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photo dimmed outside the mask and tinted inside."""
    inside = image * 0.55 + np.array(TINT) * 0.45
    return np.where(mask[..., None], inside, image * 0.4).astype(np.uint8)


def _grid(tiles: Sequence[tuple[np.ndarray, str]], columns: int) -> Image.Image:
    lines = [textwrap.wrap(label, LINE) for _, label in tiles]
    rows, height = -(-len(tiles) // columns), TILE + LABEL * max(map(len, lines), default=1)
    sheet = Image.new("RGB", (columns * (TILE + 4) + 4, rows * height + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, _) in enumerate(tiles):
        x, y = 4 + number % columns * (TILE + 4), 4 + number // columns * height
        tile = Image.fromarray(pixels)
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        for line, text in enumerate(lines[number]):
            pen.text((x + 2, y + TILE + 1 + line * LABEL), text, fill="black")
    return sheet
