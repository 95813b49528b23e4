# SPDX-License-Identifier: MIT
"""Batches of photos and masks of different sizes, on one device.

On a GPU, photos of equal size that follow each other are processed together. On a CPU, that would save nothing, and a
BLAS would sum in another order, so that results would depend on batch composition.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from namedmask_kernels import Ragged

Size = tuple[int, int]  # height, width


def sizes_of(batch: Ragged) -> list[Size]:
    """Height and width of each image of a batch."""
    return [(h, w) for h, w in batch.shapes.tolist()]


def upload(photos: Sequence[np.ndarray], device: torch.device) -> Ragged:
    """Packs photos, uint8 [H, W, 3], and copies them to a device; to a GPU without waiting for the copy."""
    shapes = [(photo.shape[0], photo.shape[1]) for photo in photos]
    rows = torch.empty(sum(h * w for h, w in shapes), 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
    batch = Ragged.of_shapes(rows, shapes)
    for grid, photo in zip(batch.grids(), photos, strict=True):
        grid.copy_(torch.from_numpy(photo))
    return batch.with_rows(rows.to(device, non_blocking=True))


def joins_equal_sizes(rows: Tensor) -> bool:
    """Whether images of equal size are processed together."""
    return rows.is_cuda


def runs(batch: Ragged) -> Iterator[Tensor]:
    """Yields the images of a batch in order, as [n, h, w, ...]: n consecutive ones of equal size, 1 on a CPU."""
    sizes, grids = sizes_of(batch), batch.grids()
    if not joins_equal_sizes(batch.rows):
        yield from (grid[None] for grid in grids)
        return
    begin = 0
    for size, group in itertools.groupby(sizes):
        end = begin + sum(1 for _ in group)
        first, last = int(batch.offsets[begin]), int(batch.offsets[end])
        yield batch.rows[first:last].unflatten(0, (end - begin, *size))
        begin = end


def flipped(batch: Ragged) -> Ragged:
    """The images of a batch, mirrored horizontally."""
    return batch.with_rows(torch.cat([batch.rows[:0], *(images.flip(2).flatten(0, 2) for images in runs(batch))]))


def on_rows(batch: Ragged, values: Tensor) -> Tensor:
    """A value per image [B, ...] as a value per row of the batch [T, ...]."""
    lengths = batch.offsets.diff().to(values.device)
    return values.repeat_interleave(lengths, dim=0, output_size=len(batch.rows))


def cropped(batch: Ragged, sizes: Sequence[Size]) -> Ragged:
    """The upper left part of each image, of the given size."""
    parts = [grid[:h, :w].flatten(0, 1) for grid, (h, w) in zip(batch.grids(), sizes, strict=True)]
    return Ragged.of_shapes(torch.cat([batch.rows[:0], *parts]), sizes)


def nearest(batch: Ragged, sizes: Sequence[Size]) -> Ragged:
    """The images of a batch at other sizes: the values of the nearest pixels, by Pillow's rule for ties."""
    if list(sizes) == sizes_of(batch):
        return batch
    indices = [np.zeros(0, np.int32)]
    for begin, (h, w), (new_h, new_w) in zip(batch.offsets[:-1].tolist(), sizes_of(batch), sizes, strict=True):
        rows, columns = _nearest(h, new_h), _nearest(w, new_w)
        indices.append((begin + rows[:, None] * w + columns).ravel().astype(np.int32))
    index = torch.from_numpy(np.concatenate(indices)).to(batch.rows.device)
    return Ragged.of_shapes(batch.rows[index], sizes)


def _nearest(old: int, new: int) -> np.ndarray:
    """The pixel of `old` that is nearest to each of `new`. Pillow adds up the steps, so the rounding of ties is its."""
    step = old / new
    return np.add.accumulate(np.r_[step / 2, np.full(new - 1, step)]).astype(np.int64)
