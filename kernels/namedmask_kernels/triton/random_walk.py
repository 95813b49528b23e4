# SPDX-License-Identifier: MIT
"""random_walk for GPUs of compute capability 8.0 and later: a step is attention with unit queries and keys.

A thread block iterates over the tiles of S in its rows and accumulates the product of each tile with the masks and the
row sums; only one tile of S exists at a time. Cosines are at most 1, so unlike attention it requires no running
maximum. Tiles are recomputed in each step: their three float16 products on the tensor cores (normalized_rows.py) take
less time than writing and reading n^2 floats. No atomics: bit-identical on every call and in any batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import expect_finite
from .normalized_rows import SCALE, Steps, normalized_rows, scaled_cosines, steps_on
from .tables import Variant, block_table, table_on_device

ROWS, COLUMNS = 128, 64  # of a tile of S; larger tiles spill registers
MASKS = (16, 32)  # masks per block: the first that holds all of them; more masks go to several blocks
# As in normalized_rows.py. On sm_90 two blocks fit a multiprocessor: one computes while the other loads the first
# operands of a tile or multiplies it with the masks.
STEPS: dict[int, Steps] = {
    80: (64, {"num_warps": 8, "num_stages": 2}),
    90: (32, {"num_warps": 8, "num_stages": 4, "maxnreg": 128}),
}
# The least exponent of 2, as in csrc/cpu/random_walk_kernel.h: not 0, so that a row of zeros has a sum.
LEAST = tl.constexpr(-60 * math.log2(math.e))


@triton.jit
def _step(
    high, low, source, target, table, factor, row_stride, masks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """target [T, masks] = P source for a block of tokens and MASKS masks; grid (blocks, groups of masks).

    table: int32 [blocks, 3], the image's first token, its length, and the block's first token in it
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
        tile = scaled_cosines(high, low, rows, columns, row_stride, ROWS, COLUMNS, CHANNELS)
        exponent = tl.minimum(tl.maximum(factor * (tile * (1 / SCALE) - 1), LEAST), 1.5)
        weights = tl.where(inside[None, :], tl.exp2(exponent), 0)
        total += tl.sum(weights, 1)
        at = columns[:, None] * masks + mask[None, :]
        values = tl.load(source + at, mask=inside[:, None] & (mask < masks)[None, :], other=0.0)
        acc = tl.dot(weights, values, acc, input_precision="tf32x3")
    at = rows[:, None] * masks + mask[None, :]
    tl.store(target + at, acc / total[:, None], mask=(row < length)[:, None] & (mask < masks)[None, :])


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
    count = masks.shape[1]
    with torch.cuda.device_of(masks):
        unit = normalized_rows(features)
        expect_finite("random_walk", "features", unit.finite, offsets)
        if masks.numel() == 0 or steps == 0:
            out.copy_(masks)
            return
        masks, scales = _scaled(masks, offsets)
        together = next((m for m in MASKS if m >= count), MASKS[-1])
        table = table_on_device(block_table, masks, offsets, ROWS)
        spare = torch.empty_like(out) if steps > 1 else out
        channels, options = steps_on(STEPS, unit.high)
        source = masks
        for i in reversed(range(steps)):  # the last one writes to out
            target = spare if i % 2 else out
            _step[len(table), triton.cdiv(count, together)](
                unit.high, unit.low, source, target, table, sharpness * math.log2(math.e), unit.high.shape[1], count,
                ROWS=ROWS, COLUMNS=COLUMNS, CHANNELS=channels, MASKS=together, **options,
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
    types = {"high": "*fp16", "low": "*fp16", "source": "*fp32", "target": "*fp32", "table": "*i32", "factor": "fp32",
             "row_stride": "i32", "masks": "i32"}  # fmt: skip
    for masks, (arch, (channels, options)) in itertools.product(MASKS, STEPS.items()):
        sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "CHANNELS": channels, "MASKS": masks}
        yield Variant(f"_step masks={masks}", _step, types, sizes, options, (arch,))
