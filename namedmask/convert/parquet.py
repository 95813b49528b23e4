# SPDX-License-Identifier: MIT
"""Parquet for Hugging Face datasets: photo, label map and masks of a photo in one row."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from ..errors import UserError
from ..files import writing
from ..formats import BACKGROUND, encode_label_map
from .dataset import Dataset, Item, printable

PER_FILE = 500  # photos
PER_GROUP = 32  # photos that are held in memory


def write(dataset: Dataset) -> None:
    """Writes data/SPLIT-00000-of-00001.parquet and so on. The names of categories are in the schema."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"--to parquet needs pyarrow (pip install 'namedmask[parquet]'): {error}") from None
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = {"category": pa.int64(), "score": pa.float32(), "area": pa.int64(), "bbox": pa.list_(pa.int64())}
    objects = pa.list_(pa.struct({**fields, "rle": pa.string()}))
    schema = pa.schema({"image": image, "labels": image, "objects": objects, "photo": pa.string()})
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": _features(dataset.categories)}})})

    def row(item: Item) -> dict[str, Any]:
        labels = encode_label_map(dataset.label_map(item), len(dataset.categories) + 1, dataset.options.gray)
        masks = [
            {
                "category": dataset.ids[record.category],
                "score": record.score if dataset.has_scores else None,
                "area": record.area,
                "bbox": record.bbox,
                "rle": record.rle,
            }
            for record in item.masks
        ]
        return {
            "image": {"bytes": dataset.photo_bytes(item), "path": item.file},
            "labels": {"bytes": labels, "path": f"{item.name}.png"},
            "objects": masks,
            "photo": printable(item.photo),
        }

    (dataset.folder / "data").mkdir()
    for split, photos in dataset.splits.items():
        rows = dataset.map(row, split)
        files = -(-len(photos) // PER_FILE)
        for number in range(files):
            path = dataset.folder / "data" / f"{split}-{number:05}-of-{files:05}.parquet"
            with writing(path), pq.ParquetWriter(path, schema) as writer:
                own = islice(rows, PER_FILE)
                while group := list(islice(own, PER_GROUP)):
                    writer.write_table(pa.Table.from_pylist(group, schema))


def _features(categories: list[str]) -> dict[str, Any]:
    """The types of the columns as `datasets` stores them."""

    def value(kind: str) -> dict[str, Any]:
        return {"dtype": kind, "_type": "Value"}

    masks = {
        "category": {"names": [BACKGROUND, *categories], "_type": "ClassLabel"},
        "score": value("float32"),
        "area": value("int64"),
        "bbox": [value("int64")],
        "rle": value("string"),
    }
    return {"image": {"_type": "Image"}, "labels": {"_type": "Image"}, "objects": [masks], "photo": value("string")}
