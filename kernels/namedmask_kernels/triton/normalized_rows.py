# SPDX-License-Identifier: MIT
"""Unit vectors of features and their products on the tensor cores, as accurate as in float32.

Tensor cores multiply float16, with 11 significant bits, at least sixteen times as fast as float32. The sum of two
float16 numbers represents a float32 factor to 22 bits, so a product takes three float16 products: high high + high low
+ low high. Unit vectors are scaled by 2^8 first, to keep the low parts out of the subnormal range of float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tables import Variant

CHANNELS = 64  # per step of a product; rows are padded with zeros to a multiple of it
TOKENS = 16  # per block of `_normalized_rows`
SCALE = tl.constexpr(65536.0)  # of the products, since unit vectors are scaled by 2^8
Steps = tuple[int, dict[str, int]]  # channels per step of a product, a divisor of CHANNELS, and compiler options
# For tiles of 128 x 128 cosines, by architecture. With 128 registers per thread, two blocks fit a multiprocessor: one
# computes while the other loads its first operands or packs its bits. With three stages, the loads of a step are in
# flight during all of the step before.
STEPS: dict[int, Steps] = {
    80: (16, {"num_warps": 8, "num_stages": 3, "maxnreg": 128}),
    90: (32, {"num_warps": 8, "num_stages": 3, "maxnreg": 128}),
}


class NormalizedRows(NamedTuple):
    """Unit vectors of T tokens.

    Attributes:
        high: float16 [T, channels rounded up to a multiple of CHANNELS], 2^8 times the unit vectors.
        low: Likewise, the remainder.
        finite: bool [T], whether the features are.
    """

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
def scaled_cosines(
    high, low, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    """SCALE times the cosines of an image's tokens `rows` (int32 [ROWS]) and `columns` [COLUMNS], float32.

    high, low: where the image begins; it may have up to 2^31 elements
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
    return acc


@triton.jit
def upper_tile(t):
    """Tile t on or above the diagonal of a matrix, in column order: (row, column), in tiles."""
    right = ((tl.sqrt(8.0 * t + 1) - 1) * 0.5).to(tl.int32)  # off by one if the root is rounded
    right -= (right * (right + 1) // 2 > t).to(tl.int32)
    right += ((right + 1) * (right + 2) // 2 <= t).to(tl.int32)
    return t - right * (right + 1) // 2, right


@triton.jit
def image_tile(table, TILE: tl.constexpr):
    """The tile of a block in a grid (tiles of the largest image, images), and the image: its first token and its number
    of tokens; then the tile's row and column, in tiles. The image has no such tile if the column is after its end.

    table: that of image_table
    """
    entry = table + 3 * tl.program_id(1)
    down, right = upper_tile(tl.program_id(0))
    return tl.load(entry), tl.load(entry + 1).to(tl.int32), down, right


@triton.jit
def tile_cosines(high, low, begin, length, down, right, row_stride, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """SCALE times the cosines in such a tile, float32 [TILE, TILE]; those beyond the image repeat its last token."""
    here = tl.arange(0, TILE)
    rows = tl.minimum(down * TILE + here, length - 1)
    columns = tl.minimum(right * TILE + here, length - 1)
    high += begin * row_stride
    low += begin * row_stride
    return scaled_cosines(high, low, rows, columns, row_stride, TILE, TILE, CHANNELS)


def upper_tiles(lengths: np.ndarray, size: int) -> int:
    """The number of such tiles of size x size in the largest image; lengths: tokens of each image."""
    tiles = -(-int(lengths.max()) // size) if len(lengths) else 0
    return tiles * (tiles + 1) // 2


def square_sizes(lengths: np.ndarray, size: int) -> np.ndarray:
    """The number of elements of each image's square matrix in whole tiles of size x size, int64."""
    return (-(-lengths.astype(np.int64) // size) * size) ** 2


def image_table(offsets: np.ndarray, size: int) -> np.ndarray:
    """int64 [B, 3]: the first token of each image, the number of its tokens, the first element of its matrix among
    those of all images."""
    lengths = np.diff(offsets)
    sizes = square_sizes(lengths, size)
    return np.stack([offsets[:-1], lengths, sizes.cumsum() - sizes], 1)


def steps_on(steps: dict[int, Steps], like: Tensor) -> Steps:
    """The entry of a table like STEPS for the tensor's GPU."""
    major = torch.cuda.get_device_capability(like.device)[0] if like.is_cuda else 9
    return steps[90 if major in (9, 10) else 80]  # later consumer GPUs have the shared memory of sm_8x


def normalized_rows(features: Tensor) -> NormalizedRows:
    """Normalizes the rows of features float32 [T, C], contiguous, on a GPU, on the current stream.

    As in the CPU kernels, norms are computed in float64, and rows are divided by max(norm, 1e-12) and rounded to
    float32.
    """
    tokens, channels = features.shape
    padded = triton.cdiv(channels, CHANNELS) * CHANNELS
    high, low = torch.empty(2, tokens, padded, dtype=torch.float16, device=features.device).unbind()
    finite = torch.empty(tokens, dtype=torch.bool, device=features.device)
    if tokens:
        launch(
            _normalized_rows, (triton.cdiv(tokens, TOKENS),),
            features, high, low, finite, tokens, channels, TOKENS=TOKENS, CHANNELS=CHANNELS
        )  # fmt: skip
    return NormalizedRows(high, low, finite)


class Chunk(NamedTuple):
    """Consecutive images of a batch: which images, which rows, offsets and shapes of their own, unit vectors."""

    images: slice
    rows: slice
    offsets: Tensor
    shapes: Tensor
    unit: NormalizedRows


def chunks(features: Tensor, offsets: Tensor, shapes: Tensor, size: int) -> Iterator[Chunk]:
    """Splits a batch into chunks of `size` images."""
    begins = offsets.tolist()
    for first in range(0, len(shapes), size):
        last = min(first + size, len(shapes))
        rows = slice(begins[first], begins[last])
        own = offsets[first : last + 1] - rows.start
        yield Chunk(slice(first, last), rows, own, shapes[first:last], normalized_rows(features[rows]))


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `normalized_rows` launches."""
    yield Variant(
        "_normalized_rows", _normalized_rows,
        {"features": "*fp32", "high": "*fp16", "low": "*fp16", "finite": "*i1", "tokens": "i32", "channels": "i32"},
        {"TOKENS": TOKENS, "CHANNELS": CHANNELS}, {},
    )  # fmt: skip
