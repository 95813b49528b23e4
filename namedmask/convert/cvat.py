# SPDX-License-Identifier: MIT
"""CVAT for images 1.1: an XML file per split, masks as run lengths in their boxes."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from .dataset import Dataset, Item, printable


def write(dataset: Dataset) -> None:
    """Writes SPLIT.xml. CVAT finds the photo of an image by its name; it has no place for scores."""

    def image(item: Item) -> str:
        (height, width), name = item.size, _attribute(dataset.reference(item))
        lines = [f'  <image id="{item.number - 1}" name={name} width="{width}" height="{height}">']
        for record in item.masks:
            x, y, w, h = record.bbox
            rle = ", ".join(map(str, row_runs(record.mask()[y : y + h, x : x + w])))
            lines.append(
                f'    <mask label={_attribute(record.category)} source="auto" occluded="0" rle="{rle}" left="{x}" '
                f'top="{y}" width="{w}" height="{h}" z_order="0">\n    </mask>'
            )
        return "\n".join([*lines, "  </image>"])

    def parts(split: str) -> Iterator[str]:
        yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>'
        yield f"      <name>{split}</name>\n      <size>{len(dataset.splits[split])}</size>"
        yield "      <mode>annotation</mode>\n      <labels>"
        for name in dataset.categories:
            yield f"        <label><name>{escape(printable(name))}</name><type>mask</type></label>"
        yield "      </labels>\n    </task>\n  </meta>"
        yield from dataset.map(image, split)
        yield "</annotations>"

    for split in dataset.splits:
        dataset.write_lines(f"{split}.xml", parts(split))


def row_runs(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, bool [H, W], row by row; the first is that of the background, which may be 0."""
    pixels = mask.ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(pixels)]])).tolist()
    return [0, *runs] if pixels[0] else runs


def _attribute(text: str) -> str:
    return quoteattr(printable(text))
