# SPDX-License-Identifier: MIT
"""`namedmask segment`: segments a folder, list file or tar of photos into label maps and overlays.

OUT/
  categories.json       names of classes 1, 2, ...; path and digest of the weights; precision
  photos.jsonl          the mask of each photo: {"photo": name, "mask": "masks/NAME.png"}
  masks/NAME.png        the class of every pixel (`formats.write_label_map`); written after the overlay
  overlays/NAME.jpg     the photo with the mask's colors blended over it, objects outlined
  errors.jsonl          photos that could not be used, with the reason; written last

NAME is the photo's name without its suffix; a digest is added if two photos would have the same NAME, and replaces what
is too long for a file name. A photo whose mask exists is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import MAX_NAME, NAME_ERRORS, atomic_write, fitted, name_digest, remove_stale, sha256
from ..formats import label_palette, write_label_map
from ..masks import ErrorRecord, write_errors
from ..photos import Photo, PhotoError, PhotoSource
from ..progress import Progress
from .predict import Segmenter

OVERLAY = 0.5  # opacity of the colors
MAX_PATH = 3000  # bytes of NAME; Linux allows 4096 for the whole path
JPEG_SIDE = 65500  # maximum side of a JPEG
ROWS = 256  # of an overlay that are computed at once


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
        UserError: If `out` was made with another segmenter, or if there are no photos.
    """
    _settle(out / "categories.json", segmenter, weights)
    remove_stale(out)
    for folder in (out / "masks", out / "overlays"):
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            remove_stale(path)
    errors: list[ErrorRecord] = []
    names = list(source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason))))
    if not names and not errors:
        raise UserError(f"there are no photos in {source.path}")
    unlisted = len(errors)
    masks = _name_masks(out / "photos.jsonl", names)
    progress.total = len(names)
    remaining = [name for name in names if not (out / "masks" / f"{masks[name]}.png").exists()]
    progress.advance(len(names) - len(remaining), existing=True)
    for batch in segmenter.segment(source, remaining):
        for name, photo, mask in batch:
            try:
                if isinstance(photo, PhotoError):
                    raise photo
                _write(out, masks[name], photo, mask, len(segmenter.names))
            except PhotoError as error:
                errors.append(ErrorRecord(name, "segment", error.reason))
        progress.advance(len(batch))
    write_errors(out / "errors.jsonl", errors)
    return len(names) + unlisted - len(errors), len(errors)


def stem(name: str) -> str:
    """Name of the mask of a photo: "sub/photo.jpg" -> "sub/photo". The result never leads out of its folder.

    Names that no file can have are shortened and end with a digest.
    """
    parts = ["up" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    last, _, suffix = parts[-1].rpartition(".") if parts else ("", "", "")
    if last.strip(".") and suffix:
        parts[-1] = last
    fit = [fitted(part) for part in parts[:-1]] + [fitted(part, MAX_NAME - len(".png")) for part in parts[-1:]]
    result = "/".join(fit)
    if not result or "\0" in result or len(result.encode("utf-8", "surrogatepass")) > MAX_PATH:
        return f"photo~{name_digest(name)}"
    return result


class MaskNames:
    """Assigns each photo a mask of its own.

    Args:
        recorded: Names of masks by photo that are assigned already.
    """

    def __init__(self, recorded: dict[str, str]):
        self.files: set[str] = set()
        self.folders: set[str] = set()
        for mask in recorded.values():
            self._claim(mask)

    def assign(self, name: str) -> str:
        """The name of the mask of a further photo: its `stem`, with a digest if another mask is in the way."""
        mask = stem(name)
        if self._is_taken(mask):
            folder, slash, last = mask.rpartition("/")
            last = f"{fitted(last, 200)}~{name_digest(name)}"
            mask = folder + slash + last
            if self._is_taken(mask):  # "a.png/b" beside "a": a folder that has the name of a mask
                mask = last
        self._claim(mask)
        return mask

    def _claim(self, mask: str) -> None:
        self.files.add(mask)
        while mask := mask.rpartition("/")[0]:
            self.folders.add(mask)

    def _is_taken(self, mask: str) -> bool:
        if mask in self.files or not self.folders.isdisjoint((f"{mask}.png", f"{mask}.jpg")):
            return True
        while mask := mask.rpartition("/")[0]:
            if mask.endswith((".png", ".jpg")) and mask[:-4] in self.files:
                return True
        return False


def _name_masks(path: Path, names: list[str]) -> dict[str, str]:
    """The names of the masks of photos. They are recorded in `path`, so that they stay when photos are added."""
    masks: dict[str, str] = {}
    if path.exists():
        try:
            for line in path.read_bytes().splitlines():
                fields = json.loads(line)
                masks[fields["photo"]] = fields["mask"].removeprefix("masks/").removesuffix(".png")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): start over with --overwrite") from None
    assigner = MaskNames(masks)
    for name in names:
        if name not in masks:
            masks[name] = assigner.assign(name)
    with atomic_write(path) as file:
        for name, mask in masks.items():
            file.write(json.dumps({"photo": name, "mask": f"masks/{mask}.png"}).encode() + b"\n")
    return masks


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
    image = pixels.copy()
    for first in range(0, len(mask), ROWS):  # temporary float64 arrays of a few rows only
        part, photo = mask[first : first + ROWS], pixels[first : first + ROWS]
        colors = label_palette()[part.astype(np.uint8)]  # colors repeat beyond 255 classes
        blended = ((1 - OVERLAY) * photo + OVERLAY * colors).astype(np.uint8)
        np.copyto(image[first : first + ROWS], blended, where=(part > 0)[..., None])
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    image[edge] = 255
    return image


def _write(out: Path, name: str, photo: Photo, mask: np.ndarray, classes: int) -> None:
    """Writes overlay and mask. Raises PhotoError if their files cannot have these names."""
    overlay_path, mask_path = out / "overlays" / f"{name}.jpg", out / "masks" / f"{name}.png"
    image = Image.fromarray(overlay(photo.pixels, mask))
    image.thumbnail((JPEG_SIDE, JPEG_SIDE))
    try:
        for path in (overlay_path, mask_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(overlay_path) as file:
            image.save(file, "jpeg", quality=88)
        write_label_map(mask_path, mask, classes)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        raise PhotoError(photo.name, f"{mask_path} cannot be written: {error.strerror}") from error


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
        file.write(json.dumps(about, indent=1).encode())


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
    errors: list[PhotoError] = []
    names = by_stem(name for name in source.names(errors.append) if stem(name) in stems)
    if missing := sorted(stems - names.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f" ({errors[0]})" if errors else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}{why}")
    for batch in segmenter.segment(source, sorted(names.values())):
        for name, photo, mask in batch:
            if isinstance(photo, PhotoError):
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield stem(name), mask
