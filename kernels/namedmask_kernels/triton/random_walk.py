# SPDX-License-Identifier: MIT
"""random_walk for GPUs of compute capability 8.0 and later, in two kernels.

`_keep` writes S once: the tiles of cosines on and above the diagonal, three float16 products each on the tensor cores
(normalized_rows.py), and their transposes below it. `_step` reads S: a thread block iterates over the tiles in its rows
and accumulates the product of each tile with the masks and the row sums. S is symmetric, so a step alone would compute
each cosine twice; for an image too large for its S to be kept, `_step` does so and holds one tile at a time. Cosines
are at most 1, so unlike attention it requires no running maximum. No atomics: bit-identical on every call and in any
batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import expect_finite
from .launch import launch
from .normalized_rows import (
    SCALE,
    Steps,
    image_table,
    image_tile,
    normalized_rows,
    scaled_cosines,
    square_sizes,
    steps_on,
    tile_cosines,
    upper_tiles,
)
from .normalized_rows import STEPS as COSINE_STEPS
from .tables import MOST_BLOCKS, Variant, block_table, expect_blocks, table_on_device

TILE = 128  # rows and columns of a tile that `_keep` computes
KEEP_STEPS = COSINE_STEPS | {80: (16, {"num_warps": 8, "num_stages": 3})}  # 128 registers per thread would spill there
MOST_KEPT = 2**28  # elements of S that are kept at a time, 1 GiB: 19 images of 3,600 tokens, or one of 16,384
MASKS = (16, 32)  # masks per block of `_step`: the first that holds all of them; more masks go to several blocks
ROWS, COLUMNS = 128, 64  # of a tile that `_step` computes; larger tiles spill registers
# Of a tile that `_step` reads. Two blocks fit a multiprocessor of sm_90, each with two tiles of 16 KB in flight.
KEPT_ROWS = 64
KEPT_OPTIONS = {"num_warps": 4, "num_stages": 3}
# As in normalized_rows.py, for `_step` without kept weights. On sm_90 two blocks fit a multiprocessor: one computes
# while the other loads the first operands of a tile or multiplies it with the masks.
STEPS: dict[int, Steps] = {
    80: (64, {"num_warps": 8, "num_stages": 2}),
    90: (32, {"num_warps": 8, "num_stages": 4, "maxnreg": 128}),
}
# The least exponent of 2, as in csrc/cpu/random_walk_kernel.h: not 0, so that a row of zeros has a sum.
LEAST = tl.constexpr(-60 * math.log2(math.e))


@triton.jit
def _weights(tile, factor):
    """The elements of S for SCALE times the cosines, float32.

    factor: sharpness * log2(e), so that the exponentials are powers of two
    """
    return tl.exp2(tl.minimum(tl.maximum(factor * (tile * (1 / SCALE) - 1), LEAST), 1.5))


@triton.jit
def _keep(high, low, table, kept, factor, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """Writes a tile of S and its transpose; grid (tiles of the largest image, images).

    table: that of image_table
    kept: S of each image, in whole tiles; 0 outside of the image
    """
    begin, length, down, right = image_tile(table, TILE)
    tiles = tl.cdiv(length, TILE)
    if right < tiles:
        tile = tile_cosines(high, low, begin, length, down, right, row_stride, TILE, CHANNELS)
        row = down * TILE + tl.arange(0, TILE)
        column = right * TILE + tl.arange(0, TILE)
        weights = tl.where((row < length)[:, None] & (column < length)[None, :], _weights(tile, factor), 0)
        kept += tl.multiple_of(tl.load(table + 3 * tl.program_id(1) + 2), TILE)
        stride = tiles * TILE
        tl.store(kept + (row[:, None] * stride + column[None, :]), weights)
        if down != right:  # the halves of a tile on the diagonal differ by rounding, so its transpose is not written
            tl.store(kept + (column[:, None] * stride + row[None, :]), tl.trans(weights))


@triton.jit
def _step(
    high, low, kept, source, target, table, factor, row_stride, masks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, MASKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """target [T, masks] = P source for a block of tokens and MASKS masks; grid (blocks, groups of masks).

    kept: S as `_keep` wrote it, or None to compute it
    table: int64 [blocks, 4], the image's first token, its length, the block's first token in it, and the first element
        of the image's S
    """
    entry = table + 4 * tl.program_id(0)
    begin = tl.load(entry)
    length = tl.load(entry + 1).to(tl.int32)
    row = tl.load(entry + 2).to(tl.int32) + tl.arange(0, ROWS)
    mask = tl.program_id(1) * MASKS + tl.arange(0, MASKS)
    rows = tl.minimum(row, length - 1)
    if kept is None:
        high += begin * row_stride
        low += begin * row_stride
    else:
        kept += tl.multiple_of(tl.load(entry + 3), TILE)
        stride = tl.cdiv(length, TILE) * TILE
    source += begin * masks
    target += begin * masks
    acc = tl.zeros([ROWS, MASKS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < length
        columns = tl.minimum(column, length - 1)
        if kept is None:
            tile = scaled_cosines(high, low, rows, columns, row_stride, ROWS, COLUMNS, CHANNELS)
            weights = tl.where(inside[None, :], _weights(tile, factor), 0)
        else:
            weights = tl.load(kept + (row[:, None] * stride + column[None, :]))
        total += tl.sum(weights, 1)
        at = columns[:, None] * masks + mask[None, :]
        values = tl.load(source + at, mask=inside[:, None] & (mask < masks)[None, :], other=0.0)
        acc = tl.dot(weights, values, acc, input_precision="tf32x3")
    at = rows[:, None] * masks + mask[None, :]
    tl.store(target + at, acc / total[:, None], mask=(row < length)[:, None] & (mask < masks)[None, :])


def _step_table(offsets: np.ndarray, rows: int) -> np.ndarray:
    """The table of `_step`."""
    table = block_table(offsets, rows).astype(np.int64)
    images = np.searchsorted(offsets, table[:, 0], side="right") - 1  # of those that begin there, the one with tokens
    return np.concatenate([table, image_table(offsets, TILE)[images, 2:]], 1)


def _groups(sizes: np.ndarray) -> Iterator[slice]:
    """Splits a batch into groups of images whose S fits MOST_KEPT; an image that is larger is a group of its own.

    A group has at most MOST_BLOCKS images, with those without tokens.
    """
    first = total = 0
    for b, size in enumerate(sizes.tolist()):
        if (total + size > MOST_KEPT and b > first) or b - first == MOST_BLOCKS:
            yield slice(first, b)
            first, total = b, 0
        total += size
    yield slice(first, len(sizes))


def random_walk(masks: Tensor, features: Tensor, offsets: Tensor, out: Tensor, steps: int, sharpness: float) -> None:
    """Fills `out`. Waits for the GPU to check the features.

    Args:
        masks: float32 [T, M] on a GPU, contiguous; up to 2^31 elements per image, like the features.
        features: float32 [T, C] on the same GPU, contiguous.
        offsets: int32 [B + 1] on the CPU, checked by the caller; up to 2^31 tokens.
        out: float32 [T, M] on the same GPU.
        steps: As in the public function.
        sharpness: As in the public function.

    Raises:
        ValueError: If the features of an image are not finite.
    """
    with torch.cuda.device_of(masks):
        unit = normalized_rows(features)
        expect_finite("random_walk", "features", unit.finite, offsets)
        if masks.numel() == 0 or steps == 0:
            out.copy_(masks)
            return
        masks, scales = _scaled(masks, offsets)
        spare = torch.empty_like(out) if steps > 1 else out
        lengths = np.diff(offsets.numpy())
        sizes = square_sizes(lengths, TILE)
        kept = masks.new_empty(min(MOST_KEPT, int(sizes[sizes <= MOST_KEPT].sum())))  # of one group after the other
        count = masks.shape[1]
        together = next((m for m in MASKS if m >= count), MASKS[-1])
        expect_blocks("random_walk", "masks", count, together)
        factor, stride = sharpness * math.log2(math.e), unit.high.shape[1]
        for images in _groups(sizes):
            elements = int(sizes[images].sum())
            if not elements:
                continue
            own = offsets[images.start : images.stop + 1]
            if elements <= MOST_KEPT:
                table = table_on_device(image_table, masks, own, TILE)
                channels, options = steps_on(KEEP_STEPS, unit.high)
                launch(
                    _keep, (upper_tiles(lengths[images], TILE), len(own) - 1),
                    unit.high, unit.low, table, kept, factor, stride, TILE=TILE, CHANNELS=channels, **options
                )  # fmt: skip
                weights, rows, options = kept, KEPT_ROWS, KEPT_OPTIONS
            else:
                weights, rows = None, ROWS
                channels, options = steps_on(STEPS, unit.high)
            table = table_on_device(_step_table, masks, own, rows)
            source = masks
            for i in reversed(range(steps)):  # the last one writes to out
                target = spare if i % 2 else out
                launch(
                    _step, (len(table), triton.cdiv(count, together)),
                    unit.high, unit.low, weights, source, target, table, factor, stride, count,
                    ROWS=rows, COLUMNS=COLUMNS, CHANNELS=channels, MASKS=together, TILE=TILE, **options,
                )  # fmt: skip
                source = target
        if scales is not None:
            limit = torch.finfo(out.dtype).max
            out.copy_(torch.where(out.isfinite(), (out / scales).clamp(-limit, limit), out))


def _scaled(masks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Multiplies the masks of images whose sums might overflow or vanish by a power of two (see csrc/common/scale.h).

    Returns:
        The masks, and the factor of each row [T, 1]; None if no image requires one. Waits for the GPU.
    """
    lengths = offsets.diff().to(masks.device, torch.int64)
    sizes = masks.abs().where(masks.isfinite(), 0).amax(1)
    largest = torch.segment_reduce(sizes, "max", lengths=lengths, initial=0).tolist()
    factors = [2.0**-96 if x >= 2.0**32 else 2.0**96 if 0 < x < 2.0**-32 else 1.0 for x in largest]
    if all(factor == 1 for factor in factors):
        return masks, None
    scales = masks.new_tensor(factors).repeat_interleave(lengths)[:, None]
    return masks * scales, scales


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `random_walk` launches."""
    unit = {"high": "*fp16", "low": "*fp16", "factor": "fp32", "row_stride": "i32"}
    for arch, (channels, options) in KEEP_STEPS.items():
        types = unit | {"table": "*i64", "kept": "*fp32"}
        yield Variant("_keep", _keep, types, {"TILE": TILE, "CHANNELS": channels}, options, (arch,))
    step = unit | {"source": "*fp32", "target": "*fp32", "table": "*i64", "masks": "i32"}
    for masks, (arch, (channels, options)) in itertools.product(MASKS, STEPS.items()):
        sizes = {"COLUMNS": COLUMNS, "CHANNELS": channels, "MASKS": masks, "TILE": TILE}
        yield Variant(f"_step masks={masks}", _step, step, sizes | {"ROWS": ROWS, "kept": None}, options, (arch,))
        types, sizes = step | {"kept": "*fp32"}, sizes | {"ROWS": KEPT_ROWS}
        yield Variant(f"_step kept masks={masks}", _step, types, sizes, KEPT_OPTIONS, (arch,))
