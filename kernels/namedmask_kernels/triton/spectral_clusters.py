# SPDX-License-Identifier: MIT
"""The range of an image's cosines for GPUs of compute capability 8.0 and later, the input of
csrc/cuda/spectral_clusters.cu.

Computes the tiles of cosines on and above the diagonal, as normalized_cut.py does, and keeps the minimum and maximum of
each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .normalized_rows import SCALE, STEPS, NormalizedRows, image_table, image_tile, steps_on, tile_cosines, upper_tiles
from .tables import Variant, table_on_device

TILE = 128


@triton.jit
def _range(high, low, table, ranges, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """ranges float32 [images, tiles of the largest image, 2]: minimum and maximum of a tile; grid (tiles, images).

    table: that of image_table
    """
    begin, length, down, right = image_tile(table, TILE)
    if right < tl.cdiv(length, TILE):
        tile = tile_cosines(high, low, begin, length, down, right, row_stride, TILE, CHANNELS)
        at = ranges + 2 * (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0))
        tl.store(at, tl.min(tl.min(tile, 1), 0) * (1 / SCALE))
        tl.store(at + 1, tl.max(tl.max(tile, 1), 0) * (1 / SCALE))


def cosine_ranges(unit: NormalizedRows, offsets: Tensor) -> Tensor:
    """Computes the minimum and maximum cosine between any two tokens of each image, on the current stream.

    Args:
        unit: Of all tokens of the batch.
        offsets: int32 [B + 1] on the CPU, from 0.

    Returns:
        float32 [B, 2]; (inf, -inf) for an image without tokens.
    """
    lengths = np.diff(offsets.numpy())
    tiles = upper_tiles(lengths, TILE)
    ranges = torch.empty(len(lengths), max(tiles, 1), 2, dtype=torch.float32, device=unit.high.device)
    ranges[..., 0], ranges[..., 1] = torch.inf, -torch.inf
    if tiles:
        table = table_on_device(image_table, unit.high, offsets, TILE)
        channels, options = steps_on(STEPS, unit.high)
        launch(
            _range, (tiles, len(lengths)),
            unit.high, unit.low, table, ranges, unit.high.shape[1], TILE=TILE, CHANNELS=channels, **options
        )  # fmt: skip
    return torch.stack([ranges[..., 0].amin(1), ranges[..., 1].amax(1)], 1)


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `cosine_ranges` launches."""
    types = {"high": "*fp16", "low": "*fp16", "table": "*i64", "ranges": "*fp32", "row_stride": "i32"}
    for arch, (channels, options) in STEPS.items():
        yield Variant("_range", _range, types, {"TILE": TILE, "CHANNELS": channels}, options, (arch,))
