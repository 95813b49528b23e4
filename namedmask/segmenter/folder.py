# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

OUT/
  categories.json       names of classes 1, 2, ...; path and digest of the weights; precision
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the mask's colors blended over it, objects outlined
  errors.jsonl          photos that could not be used, with the reason; written last

NAME is the photo's name without its suffix. A photo whose mask exists is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import atomic_write, remove_stale, sha256
from ..formats import label_palette, write_label_map
from ..masks import ErrorRecord, write_errors
from ..photos import Photo, PhotoError, PhotoSource
from ..progress import Progress
from .predict import Segmenter

OVERLAY = 0.5  # opacity of the colors


def segment_photos(
    segmenter: Segmenter, weights: Path, source: PhotoSource, out: Path, progress: Progress
) -> tuple[int, int]:
    """Segments the photos of `source` that have no mask in `out` yet.

    Args:
        segmenter: The segmenter.
        weights: The file or folder that `segmenter` was loaded from.
        source: The photos.
        out: Output folder, of which the caller holds the lock.
        progress: Advances with every photo.

    Returns:
        How many photos have masks, and how many could not be used.

    Raises:
        UserError: If `out` was made with another segmenter, if there are no photos, or if two photos have the same name
            apart from the suffix.
    """
    _settle(out / "categories.json", segmenter, weights)
    remove_stale(out)
    for folder in (out / "masks", out / "overlays"):
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            remove_stale(path)
    errors: list[ErrorRecord] = []
    names = list(by_stem(source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason)))).values())
    if not names and not errors:
        raise UserError(f"there are no photos in {source.path}")
    unlisted = len(errors)
    progress.total = len(names)
    remaining = [name for name in names if not (out / "masks" / f"{stem(name)}.png").exists()]
    progress.advance(len(names) - len(remaining), existing=True)
    for batch in segmenter.segment(source, remaining):
        for name, photo, mask in batch:
            if isinstance(photo, Photo):
                _write(out, stem(name), photo.pixels, mask, len(segmenter.names))
            else:
                errors.append(ErrorRecord(name, "segment", photo.reason))
        progress.advance(len(batch))
    write_errors(out / "errors.jsonl", errors)
    return len(names) + unlisted - len(errors), len(errors)


def stem(name: str) -> str:
    """Name of the mask of a photo: "sub/photo.jpg" -> "sub/photo". The result never leads out of its folder."""
    path = PurePosixPath(name)
    parts = ["up" if part == ".." else part for part in path.with_suffix("").parts if not part.startswith("/")]
    return "/".join(parts)


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """The names of photos by the names of their masks, in order.

    Raises:
        UserError: If two photos would have the same mask.
    """
    photos: dict[str, str] = {}
    for name in names:
        if (other := photos.setdefault(stem(name), name)) != name:
            raise UserError(f"{other} and {name} would both become {stem(name)}.png; rename one of them")
    return photos


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blends the colors of a mask over a photo and outlines its objects in white.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        mask: Class of every pixel, uint16 [H, W].

    Returns:
        uint8 [H, W, 3].
    """
    colors = label_palette()[mask.astype(np.uint8)]  # colors repeat beyond 255 classes
    image = np.where((mask > 0)[..., None], (1 - OVERLAY) * pixels + OVERLAY * colors, pixels).astype(np.uint8)
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    image[edge] = 255
    return image


def _write(out: Path, name: str, pixels: np.ndarray, mask: np.ndarray, classes: int) -> None:
    overlay_path, mask_path = out / "overlays" / f"{name}.jpg", out / "masks" / f"{name}.png"
    for path in (overlay_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(overlay_path) as file:
        Image.fromarray(overlay(pixels, mask)).save(file, "jpeg", quality=88)
    write_label_map(mask_path, mask, classes)


def _settle(path: Path, segmenter: Segmenter, weights: Path) -> None:
    """Writes categories.json. Raises UserError if an existing one is of another segmenter."""
    weights_path = weights / "model.safetensors" if weights.is_dir() else weights
    about = {
        "categories": segmenter.names[1:],
        "weights": str(weights_path.absolute()),
        "sha256": sha256(weights_path),
        "precision": str(segmenter.dtype)[6:],
    }
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        labels = {"categories": "categories", "sha256": "weights", "precision": "precision"}
        changed = [label for key, label in labels.items() if old.get(key) != about[key]]
        if changed:
            raise UserError(
                f"{path.parent} was made with other {' and '.join(changed)} (its weights: {old.get('weights')}): "
                "choose another --out, or start over with --overwrite"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())


def predictions(segmenter: Segmenter, source: PhotoSource, stems: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Segments some photos of a source.

    Args:
        segmenter: The segmenter.
        source: The photos.
        stems: Names of the photos to segment, without suffixes.

    Yields:
        The name of a photo without its suffix, and its mask, uint16 [H, W].

    Raises:
        UserError: If a photo is missing or cannot be used.
    """

    def fail(error: PhotoError) -> None:
        raise UserError(str(error))

    names = by_stem(name for name in source.names(fail) if stem(name) in stems)
    if missing := sorted(stems - names.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}")
    for batch in segmenter.segment(source, sorted(names.values())):
        for name, photo, mask in batch:
            if isinstance(photo, PhotoError):
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield stem(name), mask
