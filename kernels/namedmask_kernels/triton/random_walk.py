# SPDX-License-Identifier: MIT
"""random_walk for GPUs from sm_80 on: a step is attention with unit queries and keys, a block of tokens at a time.

A block goes through the tiles of S beside it and adds each tile's product with the masks and its rows' sums; a tile is
all of S that ever exists. Cosines are at most 1, so unlike attention it needs no running maximum. The tile is made
anew in each step: its three products of float16 on the tensor cores (normalized_rows.py) take less time than n^2 floats
would to be written and read. No atomics: the same bits every time, alone or in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalized_rows import CHANNELS, cosines, normalized_rows, refuse_infinite
from .tables import block_table, to_device

# Not yet measured on a GPU: chosen for no spills.
ROWS, COLUMNS = 128, 64  # of a tile of S
MASKS = (16, 32)  # that a block works on, whichever holds all of them; more go to several blocks
OPTIONS = {"num_warps": 8, "num_stages": 2}


@triton.jit
def _step(
    high, low, source, target, table, factor, row_stride, masks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """target [T, masks] = P source for a block of tokens and MASKS masks; grid (blocks, groups of masks).

    table: int32 [blocks, 3], the photo's first token, its length, and the block's first token in it
    factor: sharpness * log2(e), so that the exponentials are powers of two
    """
    entry = table + 3 * tl.program_id(0)
    begin = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 1)
    row = tl.load(entry + 2) + tl.arange(0, ROWS)
    mask = tl.program_id(1) * MASKS + tl.arange(0, MASKS)
    rows = tl.minimum(row, length - 1)
    high += begin * row_stride
    low += begin * row_stride
    source += begin * masks
    target += begin * masks
    acc = tl.zeros([ROWS, MASKS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < length
        columns = tl.minimum(column, length - 1)
        tile = cosines(high, low, rows, columns, row_stride, ROWS, COLUMNS, CHANNELS)
        weights = tl.where(inside[None, :], tl.exp2(factor * (tile - 1)), 0)
        total += tl.sum(weights, 1)
        at = columns[:, None] * masks + mask[None, :]
        values = tl.load(source + at, mask=inside[:, None] & (mask < masks)[None, :], other=0.0)
        acc = tl.dot(weights, values, acc, input_precision="tf32x3")
    at = rows[:, None] * masks + mask[None, :]
    tl.store(target + at, acc / total[:, None], mask=(row < length)[:, None] & (mask < masks)[None, :])


def random_walk(masks: Tensor, features: Tensor, offsets: Tensor, out: Tensor, steps: int, sharpness: float) -> None:
    """Fills out; arrays as in random_walk.h. Waits for the GPU: features that are not finite are a ValueError.

    masks, features and out lie on one GPU, offsets (which the caller has checked) on the CPU. A photo may have up to
    2^31 elements of masks and of features, a batch 2^31 tokens.
    """
    count = masks.shape[1]
    with torch.cuda.device_of(masks):
        unit = normalized_rows(features)
        refuse_infinite("random_walk", unit.finite, offsets)
        if masks.numel() == 0 or steps == 0:
            out.copy_(masks)
            return
        together = next((m for m in MASKS if m >= count), MASKS[-1])
        table = to_device(block_table(offsets, ROWS), masks)
        spare = torch.empty_like(out) if steps > 1 else out
        source = masks
        for i in reversed(range(steps)):  # the last goes to out
            target = spare if i % 2 else out
            _step[len(table), triton.cdiv(count, together)](
                unit.high, unit.low, source, target, table, sharpness * math.log2(math.e), unit.high.shape[1], count,
                ROWS=ROWS, COLUMNS=COLUMNS, CHANNELS=CHANNELS, MASKS=together, **OPTIONS,
            )  # fmt: skip
            source = target


def ahead_of_time() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(label, kernel, types of its arguments, constants, options) of every variant that `random_walk` starts."""
    types = {"high": "*fp16", "low": "*fp16", "source": "*fp32", "target": "*fp32", "table": "*i32", "factor": "fp32",
             "row_stride": "i32", "masks": "i32"}  # fmt: skip
    for masks in MASKS:
        sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "MASKS": masks}
        yield f"_step masks={masks}", _step, types, sizes, OPTIONS
