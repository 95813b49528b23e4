# SPDX-License-Identifier: MIT
"""COCO: annotations/instances_SPLIT.json with the masks as compressed RLE strings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .dataset import Dataset, Item


def write(dataset: Dataset) -> None:
    """Writes a file of annotations per split. Ids are unique over all splits and start from 1.

    An annotation has the field `score`, an image the field `photo`, its name in the source: readers ignore them.
    """

    def image(item: Item) -> str:
        height, width = item.size
        name = dataset.reference(item)
        return json.dumps({"id": item.number, "file_name": name, "width": width, "height": height, "photo": item.photo})

    def annotations(item: Item) -> list[str]:
        lines = []
        for number, record in enumerate(item.masks, item.first):
            fields: dict[str, Any] = {
                "id": number,
                "image_id": item.number,
                "category_id": dataset.ids[record.category],
            }
            fields |= {"segmentation": {"size": record.size, "counts": record.rle}, "area": record.area}
            fields |= {"bbox": record.bbox, "iscrowd": 0}
            lines.append(json.dumps(fields | ({"score": record.score} if dataset.has_scores else {})))
        return lines

    def parts(split: str) -> Iterator[str]:
        categories = [{"id": number, "name": name, "supercategory": ""} for name, number in dataset.ids.items()]
        head = {"info": {"description": "Masks by NamedMask"}, "licenses": [], "categories": categories}
        yield json.dumps(head)[:-1] + ',\n"images": ['
        yield from _separated(dataset.map(image, split))
        yield '],\n"annotations": ['
        yield from _separated(line for lines in dataset.map(annotations, split) for line in lines)
        yield "]}"

    for split in dataset.splits:
        dataset.write_lines(f"annotations/instances_{split}.json", parts(split))


def _separated(lines: Iterator[str]) -> Iterator[str]:
    """The elements of a JSON list, a comma after each but the last."""
    last = next(lines, None)
    for line in lines:
        yield f"{last},"
        last = line
    if last is not None:
        yield last
