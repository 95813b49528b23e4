# SPDX-License-Identifier: MIT
"""The affinity of normalized_cut as bits, for GPUs from sm_80 on; csrc/cuda/normalized_cut.cu goes on from there.

A tile of cosines is a sum of three float16 products on the tensor cores, as accurate as in float32
(normalized_rows.py), so no pair needs a second look. (One product, and a second look at pairs within its error of 1e-3
from tau, would take a third of the flops; but few of the tiles, of 16,384 pairs each, would be without such a pair.)
Tiles below the diagonal are mirrored, which makes the bits symmetric and halves the work. All tiles of all photos go
into one launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalized_rows import STEPS, NormalizedRows, cosines, steps_on, upper_tile, upper_tiles
from .tables import to_device

TILE = 128  # rows and columns; fixed by the layout of the bits, see normalized_cut.h


@triton.jit
def _connect(high, low, table, bits, threshold, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """bits of a tile and its mirror image; grid (tiles of the largest photo, photos).

    table: int64 [photos, 3], the photo's first token, its length, and its first word of bits
    """
    entry = table + 3 * tl.program_id(1)
    begin = tl.load(entry)
    length = tl.load(entry + 1).to(tl.int32)
    tiles = tl.cdiv(length, TILE)
    down, right = upper_tile(tl.program_id(0))
    if right < tiles:
        here = tl.arange(0, TILE)
        row = down * TILE + here
        column = right * TILE + here
        high += begin * row_stride
        low += begin * row_stride
        rows = tl.minimum(row, length - 1)
        columns = tl.minimum(column, length - 1)
        above = cosines(high, low, rows, columns, row_stride, TILE, TILE, CHANNELS) > threshold
        above = above & (row < length)[:, None] & (column < length)[None, :]
        above = above & ((row[:, None] <= column[None, :]) | (down < right))
        bit = tl.arange(0, 32)
        ones = above.to(tl.int32)
        words = tl.sum(tl.reshape(ones, [TILE, TILE // 32, 32]) << bit[None, None, :], 2)  # [row, word]
        turned = tl.trans(tl.sum(tl.reshape(ones, [TILE // 32, 32, TILE]) << bit[None, :, None], 1))  # [column, word]
        if down == right:
            words = words | turned
            turned = words
        size = tiles.to(tl.int64) * TILE
        word = tl.arange(0, TILE // 32)
        photo = bits + tl.load(entry + 2)
        tl.store(photo + ((right * size + row)[:, None] * 4 + word[None, :]), words)
        tl.store(photo + ((down * size + column)[:, None] * 4 + word[None, :]), turned)


def affinity_bits(unit: NormalizedRows, offsets: Tensor, tau: float) -> Tensor:
    """Which cosines exceed tau: the `bits` of normalized_cut.h, int32, in the order of the current stream.

    unit: of the tokens offsets[0] .. offsets[-1] of the batch; offsets int32 [B + 1] on the CPU
    """
    lengths = offsets.diff().long()
    words = ((lengths + TILE - 1) // TILE * TILE) ** 2 // 32
    bits = torch.empty(int(words.sum()), dtype=torch.int32, device=unit.high.device)
    if len(bits):
        table = to_device(torch.stack([offsets[:-1].long(), lengths, words.cumsum(0) - words], 1), unit.high)
        threshold = math.inf if tau >= 1 else tau  # nothing exceeds 1, whatever rounding says
        channels, options = steps_on(unit.high)
        _connect[upper_tiles(lengths, TILE), len(lengths)](
            unit.high, unit.low, table, bits, threshold, unit.high.shape[1], TILE=TILE, CHANNELS=channels, **options
        )
    return bits


def ahead_of_time() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], dict[str, int], int]]:
    """(label, kernel, argument types, constants, options, arch) of every variant that `affinity_bits` starts."""
    types = {"high": "*fp16", "low": "*fp16", "table": "*i64", "bits": "*i32", "threshold": "fp32", "row_stride": "i32"}
    for arch, (channels, options) in STEPS.items():
        yield "_connect", _connect, types, {"TILE": TILE, "CHANNELS": channels}, options, arch
