# SPDX-License-Identifier: MIT
"""The affinity of normalized_cut as bits, for GPUs of compute capability 8.0 and later, the input of
csrc/cuda/normalized_cut.cu.

A tile of cosines is a sum of three float16 products on the tensor cores, as accurate as in float32
(normalized_rows.py), so no pair has to be recomputed. (One product, with pairs closer to tau than its error of 1e-3
recomputed, would take a third of the flops; but few of the tiles, of 16,384 pairs each, would have no such pair.) Tiles
below the diagonal are copied from those above, which makes the bits symmetric and halves the work. One launch computes
all tiles of all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .normalized_rows import (
    SCALE,
    STEPS,
    NormalizedRows,
    image_table,
    image_tile,
    square_sizes,
    steps_on,
    tile_cosines,
    upper_tiles,
)
from .tables import Variant, table_on_device

TILE = 128  # rows and columns; fixed by the layout of the bits, see normalized_cut.h


@triton.jit
def _bits_from(first):
    """uint32: bit k is set if k >= first."""
    first = tl.minimum(tl.maximum(first, 0), 32).to(tl.uint64)
    return (tl.full(first.shape, 0xFFFFFFFF, tl.uint64) << first).to(tl.uint32)


@triton.jit
def _connect(high, low, table, bits, threshold, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """The bits of a tile and of its transpose; grid (tiles of the largest image, images).

    table: that of image_table
    """
    begin, length, down, right = image_tile(table, TILE)
    tiles = tl.cdiv(length, TILE)
    if right < tiles:
        products = tile_cosines(high, low, begin, length, down, right, row_stride, TILE, CHANNELS)
        row = down * TILE + tl.arange(0, TILE)
        column = right * TILE + tl.arange(0, TILE)
        above = tl.reshape(products > threshold * SCALE, [TILE, TILE // 32, 32])
        bit = tl.arange(0, 32)
        one = tl.full([32], 1, tl.uint32) << bit.to(tl.uint32)
        word = tl.arange(0, TILE // 32)
        words = tl.sum(tl.where(above, one[None, None, :], 0), 2)  # [row, word]
        # Words, of which there are few, are cleared instead of pairs: outside of the image and below the diagonal.
        first_bit = right * TILE + 32 * word
        begins = tl.where((row < length)[:, None], row[:, None] - first_bit[None, :], 32)
        words &= _bits_from(begins) ^ _bits_from(tl.maximum(begins, (length - first_bit)[None, :]))
        squares = tl.reshape(words, [TILE // 32, 32, TILE // 32])  # [word of the transpose, bit of it, word]
        is_set = (squares[:, :, :, None] >> bit.to(tl.uint32)[None, None, None, :]) & 1
        transposed = tl.sum(tl.where(is_set != 0, one[None, :, None, None], 0), 1)
        transposed = tl.reshape(tl.permute(transposed, [1, 2, 0]), [TILE, TILE // 32])  # [column, word]
        if down == right:
            words |= transposed
            transposed = words
        size = tiles.to(tl.int64) * TILE
        own = bits + tl.load(table + 3 * tl.program_id(1) + 2) // 32
        tl.store(own + ((right * size + row)[:, None] * 4 + word[None, :]), words)
        tl.store(own + ((down * size + column)[:, None] * 4 + word[None, :]), transposed)


def affinity_bits(unit: NormalizedRows, offsets: Tensor, tau: float) -> Tensor:
    """Computes which cosines exceed tau, on the current stream.

    Args:
        unit: Of all tokens of the batch.
        offsets: int32 [B + 1] on the CPU, from 0.
        tau: Threshold of the cosine.

    Returns:
        The int32 `bits` of normalized_cut.h.
    """
    lengths = np.diff(offsets.numpy())
    words = int(square_sizes(lengths, TILE).sum()) // 32
    bits = torch.empty(words, dtype=torch.int32, device=unit.high.device)
    if words:
        table = table_on_device(image_table, unit.high, offsets, TILE)
        threshold = math.inf if tau >= 1 else tau  # no cosine exceeds 1, whatever the rounding
        channels, options = steps_on(STEPS, unit.high)
        launch(
            _connect, (upper_tiles(lengths, TILE), len(lengths)),
            unit.high, unit.low, table, bits, threshold, unit.high.shape[1], TILE=TILE, CHANNELS=channels, **options
        )  # fmt: skip
    return bits


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `affinity_bits` launches."""
    types = {"high": "*fp16", "low": "*fp16", "table": "*i64", "bits": "*i32", "threshold": "fp32", "row_stride": "i32"}
    for arch, (channels, options) in STEPS.items():
        yield Variant("_connect", _connect, types, {"TILE": TILE, "CHANNELS": channels}, options, (arch,))
