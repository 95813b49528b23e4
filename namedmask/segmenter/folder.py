# SPDX-License-Identifier: MIT
"""`namedmask segment`: a folder, list or tar of photos to label maps and pictures to look at.

OUT/
  categories.json       the names of classes 1, 2, ...; the weights and a digest of them; the precision
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the masks' colors over it, objects outlined
  errors.jsonl          photos that could not be used, and why; written last

NAME is the photo's name without its suffix. A photo whose mask is there is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import atomic_write, remove_stale
from ..formats import label_palette, write_label_map
from ..masks import ErrorRecord, write_errors
from ..photos import Photo, PhotoError, PhotoSource
from ..progress import Progress
from .predict import Segmenter

OVERLAY = 0.5  # share of the class's color


def segment_photos(
    segmenter: Segmenter, weights: Path, source: PhotoSource, out: Path, progress: Progress
) -> tuple[int, int]:
    """Segments what is left to do of the photos of `source`; returns how many have masks and how many have failed.

    weights: what `segmenter` was loaded from. The caller holds the lock of `out`.
    Raises UserError where `out` was made with others, without photos, or where two photos would have one mask.
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
    left = [name for name in names if not (out / "masks" / f"{stem(name)}.png").exists()]
    progress.advance(len(names) - len(left), found=True)
    for batch in segmenter.segment(source, left):
        for name, photo, mask in batch:
            if isinstance(photo, Photo):
                _write(out, stem(name), photo.pixels, mask, len(segmenter.names))
            else:
                errors.append(ErrorRecord(name, "segment", photo.reason))
        progress.advance(len(batch))
    write_errors(out / "errors.jsonl", errors)
    return len(names) + unlisted - len(errors), len(errors)


def stem(name: str) -> str:
    """What the mask of a photo is called, below its folder: "sub/photo" of "sub/photo.jpg". It cannot climb out."""
    path = PurePosixPath(name)
    parts = ["up" if part == ".." else part for part in path.with_suffix("").parts if not part.startswith("/")]
    return "/".join(parts)


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """Names of photos by those of their masks, in order; UserError where two would have one."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(stem(name), name)) != name:
            raise UserError(f"{other} and {name} would both become {stem(name)}.png; rename one of them")
    return found


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A photo uint8 [H, W, 3] with its mask [H, W] in colors over it and a white line around every object."""
    colors = label_palette()[mask.astype(np.uint8)]  # beyond 255 classes colors come again
    drawn = np.where((mask > 0)[..., None], (1 - OVERLAY) * pixels + OVERLAY * colors, pixels).astype(np.uint8)
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    drawn[edge] = 255
    return drawn


def _write(out: Path, place: str, pixels: np.ndarray, mask: np.ndarray, classes: int) -> None:
    picture, labels = out / "overlays" / f"{place}.jpg", out / "masks" / f"{place}.png"
    for path in (picture, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(picture) as file:
        Image.fromarray(overlay(pixels, mask)).save(file, "jpeg", quality=88)
    write_label_map(labels, mask, classes)


def _settle(path: Path, segmenter: Segmenter, weights: Path) -> None:
    """Writes what OUT is made with, or raises UserError where that is something else."""
    file = weights / "model.safetensors" if weights.is_dir() else weights
    about = {
        "categories": segmenter.names[1:],
        "weights": str(file.absolute()),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "precision": str(segmenter.dtype)[6:],
    }
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        parts = {"categories": "categories", "sha256": "weights", "precision": "precision"}
        changed = [part for key, part in parts.items() if old.get(key) != about[key]]
        if changed:
            raise UserError(
                f"{path.parent} was made with other {' and '.join(changed)} (weights then: {old.get('weights')}): "
                "choose another --out, or start anew with --overwrite"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())


def predictions(segmenter: Segmenter, source: PhotoSource, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(name without suffix, mask) of the photos of a source whose names are wanted; UserError where one is unusable."""

    def refuse(error: PhotoError) -> None:
        raise UserError(str(error))

    found = by_stem(name for name in source.names(refuse) if stem(name) in wanted)
    if missing := sorted(wanted - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}")
    for batch in segmenter.segment(source, sorted(found.values())):
        for name, photo, mask in batch:
            if mask is None:
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield stem(name), mask
