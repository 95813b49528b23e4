# SPDX-License-Identifier: MIT
"""Readers of public benchmarks, in the folders in which their archives unpack.

A reader takes the root folder and the name of a split and returns a `Split`: the photos, and a function per photo that
reads its ground truth. Only names are held in memory, except for COCO, whose annotations are one JSON file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from ..archive import key_of
from ..decoding import MAX_PIXELS
from ..errors import DamagedFile, UserError
from ..files import read_bytes
from ..formats import open_png, read_label_map
from ..presets import benchmarks
from ..suffixes import PHOTO_SUFFIXES
from . import BenchmarkName
from .folders import Truth, by_stem

MAX_COORDINATE = 1e5  # of a polygon; pycocotools takes memory in proportion to its length
LOCAL_FILE = "/data/local-files/?d="  # in a URL of Label Studio: a photo of its local files storage
MASK_THRESHOLD = 127  # pixels of a binary mask above this gray value are object


class Split(NamedTuple):
    """The photos of a benchmark that have ground truth.

    Attributes:
        photos: Folder of the photos.
        truth: Ground truth by the name of the photo, its path below `photos` with "/".
        without_truth: Photos that have no ground truth.
        without_photo: Ground truth whose photo is missing.
        categories: Names of classes 1, 2, ... that the folders give; None if the benchmark has a list of its own.
    """

    photos: Path
    truth: dict[str, Truth]
    without_truth: list[str]
    without_photo: list[str]
    categories: list[str] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        read: Returns a split. Raises UserError, which names what is missing.
        photos: Number of photos of the published protocol.
        published: Published figures, in one line.
        split: The split that is evaluated by default; None if there is only one.
        classes: Number of categories; 0 for binary masks of salient objects.
        ignore: The ignored id of the ground truth.
    """

    read: Callable[[Path, str | None], Split]
    photos: int
    published: str
    split: str | None = None
    classes: int = 0
    ignore: int | None = None


def category_names(benchmark: str) -> list[str] | None:
    """Returns the names of classes 1, 2, ... of a benchmark; None for ImageNet-S and for saliency benchmarks."""
    preset = benchmarks().get(benchmark)
    return None if preset is None else list(preset["names"])


# -- the layouts -----------------------------------------------------------------------------------------------------


def read_voc(root: Path, split: str | None) -> Split:
    """VOC2012: lists in ImageSets/Segmentation, photos in JPEGImages, indexed PNGs in SegmentationClass."""
    base = _base(root, "ImageSets/Segmentation", "", "VOC2012", "VOCdevkit/VOC2012")
    lists = base / "ImageSets" / "Segmentation"
    _expect_split(split, sorted(path.stem for path in lists.glob("*.txt")), lists)
    path = lists / f"{split}.txt"
    try:
        names = read_bytes(path).decode("utf-8-sig").split()
    except (OSError, ValueError) as error:
        raise DamagedFile(path, error, remedy="unpack the archive of the benchmark again") from None
    photos, labels = _folder(base, "JPEGImages"), _folder(base, "SegmentationClass")
    paths = {name: labels / f"{name}.png" for name in names}
    truth = {name: _png(path) for name, path in paths.items() if path.exists()}
    return _paired(photos, {name: f"{name}.jpg" for name in names}, truth)


def read_coco(root: Path, split: str | None) -> Split:
    """COCO 2017: photos in val2017 or images/val2017, instances in annotations/instances_val2017.json."""
    annotations = _base(root, "annotations", "", "coco", "COCO", "coco2017") / "annotations"
    base, prefix, year = annotations.parent, "instances_", "2017"
    _expect_split(
        split,
        sorted(path.stem[len(prefix) : -len(year)] for path in annotations.glob(f"{prefix}*{year}.json")),
        annotations,
        f"{prefix}{split}{year}.json",
    )
    photos = _folder(base, f"{split}{year}", f"images/{split}{year}")
    path = annotations / f"{prefix}{split}{year}.json"
    on_disk = {entry.name: entry.name for entry in os.scandir(photos) if _is_photo(entry.name)}
    return _paired(photos, on_disk, _coco_truth(path))


def read_coca(root: Path, split: str | None) -> Split:
    """CoCA: photos in image/CATEGORY, masks of 0 and 255 in binary/CATEGORY; the folder is the class."""
    base = _base(root, "image", "", "CoCA", "coca", other="images")
    photos = _folder(base, "image", "images")
    masks = _folder(base, "binary", "gt", "gts", "mask", "masks")
    names = category_names("coca") or []
    classes = {key_of(name): number for number, name in enumerate(names, 1)}
    truth = {}
    for name, path in by_stem(masks, ".png").items():
        folder = name.rpartition("/")[0]
        if key_of(folder) not in classes:
            raise UserError(f"{path}: {folder!r} is not a category of CoCA, such as {names[3]!r}")
        truth[name] = Truth(str(path), partial(_read_class_mask, path, classes[key_of(folder)]))
    return _paired(photos, _names_by_stem(photos), truth)


def read_cityscapes(root: Path, split: str | None) -> Split:
    """Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png."""
    base = _base(root, "leftImg8bit", "", "cityscapes", "Cityscapes")
    _expect_split(split, _subfolders(base / "leftImg8bit"), base / "leftImg8bit")
    photos, labels = _folder(base, f"leftImg8bit/{split}"), _folder(base, f"gtFine/{split}")
    table = np.zeros(256, np.uint8)
    table[benchmarks()["cityscapes-object"]["label_ids"]] = np.arange(1, 15)
    suffix = "_gtFine_labelIds"
    truth = {
        name.removesuffix(suffix): Truth(str(path), partial(_read_mapped, path, table))
        for name, path in by_stem(labels, ".png").items()
        if name.endswith(suffix)
    }
    if not truth:
        raise UserError(f"there are no CITY/*{suffix}.png in {labels}: they come with gtFine_trainvaltest.zip")
    names = {stem.removesuffix("_leftImg8bit"): name for stem, name in _names_by_stem(photos).items()}
    return _paired(photos, names, truth)


def read_imagenet_s(root: Path, split: str | None, classes: int) -> Split:
    """ImageNet-S: photos in validation/WNID, labels in validation-segmentation/WNID, as R + 256 G."""
    own = f"ImageNetS{classes}"
    base = _base(root, "validation", "", own)
    if base.name.startswith("ImageNetS") and base.name != own:
        raise UserError(f"--root {root}: {base.name} is another benchmark; expected {own}")
    if split == "test":
        raise UserError(
            "--split test: the labels of ImageNet-S's test photos are not public, its server scores them; evaluate on "
            "--split val"
        )
    folders = {"val": "validation", "train-semi": "train-semi"}
    _expect_split(split, [name for name, folder in folders.items() if (base / folder).is_dir()], base)
    folder = folders[split or "val"]
    photos, labels = _folder(base, folder), _folder(base, f"{folder}-segmentation")
    truth = {name: _png(path, red_green=True) for name, path in by_stem(labels, ".png").items()}
    wordnet_ids = _subfolders(photos)
    return _paired(photos, _names_by_stem(photos), truth, wordnet_ids if len(wordnet_ids) == classes else None)


def read_saliency(root: Path, split: str | None, bases: tuple[str, ...], photos: str, masks: str) -> Split:
    """A saliency benchmark: a folder of photos and a folder of masks of 0 and 255 with the same names."""
    photo_folder, mask_folder = (_base(root, name, *bases) / name for name in (photos, masks))
    truth = {name: Truth(str(path), partial(read_mask, path)) for name, path in by_stem(mask_folder, ".png").items()}
    return _paired(photo_folder, _names_by_stem(photo_folder), truth)


# -- ground truth ----------------------------------------------------------------------------------------------------


def read_gray(path: Path) -> np.ndarray:
    """Reads the gray values of a PNG, uint8 [H, W].

    Raises:
        UserError: If it cannot be read, if it has colors, transparency or 16 bits, or if it holds 0 and 1 alone.
    """
    with open_png(path) as (image, depth):
        rgba = np.asarray(image.convert("RGBA"))
    gray = rgba[..., 0]
    if depth == 16 or (rgba[..., :3] != gray[..., None]).any() or (rgba[..., 3] < 255).any():
        raise UserError(f"{path} is a picture of colors, transparency or 16 bits; expected gray values from 0 to 255")
    if gray.max(initial=0) == 1:
        raise UserError(f"{path} holds 0 and 1; expected gray values from 0 to 255")
    return gray


def read_mask(path: Path) -> np.ndarray:
    """Reads a binary mask of 0 and 255, bool [H, W]. Raises UserError as `read_gray` does, or if no value is high."""
    gray = read_gray(path)
    if 0 < gray.max(initial=0) <= MASK_THRESHOLD:
        raise UserError(f"{path} holds values from 0 to {gray.max()}; expected 0 and 255, the pixels of the object")
    return gray > MASK_THRESHOLD


def _png(path: Path, red_green: bool = False) -> Truth:
    return Truth(str(path), partial(read_label_map, path, red_green))


def _read_class_mask(path: Path, label: int) -> np.ndarray:
    return read_mask(path) * np.uint8(label)


def _read_mapped(path: Path, table: np.ndarray) -> np.ndarray:
    labels = read_label_map(path)
    if labels.dtype != np.uint8:
        raise UserError(f"{path} holds 16-bit ids, not labelIds of Cityscapes")
    return table[labels]


class Instance(NamedTuple):
    """An annotation of a COCO file.

    Attributes:
        label: The label of its category; None: of no class.
        segmentation: Polygons or run lengths; nothing for a box.
        number: Its id.
        crowd: Whether it is a region with several objects that are not separated (`iscrowd`).
    """

    label: int | None
    segmentation: Any
    number: int
    crowd: bool = False

    def mask(self, height: int, width: int) -> np.ndarray:
        """Its pixels, bool [height, width]. Raises ValueError if its segmentation is damaged or missing."""
        if not self.segmentation:
            raise ValueError(f"annotation {self.number} has no segmentation: a box or a point is no mask; remove it")
        try:
            return _rasterized(self.segmentation, height, width)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"the segmentation of annotation {self.number} is damaged: {error}") from None


class Instances(NamedTuple):
    """The instances of a photo in a COCO file.

    Attributes:
        size: (height, width) of the photo.
        instances: The annotations in the order of the file.
    """

    size: tuple[int, int]
    instances: list[Instance]

    def labels(self) -> np.ndarray:
        """Paints the instances of all classes in their order, later ones over earlier ones: uint16 [height, width].

        Raises:
            ValueError: If a segmentation is damaged.
        """
        labels = np.zeros(self.size, np.uint16)
        for instance in self.instances:
            if instance.label is not None:
                labels[instance.mask(*self.size)] = instance.label
        return labels

    def masks(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of the objects with this label, and those of crowd regions around them, bool [height, width].

        Raises:
            ValueError: If a segmentation is damaged.
        """
        objects, crowds = np.zeros((2, *self.size), bool)
        for instance in self.instances:
            if instance.label == label:
                (crowds if instance.crowd else objects)[instance.mask(*self.size)] = True
        return objects, crowds & ~objects


def read_instances(path: Path, label_of: Callable[[str], int | None], remedy: str) -> dict[str, Instances]:
    """Reads a COCO file of instances: those of each photo, by its file name.

    Args:
        path: The file.
        label_of: The label of the name of a category; None for categories that do not matter.
        remedy: What to do if the file is damaged.

    Raises:
        DamagedFile: If it cannot be read.
    """
    try:
        content = json.loads(read_bytes(path))
        _expect_unique((category["id"] for category in content["categories"]), "categories have the id")
        _expect_unique((image["id"] for image in content["images"]), "images have the id")
        _expect_unique(names := [_file_name(image) for image in content["images"]], "images have the file name")
        labels = {category["id"]: label_of(str(category["name"])) for category in content["categories"]}
        instances: dict[int, list[Instance]] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            if one["image_id"] not in instances:
                raise ValueError(f"annotation {one['id']} is of image {one['image_id']}, which is not listed")
            instance = Instance(
                labels[one["category_id"]], one.get("segmentation"), one["id"], bool(one.get("iscrowd", False))
            )
            instances[one["image_id"]].append(instance)
        photos = {}
        for name, image in zip(names, content["images"], strict=True):
            size = int(image["height"]), int(image["width"])
            if not Path(name).name:
                raise ValueError(f"image {image['id']} has the file name {name!r}")
            if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"image {image['id']} is {size[0]} x {size[1]} (height x width)")
            photos[name] = Instances(size, instances[image["id"]])
        return photos
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedFile(path, error, remedy=remedy) from None


def _file_name(image: Mapping[str, Any]) -> str:
    """The name of a photo in a COCO file.

    Label Studio's export of painted masks has the last part of the URL of the photo, and the URL itself as `path`.
    """
    name = str(image["file_name"])
    url = next((text for text in (str(image.get("path")), name) if LOCAL_FILE in text), None)
    return name if url is None else unquote(url.partition(LOCAL_FILE)[2], errors="surrogateescape")


def _expect_unique(values: Iterable, what: str) -> None:
    """Raises ValueError if a value occurs twice, as in a file that was joined from several."""
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"several {what} {repeated[0]!r}")


def _coco_truth(path: Path) -> dict[str, Truth]:
    """The ground truth of COCO 2017 by the file name of the photo."""
    known = {key_of(name): label for label, name in enumerate(category_names("coco2017") or [], 1)}

    def label_of(name: str) -> int:
        if key_of(name) not in known:
            raise UserError(f"{path}: {name!r} is not one of the 80 categories of COCO")
        return known[key_of(name)]

    photos = read_instances(path, label_of, "unpack annotations_trainval2017.zip again")
    return {name: Truth(f"{path}: {name}", photo.labels) for name, photo in photos.items()}


def _rasterized(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of a segmentation, which is a list of polygons, or an RLE with a list or a string of counts."""
    from pycocotools import mask as coco

    from ..masks import cover, run_lengths

    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in segmentation):
            raise ValueError("expected lists of x and y")
        # A polygon of less than three points covers nothing; pycocotools would take two points for a box.
        polygons = [np.asarray(polygon, float).tolist() for polygon in segmentation if len(polygon) >= 6]
        if not all(abs(value) <= MAX_COORDINATE for polygon in polygons for value in polygon):
            raise ValueError("a polygon has coordinates far outside the photo")
        if not polygons:
            return np.zeros((height, width), bool)
        return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).view(bool)
    counts = segmentation["counts"]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, that of its photo [{height}, {width}]")
    runs = run_lengths(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    if runs is None or not cover(runs, height * width):
        raise ValueError("its run lengths do not fit its size")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape(width, height).T


# -- folders ---------------------------------------------------------------------------------------------------------


def _base(root: Path, wanted: str, *bases: str, other: str = "") -> Path:
    """The first of the folders `bases` below the root that holds the folder `wanted` (or `other`)."""
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder; unpack the archives of the benchmark into one")
    for base in bases:
        if any((root / base / name).is_dir() for name in (wanted, other) if name):
            return root / base
    also = f", nor in {', '.join(base for base in bases if base)}" if any(bases) else ""
    raise UserError(f"--root {root}: there is no folder {wanted} in it{also}")


def _folder(base: Path, *names: str) -> Path:
    """The first of the folders that exists."""
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise UserError(f"there is no folder {base / names[0]}" + "".join(f", nor {base / name}" for name in names[1:]))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _expect_split(split: str | None, existing: list[str], where: Path, file: str = "") -> None:
    if split not in existing:
        found = f"there are {', '.join(existing)}" if existing else f"expected {file or split}"
        raise UserError(f"--split {split}: there is no such split in {where}; {found}")


def _is_photo(name: str) -> bool:
    return name.lower().endswith(PHOTO_SUFFIXES) and not name.startswith(".")


def _names_by_stem(folder: Path) -> dict[str, str]:
    return {stem: path.relative_to(folder).as_posix() for stem, path in by_stem(folder, *PHOTO_SUFFIXES).items()}


def _paired(
    folder: Path, photos: Mapping[str, str], truth: Mapping[str, Truth], categories: list[str] | None = None
) -> Split:
    """Pairs photos (names below `folder`) with ground truth of the same key."""
    pairs, without_truth = {}, []
    without_photo = [one.where for key, one in truth.items() if key not in photos]
    for key, name in photos.items():
        if not (folder / name).exists():
            without_photo.append(str(folder / name))
        elif key in truth:
            pairs[name] = truth[key]
        else:
            without_truth.append(str(folder / name))
    if not pairs:
        found = f"without ground truth: {len(without_truth)}, ground truth without photo: {len(without_photo)}"
        example = next((f", such as {path}" for path in (*without_truth, *without_photo)), "")
        raise UserError(f"there is no photo with ground truth in {folder} ({found}{example})")
    return Split(folder, dict(sorted(pairs.items())), without_truth, without_photo, categories)


def _imagenet_s(classes: int, photos: int, published: str) -> Benchmark:
    return Benchmark(partial(read_imagenet_s, classes=classes), photos, published, "val", classes, ignore=1000)


def _saliency(
    bases: tuple[str, ...], folders: tuple[str, str], photos: int, ious: tuple[float, float, float]
) -> Benchmark:
    voted, network, solved = ious
    published = (
        f"SelfMask IoU {network:.3f}, with the bilateral solver {solved:.3f}; cluster voting's pseudo-masks {voted:.3f}"
    )
    return Benchmark(partial(read_saliency, bases=bases, photos=folders[0], masks=folders[1]), photos, published)


_RELEASED = "with the authors' released weights"

BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "voc2012": Benchmark(
        read_voc,
        1449,
        f"NamedMask 59.3 mIoU (89.2 pixel accuracy) {_RELEASED}, 59.2 in the paper",
        "val",
        20,
        255,
    ),
    "coco2017": Benchmark(
        read_coco, 5000, f"NamedMask 27.7 mIoU (76.4 pixel accuracy) {_RELEASED}, 28.4 in the paper", "val", 80
    ),
    "coca": Benchmark(
        read_coca, 1295, f"NamedMask 27.4 mIoU (82.0 pixel accuracy) {_RELEASED}, 27.3 in the paper", classes=80
    ),
    "cityscapes-object": Benchmark(
        read_cityscapes, 500, f"NamedMask 18.2 mIoU (93.0 pixel accuracy) {_RELEASED}, 18.2 in the paper", "val", 14
    ),
    "imagenet-s50": _imagenet_s(50, 752, f"NamedMask 47.5 mIoU {_RELEASED} and in the paper, on the test split"),
    "imagenet-s300": _imagenet_s(300, 4097, f"NamedMask 33.1 mIoU {_RELEASED}, on the test split"),
    "imagenet-s919": _imagenet_s(919, 12419, f"NamedMask 23.1 mIoU {_RELEASED}, 22.9 in the paper, on the test split"),
    "ecssd": _saliency(("", "ECSSD"), ("images", "ground_truth_mask"), 1000, (0.646, 0.781, 0.818)),
    "duts-te": _saliency(
        ("", "DUTS-TE", "DUTS/DUTS-TE"), ("DUTS-TE-Image", "DUTS-TE-Mask"), 5019, (0.466, 0.626, 0.660)
    ),
    "dut-omron": _saliency(
        ("", "DUT-OMRON", "DUT_OMRON"), ("DUT-OMRON-image", "pixelwiseGT-new-PNG"), 5168, (0.403, 0.582, 0.655)
    ),
}
