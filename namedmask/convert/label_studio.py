# SPDX-License-Identifier: MIT
"""Label Studio: tasks with the masks as predictions, in its brush format, and the labeling configuration."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from .cvat import row_runs
from .dataset import Dataset, Item, printable

RLE_SIZES = (3, 4, 8, 16)  # bits that a run length may have
LONGEST = 1 << RLE_SIZES[-1]


def write(dataset: Dataset) -> None:
    """Writes SPLIT.json and labels.xml. Photos are served by Label Studio's local storage."""

    def task(item: Item) -> str:
        folder = "" if dataset.mode == "path" else "images/"
        path = quote(os.fsencode(folder + dataset.reference(item)))
        (height, width), results = item.size, []
        for record in item.masks:
            value = {"format": "rle", "rle": brush_rle(record.mask()), "brushlabels": [printable(record.category)]}
            result: dict[str, Any] = {"id": f"{dataset.ids[record.category]}", "type": "brushlabels", "value": value}
            result |= {"from_name": "label", "to_name": "image", "image_rotation": 0}
            result |= {"original_width": width, "original_height": height}
            results.append(result | ({"score": record.score} if dataset.has_scores else {}))
        prediction: dict[str, Any] = {"model_version": "namedmask", "result": results}
        if dataset.has_scores and item.masks:
            prediction["score"] = min(record.score for record in item.masks)
        data = {"image": f"/data/local-files/?d={path}", "photo": printable(item.photo)}
        return json.dumps({"id": item.number, "data": data, "predictions": [prediction]})

    for split in dataset.splits:
        dataset.write_lines(f"{split}.json", dataset.map(task, split), begin="[\n", between=",\n", end="\n]\n")
    labels = "".join(f"    <Label value={quoteattr(printable(name))}/>\n" for name in dataset.categories)
    brush = f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n'
    config = f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{brush}</View>\n'
    dataset.write("labels.xml", config.encode())


def brush_rle(mask: np.ndarray) -> list[int]:
    """A mask in the RLE of Label Studio's brush, as bytes.

    It encodes the values of an RGBA image, four per pixel, 255 in the mask and 0 elsewhere: 32 bits for their number,
    5 bits for the bits of a value - 1, four times 4 bits for `RLE_SIZES` - 1, then the runs. A run has a bit 1, two
    bits for which of `RLE_SIZES` its length has, the length - 1, and the value.

    Args:
        mask: Mask, bool [H, W].
    """
    runs = np.array(row_runs(mask), np.int64) * 4
    values = np.arange(len(runs)) % 2 * 255
    pieces = np.maximum(1, -(-runs // LONGEST))  # a run that is too long is cut
    values = np.repeat(values, pieces)
    lengths = np.full(pieces.sum(), LONGEST)
    lengths[np.cumsum(pieces) - 1] = runs - (pieces - 1) * LONGEST
    values, lengths = values[lengths > 0], lengths[lengths > 0]
    size = np.searchsorted([1 << bits for bits in RLE_SIZES], lengths)  # the smallest that holds length - 1
    bits = np.array(RLE_SIZES)[size]
    words = ((1 << 2 | size) << bits | lengths - 1) << 8 | values  # of bits + 11 bits
    columns = np.arange(27)  # at most 16 + 11 bits, the highest first
    used = columns < (bits + 11)[:, None]
    stream = (words[:, None] >> (bits[:, None] + 10 - columns).clip(0) & 1)[used]
    head = f"{4 * mask.size:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in RLE_SIZES)
    return np.packbits(np.concatenate([[int(bit) for bit in head], stream]).astype(np.uint8)).tolist()
