# SPDX-License-Identifier: MIT
"""pamr for GPUs of compute capability 8.0 and later: the weights once, then one launch per iteration.

A thread block works on 128 pixels of an image, one per thread, and up to 8 labels of each, so that a neighbor's index
and weight are computed once for all of them. The weights are stored as in pamr.h: square roots with 16 bits, here
shifted by 32768 to fit an int16, in the order in which blocks read them. Between iterations, 4 labels of a pixel are
consecutive and a thread reads them at once. No atomics: bit-identical on every call and in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .launch import launch
from .tables import Variant, blocks_of, expect_blocks, table_on_device

PIXELS = 128  # per block: one per thread
MAX_VECTOR = 4  # labels that a thread reads at once: 16 bytes


@triton.jit
def _block(table, block, PIXELS: tl.constexpr):
    """A block's image: first row, height, width, and its dilations: the first, and how many; its pixels: index in the
    image, y, x, and whether they exist.
    """
    entry = table + 6 * block
    begin = tl.load(entry).to(tl.int64)
    h = tl.load(entry + 1)
    w = tl.load(entry + 2)
    p = tl.load(entry + 3) + tl.arange(0, PIXELS)
    inside = p < h * w
    p = tl.minimum(p, h * w - 1)
    return begin, h, w, tl.load(entry + 4), tl.load(entry + 5), p, p // w, p % w, inside


@triton.jit
def _moved(at, n, d, STEP: tl.constexpr):
    """at + STEP * d, clamped to 0 to n - 1. STEP: -1, 0 or 1."""
    if STEP < 0:
        return tl.maximum(at - d, 0)
    elif STEP > 0:
        return tl.minimum(at + d, n - 1)
    else:
        return at


@triton.jit
def _neighbor(y, x, h, w, d, J: tl.constexpr):
    """The index in the image of neighbor J, 0 to 8 in raster order, d pixels away; clamped to the border."""
    return _moved(y, h, d, J // 3 - 1) * w + _moved(x, w, d, J % 3 - 1)


@triton.jit
def _exact(n):
    """2^23 plus an integer from 0 to 2^16, in float32: exact, and a bit operation instead of a conversion."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _colors(image, at):
    """2^23 plus the channels of pixel `at`, in float32; their differences are exact."""
    packed = tl.load(image + at)
    return _exact(packed & 255), _exact((packed >> 8) & 255), _exact((packed >> 16) & 255)


@triton.jit
def _logit(image, at, r, g, b, r_factor, g_factor, b_factor):
    """The similarity of pixel `at` to the center pixel, which has the colors r, g, b."""
    r_near, g_near, b_near = _colors(image, at)
    return tl.abs(r_near - r) * r_factor + tl.abs(g_near - g) * g_factor + tl.abs(b_near - b) * b_factor


@triton.jit
def _factor(total, squares, n):
    """Sums of n differences from the center and of their squares -> the factor from a difference to a logit."""
    total, squares = total.to(tl.int32), squares.to(tl.int32)
    spread = (n * squares - total * total).to(tl.float32) / tl.cast(n * (n - 1), tl.float32)
    return -1 / (3 * (0.1 * tl.sqrt(spread) + 255 * 1e-8))


@triton.jit
def _affinities(image, table, dilations, weights, scales, slots, PIXELS: tl.constexpr):
    """weights int16 [blocks, slots, PIXELS] and scales [blocks, PIXELS] of a block's pixels; grid (blocks).

    image: int32 [tokens], 8 bits per channel, the lowest are red; table: int32 [blocks, 6]; dilations: int32, those of
    an image one after another; slots: neighbors of a pixel of the image that has most
    """
    block = tl.program_id(0)
    begin, h, w, first, count, p, y, x, _inside = _block(table, block, PIXELS)
    dilations += first
    pixels = image + begin
    r, g, b = _colors(pixels, p)
    zero = tl.zeros([PIXELS], tl.float32)
    # Sums of integers below 2^24: at most 144 squares of 255.
    r_sum, g_sum, b_sum, r_squares, g_squares, b_squares = zero, zero, zero, zero, zero, zero
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:  # the center itself adds nothing
                r_near, g_near, b_near = _colors(pixels, _neighbor(y, x, h, w, d, j))
                r_away = r_near - r
                g_away = g_near - g
                b_away = b_near - b
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
                at = _neighbor(y, x, h, w, d, j)
                top = tl.maximum(top, _logit(pixels, at, r, g, b, r_factor, g_factor, b_factor))

    total = tl.zeros([PIXELS], tl.float32)
    lane = tl.arange(0, PIXELS)
    out = weights + block.to(tl.int64) * slots * PIXELS + lane
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:
                at = _neighbor(y, x, h, w, d, j)
                logit = _logit(pixels, at, r, g, b, r_factor, g_factor, b_factor)
                root = (tl.exp((logit - top) * 0.5) * 65535 + 0.5).to(tl.int32)
                tl.store(out + (j - j // 5) * PIXELS, (root - 32768).to(tl.int16))
                exact = _exact(root) - 8388608.0
                total += exact * exact
        out += 8 * PIXELS
    tl.store(scales + block.to(tl.int64) * PIXELS + lane, 1 / total)


@triton.jit
def _pack(masks, planes, tokens, labels, PIXELS: tl.constexpr, VECTOR: tl.constexpr):
    """masks [tokens, labels] -> planes [groups, tokens, VECTOR], 0 where there is no label; grid (blocks, groups)."""
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    group = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, VECTOR)
    label = group * VECTOR + k
    inside = (p < tokens)[:, None]
    values = tl.load(masks + p[:, None] * labels + label[None, :], mask=inside & (label < labels)[None, :], other=0.0)
    tl.store(planes + group * tokens * VECTOR + p[:, None] * VECTOR + k[None, :], values, mask=inside)


@triton.jit
def _weighted_sums(first, second, weight, dilations, h, w, y, x, count, factor,
                   PIXELS: tl.constexpr, VECTOR: tl.constexpr, TWO: tl.constexpr):  # fmt: skip
    """Sums of the neighbors' masks [PIXELS, VECTOR], each times its weight and `factor`, of two groups of labels; the
    second is 0 unless TWO.
    """
    sums = tl.zeros([PIXELS, VECTOR], tl.float32)
    more = sums
    for i in tl.range(0, count):
        d = tl.load(dilations + i)
        for j in tl.static_range(9):
            if j != 4:
                at = _neighbor(y, x, h, w, d, j).to(tl.int64)[:, None] * VECTOR
                root = _exact(tl.load(weight + (j - j // 5) * PIXELS).to(tl.int32) + 32768) - 8388608.0
                square = (root * root)[:, None]
                sums += square * (tl.load(first + at) * factor)
                if TWO:
                    more += square * (tl.load(second + at) * factor)
        weight += 8 * PIXELS
    return sums, more


@triton.jit
def _is_finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def _in_range(mean, low):
    """mean, where it is finite; else the mean of 2^-64 times the masks, times 2^64, clamped unless that is infinite."""
    high = low * 2.0**64
    clamped = tl.minimum(tl.maximum(high, -3.4028234663852886e38), 3.4028234663852886e38)
    return tl.where(_is_finite(mean), mean, tl.where(_is_finite(low), clamped, high))


@triton.jit
def _average(
    source, target, table, dilations, weights, scales, slots, tokens, labels, groups,
    PIXELS: tl.constexpr, VECTOR: tl.constexpr, TWO: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One iteration for a block's pixels and one or two groups of VECTOR labels; grid (blocks * groups / 1 or 2).

    source, target: [groups, tokens, VECTOR]; if LAST, target is [tokens, labels]. Thread blocks that share weights are
    next to each other.
    """
    GROUPS: tl.constexpr = 2 if TWO else 1
    parts = (groups + GROUPS - 1) // GROUPS
    block = tl.program_id(0) // parts
    one = (tl.program_id(0) - block * parts) * GROUPS
    two = tl.minimum(one + 1, groups - 1)  # if there is no second group, the first one again
    begin, h, w, start, count, p, y, x, inside = _block(table, block, PIXELS)
    dilations += start
    lane = tl.arange(0, PIXELS)
    k = tl.arange(0, VECTOR)[None, :]
    first = source + (one.to(tl.int64) * tokens + begin) * VECTOR + k
    second = source + (two.to(tl.int64) * tokens + begin) * VECTOR + k
    weight = weights + block.to(tl.int64) * slots * PIXELS + lane
    scale = tl.load(scales + block.to(tl.int64) * PIXELS + lane)[:, None]
    sums, more = _weighted_sums(first, second, weight, dilations, h, w, y, x, count, 1.0, PIXELS, VECTOR, TWO)
    sums *= scale
    more *= scale
    # Weights of up to 2^32 overflow for huge masks.
    if tl.max((_is_finite(sums) & _is_finite(more)).to(tl.int32) ^ 1) > 0:
        low, less = _weighted_sums(first, second, weight, dilations, h, w, y, x, count, 2.0**-64, PIXELS, VECTOR, TWO)
        sums = _in_range(sums, scale * low)
        more = _in_range(more, scale * less)
    pixel = (begin + p)[:, None]
    mask = inside[:, None]
    if LAST:
        label = one * VECTOR + k
        tl.store(target + pixel * labels + label, sums, mask=mask & (label < labels))
        if TWO:
            label = two * VECTOR + k
            tl.store(target + pixel * labels + label, more, mask=mask & (label < labels))
    else:
        tl.store(target + (one.to(tl.int64) * tokens + pixel) * VECTOR + k, sums, mask=mask)
        if TWO:
            tl.store(target + (two.to(tl.int64) * tokens + pixel) * VECTOR + k, more, mask=mask)


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
        masks: float32 [T, L] on a GPU, contiguous; of any size.
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
    vector = min(MAX_VECTOR, triton.next_power_of_2(labels))
    expect_blocks("pamr", "labels", labels, vector)
    groups = triton.cdiv(labels, vector)
    two = groups > 1
    planes = vector != labels  # else [tokens, labels] is the layout of the iterations
    slots = 8 * max(counts)
    with torch.cuda.device_of(masks):
        steps = table_on_device(_steps, masks, tuple(dilations), int(shapes.max()))
        table = table_on_device(pixel_table, masks, offsets, shapes, tuple(counts), PIXELS)
        weights = torch.empty(len(table), slots, PIXELS, dtype=torch.int16, device=masks.device)
        scales = torch.empty(len(table), PIXELS, dtype=torch.float32, device=masks.device)
        packed = F.pad(image, (0, 1)).view(torch.int32)
        launch(_affinities, (len(table),), packed, table, steps, weights, scales, slots, PIXELS=PIXELS)
        spare = functools.partial(torch.empty, groups, tokens, vector, dtype=torch.float32, device=masks.device)
        # Iterations write to these in turn, but the last one to out.
        pair = [spare() if planes and iterations > 1 else out, spare() if planes or iterations > 1 else out]
        source = masks
        if planes:
            source = pair[iterations % 2]
            grid = triton.cdiv(tokens, PIXELS), groups
            launch(_pack, grid, masks, source, tokens, labels, PIXELS=PIXELS, VECTOR=vector)
        for i in reversed(range(iterations)):
            target = pair[i % 2] if i else out
            launch(
                _average, (len(table) * triton.cdiv(groups, 1 + two),),
                source, target, table, steps, weights, scales, slots, tokens, labels, groups,
                PIXELS=PIXELS, VECTOR=vector, TWO=two, LAST=planes and i == 0,
            )  # fmt: skip
            source = target


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `pamr` launches."""
    weights = {"table": "*i32", "dilations": "*i32", "weights": "*i16", "scales": "*fp32", "slots": "i32"}
    yield Variant("_affinities", _affinities, {"image": "*i32", **weights}, {"PIXELS": PIXELS}, {})
    yield Variant(
        "_pack", _pack, {"masks": "*fp32", "planes": "*fp32", "tokens": "i32", "labels": "i32"},
        {"PIXELS": PIXELS, "VECTOR": MAX_VECTOR}, {},
    )  # fmt: skip
    for vector, two, last in [(4, True, False), (4, True, True), (4, False, False), (4, False, True), (2, False, False),
                              (1, False, False)]:  # fmt: skip
        yield Variant(
            f"_average vector={vector}{' two' * two}{' last' * last}", _average,
            {"source": "*fp32", "target": "*fp32", **weights, "tokens": "i32", "labels": "i32", "groups": "i32"},
            {"PIXELS": PIXELS, "VECTOR": vector, "TWO": two, "LAST": last}, {},
        )  # fmt: skip
