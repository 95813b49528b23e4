# SPDX-License-Identifier: MIT
"""Label maps as PNG files: masks/SPLIT/NAME.png."""

from __future__ import annotations

import json

from ..formats import encode_label_map
from .dataset import Dataset, Item


def write(dataset: Dataset) -> None:
    """Writes a label map per photo, categories.json with the names of classes 1, 2, ..., and photos.jsonl."""

    def labels(item: Item) -> None:
        if dataset.mode != "path":
            dataset.reference(item)
        data = encode_label_map(dataset.label_map(item), len(dataset.categories) + 1, dataset.options.gray)
        dataset.write(f"masks/{item.split}/{item.name}.png", data)

    for _ in dataset.map(labels):
        pass
    dataset.write_json("categories.json", {"categories": dataset.categories})
    list_photos(dataset)


def list_photos(dataset: Dataset) -> None:
    """Writes photos.jsonl: the photo that each NAME stands for."""

    def line(item: Item) -> str:
        return json.dumps({"photo": item.photo, "split": item.split, "name": item.name})

    dataset.write_lines("photos.jsonl", dataset.map(line))
