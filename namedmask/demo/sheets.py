# SPDX-License-Identifier: MIT
"""Contact sheets: what the demo's photos look like, and what its masks do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..segmenter.folder import overlay
from .scenes import KINDS, evaluation_scene, index_photo
from .score import Shown
from .score_scenes import ShownScene

TILE = 128  # pixels a side
LABEL = 16  # pixels for the line below
TINT = (255, 40, 140)


def draw_scenes(seed: int, per_kind: int = 4) -> Image.Image:
    """The first photos of each kind in the index, one of none, and evaluation scenes."""
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


def draw_masks(shown: Sequence[Shown]) -> Image.Image:
    """Photo, detector's mask, refined mask and truth, two photos a row."""
    tiles = []
    for one in shown:
        tiles.append((one.image, one.kind))
        for mask, label in ((one.detector, "detector"), (one.refined, "refined"), (one.truth, "truth")):
            tiles.append((_tinted(one.image, mask), label))
    return _grid(tiles, columns=8)


def draw_segments(shown: Sequence[ShownScene]) -> Image.Image:
    """Scene, the named pseudo-mask, the segmenter's labels and the truth, a color a kind, two scenes a row."""
    tiles = []
    for one in shown:
        tiles.append((one.image, "scene"))
        for labels, caption in ((one.pseudo, "CLIP"), (one.segmented, "found"), (one.truth, "truth")):
            share = np.bincount(labels.ravel(), minlength=len(KINDS) + 1)[1:] / labels.size
            kinds = [KINDS[place] for place in np.argsort(-share)[:2] if share[place] > 0.01]
            tiles.append((overlay(one.image, labels), f"{caption}: {', '.join(kinds)}"))
    return _grid(tiles, columns=8)


def _tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photo dimmed outside the mask and tinted inside."""
    inside = image * 0.55 + np.array(TINT) * 0.45
    return np.where(mask[..., None], inside, image * 0.4).astype(np.uint8)


def _grid(tiles: Sequence[tuple[np.ndarray, str]], columns: int) -> Image.Image:
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 4) + 4, rows * (TILE + LABEL) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, label) in enumerate(tiles):
        x, y = 4 + number % columns * (TILE + 4), 4 + number // columns * (TILE + LABEL)
        tile = Image.fromarray(pixels)
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        pen.text((x + 2, y + TILE + 1), label, fill="black")
    return sheet
