# SPDX-License-Identifier: MIT
"""Unit vectors of features and their products on the tensor cores, as accurate as in float32.

The matrix units take 11 significant bits fast (float16) but float32 at a sixteenth of that rate or less. A float32
factor is the sum of two float16 numbers to 22 bits, so a product is three of float16: high high + high low + low high.
Unit vectors are scaled by 2^8 first, so that the low parts stay clear of float16's subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # that a product takes at a time; rows are padded to a multiple of it with zeros
TOKENS = 16  # of a block of `_normalized_rows`
# For tiles of 128 x 128 cosines, by architecture: channels of a step, a divisor of CHANNELS, and options. Not yet
# measured on a GPU: chosen for no spills.
STEPS = {80: (16, {"num_warps": 8, "num_stages": 3}), 90: (64, {"num_warps": 8, "num_stages": 2})}


class NormalizedRows(NamedTuple):
    """high, low: float16 [T, channels rounded up]: 2^8 times the unit vectors; finite: bool [T], of their features."""

    high: Tensor
    low: Tensor
    finite: Tensor


@triton.jit
def _normalized_rows(features, high, low, finite, tokens, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """The arrays of NormalizedRows for TOKENS rows of features [tokens, channels]; grid (blocks)."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = (row < tokens)[:, None]
    squares = tl.zeros([TOKENS], tl.float64)
    for start in tl.range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = row[:, None] * channels + c[None, :]
        x = tl.load(features + at, mask=inside & (c < channels)[None, :], other=0.0).to(tl.float64)
        squares += tl.sum(x * x, 1)
    tl.store(finite + row, squares < float("inf"), mask=row < tokens)
    factor = 1 / tl.maximum(tl.sqrt(squares), 1e-12)
    padded = tl.cdiv(channels, CHANNELS) * CHANNELS
    for start in tl.range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = row[:, None] * channels + c[None, :]
        x = tl.load(features + at, mask=inside & (c < channels)[None, :], other=0.0).to(tl.float64)
        unit = (x * factor[:, None]).to(tl.float32) * 256
        top = unit.to(tl.float16)
        to = row[:, None] * padded + c[None, :]
        tl.store(high + to, top, mask=inside)
        tl.store(low + to, (unit - top.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def cosines(high, low, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """float32 [ROWS, COLUMNS]: products of a photo's unit vectors `rows` (int32 [ROWS]) and `columns` [COLUMNS].

    high, low: where the photo begins; it may have up to 2^31 elements.
    """
    c = tl.arange(0, CHANNELS)
    a = rows[:, None] * row_stride + c[None, :]
    b = columns[None, :] * row_stride + c[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, row_stride, CHANNELS):
        a_high = tl.load(high + a + start)
        b_high = tl.load(high + b + start)
        acc = tl.dot(a_high, b_high, acc)
        acc = tl.dot(a_high, tl.load(low + b + start), acc)
        acc = tl.dot(tl.load(low + a + start), b_high, acc)
    return acc * (1.0 / 65536)


@triton.jit
def upper_tile(t):
    """Tile t on or above the diagonal of a matrix, column by column: (its row, its column), in tiles."""
    right = ((tl.sqrt(8.0 * t + 1) - 1) * 0.5).to(tl.int32)  # rounding may have it one off
    right -= (right * (right + 1) // 2 > t).to(tl.int32)
    right += ((right + 1) * (right + 2) // 2 <= t).to(tl.int32)
    return t - right * (right + 1) // 2, right


def upper_tiles(lengths: Tensor, size: int) -> int:
    """How many such tiles of size x size the largest photo has; lengths: tokens of each."""
    tiles = -(-int(lengths.max()) // size) if len(lengths) else 0
    return tiles * (tiles + 1) // 2


def steps_on(like: Tensor) -> tuple[int, dict[str, int]]:
    """The entry of STEPS for the tensor's GPU."""
    major = torch.cuda.get_device_capability(like.device)[0] if like.is_cuda else 9
    return STEPS[90 if major in (9, 10) else 80]  # consumers' later GPUs have the shared memory of sm_8x


def normalized_rows(features: Tensor) -> NormalizedRows:
    """features float32 [T, C], contiguous, on a GPU -> NormalizedRows beside them, in the order of the current stream.

    As the CPU kernels have it: norms in float64, rows divided by max(norm, 1e-12) and rounded to float32.
    """
    tokens, channels = features.shape
    padded = triton.cdiv(channels, CHANNELS) * CHANNELS
    high, low = torch.empty(2, tokens, padded, dtype=torch.float16, device=features.device)
    finite = torch.empty(tokens, dtype=torch.bool, device=features.device)
    if tokens:
        _normalized_rows[(triton.cdiv(tokens, TOKENS),)](
            features, high, low, finite, tokens, channels, TOKENS=TOKENS, CHANNELS=CHANNELS
        )
    return NormalizedRows(high, low, finite)


def refuse_infinite(op: str, finite: Tensor, offsets: Tensor, first: int = 0) -> None:
    """ValueError naming the first photo whose features are not `finite`, bool [T]; waits for the GPU.

    first: the number of offsets' first photo
    """
    if len(finite) and not finite.all():
        row = int(finite.byte().argmin())
        photo = first + int(torch.searchsorted(offsets, row, right=True)) - 1
        raise ValueError(f"{op}: features must be finite, but those of photo {photo} hold NaN or Inf")


def ahead_of_time() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(label, kernel, types of its arguments, constants, options) of every variant that `normalized_rows` starts."""
    yield (
        "_normalized_rows", _normalized_rows,
        {"features": "*fp32", "high": "*fp16", "low": "*fp16", "finite": "*i1", "tokens": "i32", "channels": "i32"},
        {"TOKENS": TOKENS, "CHANNELS": CHANNELS}, {},
    )  # fmt: skip
