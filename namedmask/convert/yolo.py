# SPDX-License-Identifier: MIT
"""The data sets of ultralytics: polygons for instance segmentation, label maps for semantic segmentation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from ..errors import UserError
from ..formats import BACKGROUND, encode, encode_label_map
from .dataset import TRAIN, VAL, Dataset, Item, printable
from .png import list_photos

# Added to the integer coordinates of a pixel: ultralytics cuts the fraction off and supervision rounds, to the same.
WITHIN_PIXEL = 0.25
CANDIDATES = 4000  # points at which lines between contours may start and end
CHUNK = 256  # points of a contour that are compared with those of all others at once


def write_segments(dataset: Dataset) -> None:
    """Writes labels/SPLIT/NAME.txt with one polygon per mask, and data.yaml. Classes start from 0."""

    def labels(item: Item) -> None:
        _place(dataset, item)
        height, width = item.size
        lines = []
        for record in item.masks:
            points = (polygon(record.mask()) + WITHIN_PIXEL) / (width, height)
            coordinates = " ".join(f"{value:.6f}" for value in points.ravel())
            lines.append(f"{dataset.ids[record.category] - 1} {coordinates}\n")
        dataset.write(f"labels/{item.split}/{item.name}.txt", "".join(lines).encode())

    _expect_cv2()
    for _ in dataset.map(labels):
        pass
    _write_yaml(dataset, dataset.categories)
    list_photos(dataset)


def write_label_maps(dataset: Dataset) -> None:
    """Writes masks/SPLIT/NAME.png, 8-bit grayscale with class 0 as the background, and data.yaml."""
    if len(dataset.categories) > 254:
        raise UserError(f"--to yolo-semantic takes 254 categories, not {len(dataset.categories)}: 255 is ignored there")

    def labels(item: Item) -> None:
        _place(dataset, item)
        data = encode_label_map(dataset.label_map(item), len(dataset.categories) + 1, gray=True)
        dataset.write(f"masks/{item.split}/{item.name}.png", data)

    for _ in dataset.map(labels):
        pass
    _write_yaml(dataset, [BACKGROUND, *dataset.categories], "masks_dir: masks\n")
    list_photos(dataset)


def _place(dataset: Dataset, item: Item) -> None:
    """Puts a photo into images/SPLIT; a GIF as PNG, as ultralytics skips files in formats that it does not read."""
    if item.file.endswith(".gif"):
        path = dataset.folder / "images" / item.split / f"{item.name}.png"
        dataset.place(item, path, encode(Image.fromarray(dataset.pixels(item)), "png"))
    else:
        dataset.reference(item)


def _write_yaml(dataset: Dataset, names: Sequence[str], more: str = "") -> None:
    """Writes data.yaml; its paths start from its folder. Ultralytics requires `train` and `val`: where there is no such
    split, it is the first one that there is."""
    folders = {split: f"images/{split}" for split in dataset.splits}
    first = next(iter(folders.values()))
    lines = [f"{split}: {folder}\n" for split, folder in ({TRAIN: first, VAL: first} | folders).items()]
    lines += [
        more,
        "names:\n",
        *(f"  {k}: {json.dumps(printable(name), ensure_ascii=False)}\n" for k, name in enumerate(names)),
    ]
    dataset.write("data.yaml", "".join(lines).encode())


def _expect_cv2() -> None:
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to yolo-seg needs OpenCV (pip install 'namedmask[yolo]'): {error}") from None


def polygon(mask: np.ndarray) -> np.ndarray:
    """A mask as a single polygon through its border pixels.

    Its parts and holes are joined by the shortest lines, which are followed in both directions. `cv2.fillPoly`, with
    which the readers of the format draw polygons, restores the mask, holes included, except that the lines between
    separate parts belong to it.

    Args:
        mask: Mask with at least one pixel, bool [H, W].

    Returns:
        Points (x, y), int64 [n, 2], n >= 3.
    """
    import cv2

    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    points = np.concatenate(contours).reshape(-1, 2).astype(np.int64)
    ends = np.cumsum([len(contour) for contour in contours])
    visited = points[_traversal(points, ends - [len(contour) for contour in contours], ends)]
    return np.concatenate([visited, np.repeat(visited[-1:], max(0, 3 - len(visited)), axis=0)])


def _traversal(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    """The order in which to visit the points of closed contours, each a range of `points`, without lifting the pen."""
    branches = _spanning_tree(points, starts, ends)
    order: list[int] = []
    stack = [_around(0, starts, ends)]
    while stack:
        point = next(stack[-1], None)
        if point is None:
            stack.pop()
            continue
        order.append(point)
        for other in branches.pop(point, ()):
            stack.append(iter((point,)))
            stack.append(_around(other, starts, ends))
    return order


def _around(point: int, starts: np.ndarray, ends: np.ndarray) -> Iterator[int]:
    """The points of a contour from one of them to the same one."""
    contour = np.searchsorted(ends, point, side="right")
    yield from range(point, ends[contour])
    yield from range(starts[contour], point + (ends[contour] - starts[contour] > 1))


def _spanning_tree(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> dict[int, list[int]]:
    """Joins contours by the shortest lines (Prim's algorithm); the first one is the root.

    Of masks with more than `CANDIDATES` points, lines start and end at every second, third, ... point of a contour.

    Returns:
        For points of contours, the points of further contours at which lines from there end.
    """
    place = np.arange(len(points)) - np.repeat(starts, ends - starts)
    candidates = np.flatnonzero(place % (1 + len(points) // CANDIDATES) == 0)
    contours = np.searchsorted(ends, candidates, side="right")
    branches: dict[int, list[int]] = {}
    distance, nearest = np.full(len(candidates), np.inf), np.zeros(len(candidates), np.int64)
    left = np.ones(len(candidates), bool)  # whether the contour is not joined yet
    new = 0
    for _ in range(len(ends) - 1):
        left[contours == new] = False
        others = np.flatnonzero(left)
        own = candidates[contours == new]
        for some in np.split(own, range(CHUNK, len(own), CHUNK)):
            squares = ((points[candidates[others], None] - points[some]) ** 2).sum(2)
            closest = squares.argmin(1)
            squares = squares[np.arange(len(others)), closest]
            closer = squares < distance[others]
            distance[others[closer]], nearest[others[closer]] = squares[closer], some[closest[closer]]
        best = others[distance[others].argmin()]
        branches.setdefault(int(nearest[best]), []).append(int(candidates[best]))
        new = contours[best]
    return branches
