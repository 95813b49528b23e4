# SPDX-License-Identifier: MIT
"""The range of a photo's cosines, for GPUs from sm_80 on; csrc/cuda/spectral_clusters.cu goes on from there.

Tiles of cosines on and above the diagonal, as in normalized_cut.py; all that is kept of one is its least and
largest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalized_rows import STEPS, NormalizedRows, cosines, steps_on, upper_tile, upper_tiles
from .tables import to_device

TILE = 128


@triton.jit
def _range(high, low, table, ranges, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """ranges float32 [photos, tiles of the largest photo, 2]: a tile's least and largest cosine; grid (tiles, photos).

    table: int64 [photos, 2], the photo's first token and its length
    """
    entry = table + 2 * tl.program_id(1)
    begin = tl.load(entry)
    length = tl.load(entry + 1).to(tl.int32)
    down, right = upper_tile(tl.program_id(0))
    if right < tl.cdiv(length, TILE):
        high += begin * row_stride
        low += begin * row_stride
        here = tl.arange(0, TILE)
        rows = tl.minimum(down * TILE + here, length - 1)  # the last token again, which adds no new cosine
        columns = tl.minimum(right * TILE + here, length - 1)
        tile = cosines(high, low, rows, columns, row_stride, TILE, TILE, CHANNELS)
        at = ranges + 2 * (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0))
        tl.store(at, tl.min(tl.min(tile, 1), 0))
        tl.store(at + 1, tl.max(tl.max(tile, 1), 0))


def cosine_ranges(unit: NormalizedRows, offsets: Tensor) -> Tensor:
    """float32 [B, 2], the least and largest cosine of any two tokens of a photo, in the order of the current stream.

    offsets int32 [B + 1] on the CPU, from 0 on. A photo of no tokens has inf and -inf.
    """
    lengths = offsets.diff().long()
    tiles = upper_tiles(lengths, TILE)
    ranges = torch.tensor([torch.inf, -torch.inf], device=unit.high.device).repeat(len(lengths), max(tiles, 1), 1)
    if tiles:
        table = to_device(torch.stack([offsets[:-1].long(), lengths], 1), unit.high)
        channels, options = steps_on(unit.high)
        _range[tiles, len(lengths)](
            unit.high, unit.low, table, ranges, unit.high.shape[1], TILE=TILE, CHANNELS=channels, **options
        )
    return torch.stack([ranges[..., 0].amin(1), ranges[..., 1].amax(1)], 1)


def ahead_of_time() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], dict[str, int], int]]:
    """(label, kernel, argument types, constants, options, arch) of every variant that `cosine_ranges` starts."""
    types = {"high": "*fp16", "low": "*fp16", "table": "*i64", "ranges": "*fp32", "row_stride": "i32"}
    for arch, (channels, options) in STEPS.items():
        yield "_range", _range, types, {"TILE": TILE, "CHANNELS": channels}, options, arch
