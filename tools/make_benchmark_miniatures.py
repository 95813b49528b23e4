#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes a miniature of each benchmark that `namedmask evaluate --benchmark` reads.

    python tools/make_benchmark_miniatures.py OUT [BENCHMARK ...]

Folders, file names and label formats are those of the unpacked archives; photos are noise of a few pixels, two or three
per benchmark. The label maps are written here by hand, so that scores can be computed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from namedmask.formats import label_palette

HEIGHT, WIDTH = 4, 6  # of the photos with label maps


def _photo(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def _png(path: Path, pixels: object, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette(label_palette().tobytes())
    image.save(path)


def voc2012(root: Path) -> None:
    """Indexed PNGs with the contour label 255, and a list per split."""
    base = root / "VOCdevkit" / "VOC2012"
    labels = {
        "2007_000033": [[0, 0, 1, 1, 255, 0], [0, 0, 1, 1, 255, 0], [0, 0, 1, 1, 255, 0], [0, 0, 0, 0, 0, 0]],
        "2007_000042": [[15, 15, 15, 0, 0, 0], [15, 15, 15, 0, 0, 0], [20, 20, 0, 0, 0, 0], [255, 255, 255, 255, 0, 0]],
    }
    for name, rows in labels.items():
        _photo(base / "JPEGImages" / f"{name}.jpg")
        _png(base / "SegmentationClass" / f"{name}.png", rows, palette=True)
    _photo(base / "JPEGImages" / "2008_000001.jpg")  # of no list of the segmentation task
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000033\n2007_000042\n")
    (lists / "train.txt").write_text("2007_000033\n")


def coco2017(root: Path) -> None:
    """Polygons, and run lengths as a list, as a string and of a crowd; two instances overlap, in both orders."""
    numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 27, 28, 31, 32]
    numbers += [33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59]
    numbers += [60, 61, 62, 63, 64, 65, 67, 70, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 84, 85, 86, 87, 88, 89, 90]
    presets = Path(__file__).parents[1] / "namedmask" / "presets" / "categories.json"
    names = json.loads(presets.read_text(encoding="utf-8"))["coco2017"]["names"]
    left = [[0, 0, 4, 0, 4, 4, 0, 4]]  # a polygon of columns 0 to 3
    top = {"size": [HEIGHT, WIDTH], "counts": [8, 2, 2, 2, 10]}  # rows 0 and 1 of columns 2 and 3
    right = {"size": [HEIGHT, WIDTH], "counts": "d04"}  # column 5: 20 pixels without, 4 pixels with the object
    crowd = {"size": [HEIGHT, WIDTH], "counts": [16, 4, 4]}  # column 4
    annotations = [
        {"image_id": 139, "category_id": 1, "segmentation": left, "iscrowd": 0},
        {"image_id": 139, "category_id": 18, "segmentation": top, "iscrowd": 0},
        {"image_id": 285, "category_id": 18, "segmentation": top, "iscrowd": 0},
        {"image_id": 285, "category_id": 1, "segmentation": left, "iscrowd": 0},
        {"image_id": 139, "category_id": 90, "segmentation": right, "iscrowd": 0},
        {"image_id": 139, "category_id": 1, "segmentation": crowd, "iscrowd": 1},
    ]
    images = [{"id": n, "file_name": f"{n:012}.jpg", "height": HEIGHT, "width": WIDTH} for n in (285, 139, 632)]
    content = {
        "images": images,
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": n, "name": name} for n, name in zip(numbers, names, strict=True)],
    }
    for image in images:
        _photo(root / "val2017" / image["file_name"])
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def coca(root: Path) -> None:
    """Masks of 0 and 255 in class folders, two photos with the same file name."""
    masks = {
        "Accordion/51499": [[255, 255, 0, 0, 0, 0]] * 4,
        "whisk/51499": [[0, 0, 0, 0, 255, 255]] * 4,
        "Yellow duck/7": [[255, 255, 255, 0, 0, 0]] * 2 + [[0] * 6] * 2,
    }
    for name, rows in masks.items():
        _photo(root / "image" / f"{name}.jpg")
        _png(root / "binary" / f"{name}.png", rows)


def cityscapes_object(root: Path) -> None:
    """labelIds of two cities: road (7), out of roi (3), license plate (255) and unlabeled (0) are background."""
    labels = {
        "frankfurt/frankfurt_000000_000294": [[17, 7, 7, 7, 7, 26], [17, 7, 7, 7, 26, 26], [3] * 6, [3] * 6],
        "munster/munster_000001_000019": [[33, 33, 0, 0, 255, 7]] * 2 + [[24, 24, 24, 7, 7, 7]] * 2,
    }
    for name, rows in labels.items():
        _photo(root / "leftImg8bit" / "val" / f"{name}_leftImg8bit.png")
        _png(root / "gtFine" / "val" / f"{name}_gtFine_labelIds.png", rows)
        _png(root / "gtFine" / "val" / f"{name}_gtFine_color.png", np.zeros((HEIGHT, WIDTH, 4)))
    (root / "leftImg8bit" / "train").mkdir()


def imagenet_s(root: Path, classes: int) -> None:
    """Color files with the id R + 256 G: class 2, the last class, and 1000 for ignored pixels."""
    base = root / f"ImageNetS{classes}"
    wordnet_ids = [f"n{10_000_000 + 3 * number:08}" for number in range(1, classes + 1)]
    labels = {
        f"{wordnet_ids[1]}/ILSVRC2012_val_00000007": [[2, 2, 0, 0, 1000, 1000]] * 4,
        f"{wordnet_ids[-1]}/ILSVRC2012_val_00000012": [[classes, classes, classes, 0, 0, 0]] * 4,
    }
    for folder in wordnet_ids:
        (base / "validation" / folder).mkdir(parents=True)
    for name, rows in labels.items():
        ids = np.array(rows)
        _photo(base / "validation" / f"{name}.JPEG")
        _png(base / "validation-segmentation" / f"{name}.png", np.stack([ids % 256, ids // 256, 0 * ids], -1))
    _photo(base / "test" / wordnet_ids[0] / "ILSVRC2012_val_00000003.JPEG")


def _salient(root: Path, photos: str, masks: str, names: tuple[str, str]) -> None:
    """A mask of 0 and 255, and one with the gray edges that resizing leaves."""
    square = np.zeros((32, 48), np.uint8)
    square[8:24, 8:24] = 255
    soft = np.zeros((32, 48), np.uint8)
    soft[:, 24:] = 255
    soft[:, 23] = 100
    for name, mask in zip(names, (square, soft), strict=True):
        _photo(root / photos / f"{name}.jpg", mask.shape)
        _png(root / masks / f"{name}.png", mask)


WRITERS: dict[str, Callable[[Path], None]] = {
    "voc2012": voc2012,
    "coco2017": coco2017,
    "coca": coca,
    "cityscapes-object": cityscapes_object,
    "imagenet-s50": lambda root: imagenet_s(root, 50),
    "imagenet-s300": lambda root: imagenet_s(root, 300),
    "imagenet-s919": lambda root: imagenet_s(root, 919),
    "ecssd": lambda root: _salient(root / "ECSSD", "images", "ground_truth_mask", ("0001", "0002")),
    "duts-te": lambda root: _salient(root / "DUTS-TE", "DUTS-TE-Image", "DUTS-TE-Mask", ("sun_a", "sun_b")),
    "dut-omron": lambda root: _salient(root, "DUT-OMRON-image", "pixelwiseGT-new-PNG", ("im005", "im006")),
}


def write(benchmark: str, out: Path) -> Path:
    """Writes the miniature of a benchmark below a folder; returns what to pass as --root."""
    root = out / benchmark
    root.mkdir(parents=True)
    WRITERS[benchmark](root)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK")
    options = parser.parse_args()
    for benchmark in options.benchmarks or WRITERS:
        print(write(benchmark, options.out))


if __name__ == "__main__":
    main()
