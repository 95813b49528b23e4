# SPDX-License-Identifier: MIT
"""WebDataset: tars in which NAME.jpg, NAME.seg.png and NAME.json stand together."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice

from ..files import writing
from ..formats import encode_label_map
from .dataset import Dataset, Item, printable

PER_FILE = 1000  # photos


def write(dataset: Dataset) -> None:
    """Writes SPLIT-000000.tar and so on, and categories.json with the names of classes 1, 2, ..."""

    def members(item: Item) -> list[tuple[str, bytes]]:
        labels = encode_label_map(dataset.label_map(item), len(dataset.categories) + 1, dataset.options.gray)
        masks = []
        for record in item.masks:
            fields = {"category": record.category, "id": dataset.ids[record.category], "area": record.area}
            fields |= {"bbox": record.bbox, "segmentation": {"size": record.size, "counts": record.rle}}
            masks.append(fields | ({"score": record.score} if dataset.has_scores else {}))
        height, width = item.size
        about = {"photo": printable(item.photo), "width": width, "height": height, "objects": masks}
        return [
            (item.file, dataset.photo_bytes(item)),
            (f"{item.name}.seg.png", labels),
            (f"{item.name}.json", json.dumps(about).encode()),
        ]

    for split, photos in dataset.splits.items():
        samples = dataset.map(members, split)
        for number in range(-(-len(photos) // PER_FILE)):
            path = dataset.folder / f"{split}-{number:06}.tar"
            with writing(path), tarfile.open(path, "w", encoding="utf-8") as tar:
                for name, data in (member for sample in islice(samples, PER_FILE) for member in sample):
                    info = tarfile.TarInfo(name)  # with time, user and group 0
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    dataset.write_json("categories.json", {"categories": dataset.categories})
