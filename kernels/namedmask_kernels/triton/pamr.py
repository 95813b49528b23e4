# SPDX-License-Identifier: MIT
"""pamr for GPUs of compute capability 8.0 and later: the weights once, then one launch per iteration.

A thread block works on a few pixels. The weights are stored as in pamr.h: square roots with 16 bits, here shifted by
32768 to fit an int16, one plane [T] per neighbor. Masks remain [T, L], so that neighboring threads read neighboring
values. No atomics: bit-identical on every call and in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import Variant, blocks_of, table_on_device

PIXELS = 128  # per block of `_affinities`
# Labels per block of `_average`, rounded up to a power of two -> pixels per block. Chosen so that no registers spill,
# with at most 4 sums per thread.
AVERAGE_PIXELS = {1: 256, 2: 256, 4: 128, 8: 64, 16: 32, 32: 16}


@triton.jit
def _block(table, PIXELS: tl.constexpr):
    """A block's image: first row, height, width, and its dilations: the first, and how many; its pixels: index in the
    image, y, x, and whether they exist.
    """
    entry = table + 6 * tl.program_id(0)
    begin = tl.load(entry).to(tl.int64)
    h = tl.load(entry + 1)
    w = tl.load(entry + 2)
    p = tl.load(entry + 3) + tl.arange(0, PIXELS)
    inside = p < h * w
    p = tl.minimum(p, h * w - 1)
    return begin, h, w, tl.load(entry + 4), tl.load(entry + 5), p, p // w, p % w, inside


@triton.jit
def _neighbor(y, x, h, w, d, J: tl.constexpr):
    """The index in the image of neighbor J, 0 to 8 in raster order, d pixels away; clamped to the border."""
    row = tl.minimum(tl.maximum(y + (J // 3 - 1) * d, 0), h - 1)
    column = tl.minimum(tl.maximum(x + (J % 3 - 1) * d, 0), w - 1)
    return row * w + column


@triton.jit
def _logit(image, at, r, g, b, r_factor, g_factor, b_factor):
    """The similarity of pixel `at` to the center pixel, which has the color r, g, b."""
    r_away = tl.abs(tl.load(image + at).to(tl.int32) - r).to(tl.float32)
    g_away = tl.abs(tl.load(image + at + 1).to(tl.int32) - g).to(tl.float32)
    b_away = tl.abs(tl.load(image + at + 2).to(tl.int32) - b).to(tl.float32)
    return r_away * r_factor + g_away * g_factor + b_away * b_factor


@triton.jit
def _factor(total, squares, n):
    """Sums of n differences from the center and of their squares -> the factor from a difference to a logit."""
    spread = (n * squares - total * total).to(tl.float32) / tl.cast(n * (n - 1), tl.float32)
    return -1 / (3 * (0.1 * tl.sqrt(spread) + 255 * 1e-8))


@triton.jit
def _affinities(image, table, dilations, weights, scales, tokens, PIXELS: tl.constexpr):
    """weights int16 [8 * most, tokens] and scales [tokens] of a block's pixels; grid (blocks).

    image: uint8 [tokens, 3]; table: int32 [blocks, 6]; dilations: int32, those of an image one after another; most: the
    largest number of dilations of an image
    """
    begin, h, w, first, count, p, y, x, inside = _block(table, PIXELS)
    dilations += first
    pixels = image + 3 * begin
    r = tl.load(pixels + 3 * p).to(tl.int32)
    g = tl.load(pixels + 3 * p + 1).to(tl.int32)
    b = tl.load(pixels + 3 * p + 2).to(tl.int32)
    zero = tl.zeros([PIXELS], tl.int32)
    r_sum, g_sum, b_sum, r_squares, g_squares, b_squares = zero, zero, zero, zero, zero, zero
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            at = 3 * _neighbor(y, x, h, w, d, j)
            r_away = tl.load(pixels + at).to(tl.int32) - r
            g_away = tl.load(pixels + at + 1).to(tl.int32) - g
            b_away = tl.load(pixels + at + 2).to(tl.int32) - b
            r_sum += r_away
            g_sum += g_away
            b_sum += b_away
            r_squares += r_away * r_away
            g_squares += g_away * g_away
            b_squares += b_away * b_away
    r_factor = _factor(r_sum, r_squares, 9 * count)
    g_factor = _factor(g_sum, g_squares, 9 * count)
    b_factor = _factor(b_sum, b_squares, 9 * count)

    top = tl.full([PIXELS], float("-inf"), tl.float32)
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:
                at = 3 * _neighbor(y, x, h, w, d, j)
                top = tl.maximum(top, _logit(pixels, at, r, g, b, r_factor, g_factor, b_factor))

    total = tl.zeros([PIXELS], tl.float32)
    out = weights + begin + p
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:
                at = 3 * _neighbor(y, x, h, w, d, j)
                logit = _logit(pixels, at, r, g, b, r_factor, g_factor, b_factor)
                root = (tl.exp((logit - top) * 0.5) * 65535 + 0.5).to(tl.int32)
                tl.store(out, (root - 32768).to(tl.int16), mask=inside)
                total += root.to(tl.float32) * root.to(tl.float32)
                out += tokens
    tl.store(scales + begin + p, 1 / total, mask=inside)


@triton.jit
def _weighted_sum(masks, weight, dilations, h, w, y, x, mask, tokens, count, labels, factor):
    """Sums of the neighbors' masks [PIXELS, LABELS], each times its weight and `factor`."""
    acc = tl.zeros(mask.shape, tl.float32)
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:
                at = _neighbor(y, x, h, w, d, j) * labels
                root = tl.load(weight).to(tl.float32) + 32768
                acc += (root * root)[:, None] * (tl.load(masks + at[:, None], mask=mask, other=0.0) * factor)
                weight += tokens
    return acc


@triton.jit
def _average(
    source, target, table, dilations, weights, scales, tokens, labels,
    PIXELS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """One iteration for a block's pixels and labels, source -> target [tokens, labels]; grid (blocks, groups)."""
    begin, h, w, first, count, p, y, x, inside = _block(table, PIXELS)
    dilations += first
    label = tl.program_id(1) * LABELS + tl.arange(0, LABELS)
    mask = inside[:, None] & (label < labels)[None, :]
    masks = source + begin * labels + label[None, :]
    weight = weights + begin + p
    scale = tl.load(scales + begin + p)[:, None]
    mean = scale * _weighted_sum(masks, weight, dilations, h, w, y, x, mask, tokens, count, labels, 1.0)
    if tl.max((tl.abs(mean) < float("inf")).to(tl.int32) ^ 1) > 0:  # weights of up to 2^32 overflow for huge masks
        low = scale * _weighted_sum(masks, weight, dilations, h, w, y, x, mask, tokens, count, labels, 2.0**-64)
        high = low * 2.0**64
        clamped = tl.minimum(tl.maximum(high, -3.4028234663852886e38), 3.4028234663852886e38)
        replaced = tl.where(tl.abs(low) < float("inf"), clamped, high)
        mean = tl.where(tl.abs(mean) < float("inf"), mean, replaced)
    at = (begin + p) * labels
    tl.store(target + at[:, None] + label[None, :], mean, mask=mask)


def pixel_table(offsets: np.ndarray, shapes: np.ndarray, counts: tuple[int, ...], size: int) -> np.ndarray:
    """The work of each block of `size` pixels.

    Args:
        offsets: int32 [B + 1].
        shapes: int32 [B, 2].
        counts: Number of dilations, for all images or for each.
        size: Pixels per block.

    Returns:
        int32 [blocks, 6]: the image's first row, its height and width, the block's first pixel in it, the index of the
        image's first dilation, the number of its dilations.
    """
    heights, widths = shapes.reshape(-1, 2).T
    blocks, first = blocks_of(np.diff(offsets), size)
    dilations = np.array(counts)
    images = np.broadcast_arrays(offsets[:-1], heights, widths, np.cumsum(dilations) - dilations, dilations)
    columns = [column.repeat(blocks) for column in images]
    return np.stack([*columns[:3], first, *columns[3:]], 1).astype(np.int32)


def _steps(dilations: tuple[int, ...], longest: int) -> np.ndarray:
    """The dilations; larger ones than `longest` reach the border as well."""
    return np.array(dilations, np.int64).clip(max=longest).astype(np.int32)


def pamr(
    masks: Tensor, image: Tensor, offsets: Tensor, shapes: Tensor, out: Tensor, dilations: Sequence[int],
    counts: Sequence[int], iterations: int,
) -> None:  # fmt: skip
    """Fills `out`, on the current stream.

    Args:
        masks: float32 [T, L] on a GPU, contiguous; up to 2^31 elements per image.
        image: uint8 [T, 3] on the same GPU, contiguous.
        offsets: int32 [B + 1] on the CPU, like `shapes` checked by the caller; up to 2^31 pixels.
        shapes: int32 [B, 2] on the CPU.
        out: float32 [T, L] on the same GPU.
        dilations: One list for all images, or one for each, one after another.
        counts: The lengths of the lists.
        iterations: As in the public function.
    """
    tokens, labels = masks.shape
    if masks.numel() == 0 or iterations == 0:
        out.copy_(masks)
        return
    together = min(32, triton.next_power_of_2(labels))
    size = AVERAGE_PIXELS[together]
    with torch.cuda.device_of(masks):
        steps = table_on_device(_steps, masks, tuple(dilations), int(shapes.max()))
        weights = torch.empty(8 * max(counts), tokens, dtype=torch.int16, device=masks.device)
        scales = torch.empty(tokens, dtype=torch.float32, device=masks.device)
        table = table_on_device(pixel_table, masks, offsets, shapes, tuple(counts), PIXELS)
        _affinities[(len(table),)](image, table, steps, weights, scales, tokens, PIXELS=PIXELS)
        table = table_on_device(pixel_table, masks, offsets, shapes, tuple(counts), size)
        spare = torch.empty_like(out) if iterations > 1 else out
        source = masks
        for i in reversed(range(iterations)):  # the last one writes to out
            target = spare if i % 2 else out
            _average[len(table), triton.cdiv(labels, together)](
                source, target, table, steps, weights, scales, tokens, labels,
                PIXELS=size, LABELS=together,
            )  # fmt: skip
            source = target


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `pamr` launches."""
    weights = {"table": "*i32", "dilations": "*i32", "weights": "*i16", "scales": "*fp32"}
    yield Variant("_affinities", _affinities, {"image": "*u8", **weights, "tokens": "i32"}, {"PIXELS": PIXELS}, {})
    for labels, pixels in AVERAGE_PIXELS.items():
        yield Variant(
            f"_average labels={labels}", _average,
            {"source": "*fp32", "target": "*fp32", **weights, "tokens": "i32", "labels": "i32"},
            {"PIXELS": pixels, "LABELS": labels}, {},
        )  # fmt: skip
