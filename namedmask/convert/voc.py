# SPDX-License-Identifier: MIT
"""PASCAL VOC: VOCdevkit/VOC2012 with label maps of classes and of objects."""

from __future__ import annotations

import re

from ..errors import UserError
from ..formats import JPEG_SIDE, encode_jpeg, encode_label_map, label_palette
from .dataset import JPEG_QUALITY, TRAIN, VAL, Dataset, Item, printable
from .png import list_photos

ROOT = "VOCdevkit/VOC2012"  # where torchvision's VOCSegmentation looks for the year 2012


def write(dataset: Dataset) -> None:
    """Writes JPEGImages, SegmentationClass, SegmentationObject, ImageSets/Segmentation and labelmap.txt.

    Readers expect NAME.jpg: photos in other formats are encoded as JPEG. Objects have no border of class 255.
    """
    if len(dataset.categories) > 254:
        raise UserError(f"--to voc takes 254 categories, not {len(dataset.categories)}: 255 stands for no class there")

    def labels(item: Item) -> None:
        path = dataset.folder / ROOT / "JPEGImages" / f"{item.name}.jpg"
        dataset.place(item, path, None if item.file.endswith(".jpg") else _jpeg(dataset, item))
        classes, objects = dataset.label_map(item), dataset.label_map(item, objects=True)
        for folder, labels in (("SegmentationClass", classes), ("SegmentationObject", objects)):
            data = encode_label_map(labels, 256, dataset.options.gray)
            dataset.write(f"{ROOT}/{folder}/{item.name}.png", data)

    for _ in dataset.map(labels):
        pass
    sets = {split: [split] for split in dataset.splits}
    if VAL in sets:
        sets["trainval"] = [split for split in (TRAIN, VAL) if split in sets]
    for name, splits in sets.items():
        names = (item for split in splits for item in dataset.map(lambda item: item.name, split))
        dataset.write_lines(f"{ROOT}/ImageSets/Segmentation/{name}.txt", names)
    colors = enumerate(["background", *dataset.categories])
    rows = (f"{_label(name)}:{','.join(map(str, label_palette()[number]))}::" for number, name in colors)
    dataset.write_lines("labelmap.txt", rows, begin="# label:color_rgb:parts:actions\n")
    list_photos(dataset)


def _label(name: str) -> str:
    """The name of a class without what has a meaning in labelmap.txt."""
    return re.sub(r"^#|[:\r\n]", "_", printable(name))


def _jpeg(dataset: Dataset, item: Item) -> bytes:
    if max(item.size) > JPEG_SIDE:
        raise UserError(
            f"{item.photo!r} has a side of {max(item.size):,} pixels; --to voc needs a JPEG, which has at most "
            f"{JPEG_SIDE:,}: choose another format, such as --to png"
        )
    return encode_jpeg(dataset.pixels(item), JPEG_QUALITY)
