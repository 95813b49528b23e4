# SPDX-License-Identifier: MIT
"""attention_features for GPUs of compute capability 8.0 and later: flash attention over packed sequences.

One pass over the keys per block of queries with an online softmax (Dao, FlashAttention-2, 2023) computes the output and
the log-sum-exp. A tapped row is then one exponential per key, and the key norms are a sum: a second pass over the keys.
Nothing of size N x N is written. No atomics: bit-identical on every call and in any batch. With 16-bit input the
softmax weights are rounded to 16 bits before they are multiplied with the values, as in every flash attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tables import Variant, block_table, expect_blocks, table_on_device

LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Block sizes of `_attend`: queries and keys per block, warps, and stages of the pipeline that loads keys."""

    queries: int
    keys: int
    warps: int
    stages: int


# (head dim rounded up to a power of two, bytes per element) -> Blocks. A table instead of autotuning: no search on the
# first call, and the same bits on every machine. All fit the 99 kB of shared memory of the smallest sm_8x. Chosen so
# that no registers spill; on an H100 none of 33 others was more than 4% faster.
BLOCKS = {
    (32, 2): Blocks(128, 64, 4, 3),
    (64, 2): Blocks(128, 64, 4, 3),
    (128, 2): Blocks(128, 64, 8, 2),
    (256, 2): Blocks(64, 32, 8, 2),
    (32, 4): Blocks(64, 32, 4, 2),
    (64, 4): Blocks(64, 32, 8, 2),
    (128, 4): Blocks(32, 16, 8, 2),
    (256, 4): Blocks(16, 16, 8, 1),
}
# For head dims below the power of two, if the registers for their masks would spill.
MASKED_BLOCKS = {(64, 2): Blocks(128, 64, 8, 3)}
TOKENS = 32  # per block of `_statistics`
STATISTICS = {"maxnreg": 255}  # its options: without a limit, ptxas spills a few registers for more occupancy at D = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _keys_pass(
    acc, top, total, q, keys, values, token_stride, low, high, length, scale,
    D: tl.constexpr, PADDED_D: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, NEGATIVE: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys low .. high, KEYS at a time; only with TAIL may they extend past `length`."""
    d = tl.arange(0, PADDED_D)
    n = tl.arange(0, KEYS)
    for start in tl.range(low, high, KEYS):
        inside = start + n < length
        at = (start + n) * token_stride
        k_mask = (d < D)[:, None]
        if TAIL:
            k_mask = k_mask & inside[None, :]
        if TAIL or D != PADDED_D:
            k = tl.load(keys + at[None, :] + d[:, None], mask=k_mask, other=0.0)
        else:
            k = tl.load(keys + at[None, :] + d[:, None])
        products = tl.dot(q, k, input_precision="ieee")  # [queries, keys]
        if TAIL:
            scores = tl.where(inside[None, :], products * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
        else:
            # Scales the maximum of each row instead of all scores, and these in the FMA that subtracts it. Added with
            # its sign reversed: a subtraction spills registers on sm_80 (Triton 3.6).
            largest = (tl.min(products, 1) if NEGATIVE else tl.max(products, 1)) * scale
            new_top = tl.maximum(top, largest)
            p = tl.exp2(products * scale + (-new_top)[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        if WRITE_OUTPUT:
            v_mask = (d < D)[None, :]
            if TAIL:
                v_mask = v_mask & inside[:, None]
            if TAIL or D != PADDED_D:
                v = tl.load(values + at[:, None] + d[None, :], mask=v_mask, other=0.0)
            else:
                v = tl.load(values + at[:, None] + d[None, :])
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def _attend(
    qkv, table, output, lse, scale, token_stride, part_stride, head_stride,
    D: tl.constexpr, PADDED_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, NEGATIVE: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,
):  # fmt: skip
    """output [T, H, D] and lse [T, H] for a block of queries of one sequence and one head; grid (blocks, heads).

    table: int32 [blocks, 3], the first token of the sequence, its length, and the block's first query in it
    scale: the softmax's scale * log2(e), so that the exponentials are powers of two; below 0 only if NEGATIVE
    """
    entry = table + 3 * tl.program_id(0)
    begin = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 1)
    first = tl.load(entry + 2)
    head = tl.program_id(1)
    heads = tl.num_programs(1)

    m = first + tl.arange(0, QUERIES)
    d = tl.arange(0, PADDED_D)
    mask = (m < length)[:, None] & (d < D)[None, :]
    queries = qkv + begin * token_stride + head * head_stride
    keys = queries + part_stride
    values = keys + part_stride
    q = tl.load(queries + m[:, None] * token_stride + d[None, :], mask=mask, other=0.0)

    acc = tl.zeros([QUERIES, PADDED_D], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    whole = length // KEYS * KEYS
    acc, top, total = _keys_pass(
        acc, top, total, q, keys, values, token_stride, 0, whole, length, scale,
        D, PADDED_D, KEYS, False, NEGATIVE, WRITE_OUTPUT,
    )  # fmt: skip
    acc, top, total = _keys_pass(
        acc, top, total, q, keys, values, token_stride, whole, length, length, scale,
        D, PADDED_D, KEYS, True, NEGATIVE, WRITE_OUTPUT,
    )  # fmt: skip

    at = (begin + m) * heads + head
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=m < length)
    if WRITE_OUTPUT:
        result = (acc / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + at[:, None] * D + d[None, :], result, mask=mask)


@triton.jit
def _statistics(
    qkv, table, taps, lse, rows, norms, scale, heads, token_stride, part_stride, head_stride, count,
    D: tl.constexpr, PADDED_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Both statistics of the keys, for a block of tokens of one sequence; grid (blocks).

    table: as for `_attend`, with the block's first token instead of its first query
    rows: None, or [T, H, R], the softmax weight that each of the `count` = R tapped queries of a sequence gives to its
        tokens
    norms: None, or [T], the sum of k^2 over heads and channels
    """
    entry = table + 3 * tl.program_id(0)
    begin = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 1)
    first = tl.load(entry + 2)

    n = (first + tl.arange(0, TOKENS)).to(tl.int64)  # any number of tokens, for the norms alone
    d = tl.arange(0, PADDED_D)
    mask = (n < length)[:, None] & (d < D)[None, :]
    total = tl.zeros([TOKENS], tl.float32)
    for head in tl.range(0, heads):
        queries = qkv + begin * token_stride + head * head_stride
        k = tl.load(queries + part_stride + n[:, None] * token_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(k * k, 1)
        if rows is not None:
            at = (begin + n) * heads + head
            for r in tl.range(0, count):
                tapped = tl.load(taps + r).to(tl.int64)
                q = tl.load(queries + tapped * token_stride + d, mask=d < D, other=0.0).to(tl.float32)
                score = tl.sum(k * q[None, :], 1) * scale
                weight = tl.exp2(score - tl.load(lse + (begin + tapped) * heads + head) * 1.4426950408889634)
                tl.store(rows + at * count + r, weight, mask=n < length)
    if norms is not None:
        tl.store(norms + begin + n, total, mask=n < length)


def _padded(dim: int, dtype: torch.dtype) -> tuple[int, Blocks]:
    """The padded head dim, and the block sizes of `_attend`."""
    padded = max(16, triton.next_power_of_2(dim))
    key = max(32, padded), dtype.itemsize
    return padded, BLOCKS[key] if dim == padded else MASKED_BLOCKS.get(key, BLOCKS[key])


def _positions(taps: tuple[int, ...]) -> np.ndarray:
    return np.array(taps, np.int32)


def attention_features(
    qkv: Tensor,
    offsets: Tensor,
    taps: list[int],
    scale: float,
    output: Tensor | None,
    rows: Tensor | None,
    lse: Tensor | None,
    key_norms: Tensor | None,
) -> None:
    """Fills the outputs that are not None, on the current stream.

    Args:
        qkv: [T, 3, H, D] on a GPU, contiguous; up to 2^31 elements per sequence.
        offsets: int32 [B + 1] on the CPU, checked by the caller.
        taps: Positions of the tapped queries in their sequence.
        scale: Factor of q . k before the softmax.
        output: [T, H, D], dtype of qkv; like all outputs on the same GPU.
        rows: float32 [T, H, R].
        lse: float32 [T, H].
        key_norms: float32 [T].
    """
    tokens, _, heads, dim = qkv.shape
    if tokens == 0 or heads == 0:
        return
    expect_blocks("attention_features", "heads", heads)
    padded, blocks = _padded(dim, qkv.dtype)
    shape = {"D": dim, "PADDED_D": padded}
    strides = qkv.stride()[:3]

    if not taps:
        rows = None

    with torch.cuda.device_of(qkv):
        at = sums = None
        if output is not None or rows is not None or lse is not None:
            tapped = tuple(taps) if output is None and lse is None else None
            table = table_on_device(block_table, qkv, offsets, blocks.queries, tapped)
            sums = lse if lse is not None else qkv.new_empty(tokens, heads, dtype=torch.float32)
            launch(
                _attend, (len(table), heads),
                qkv, table, output, sums, scale * LOG2_E, *strides, **shape, QUERIES=blocks.queries, KEYS=blocks.keys,
                NEGATIVE=scale < 0, WRITE_OUTPUT=output is not None, num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        if rows is not None:
            at = table_on_device(_positions, qkv, tuple(taps))
        if rows is not None or key_norms is not None:
            table = table_on_device(block_table, qkv, offsets, TOKENS)
            launch(
                _statistics, (len(table),),
                qkv, table, at, sums, rows, key_norms, scale * LOG2_E, heads, *strides, len(taps), **shape,
                TOKENS=TOKENS, **STATISTICS,
            )  # fmt: skip


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `attention_features` launches."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    strides = dict.fromkeys(("token_stride", "part_stride", "head_stride"), "i32")
    for dtype in DTYPES:
        for dim in (32, 48, 64, 80, 96, 112, 128, 256):
            padded, blocks = _padded(dim, dtype)
            name, dims = names[dtype], {"D": dim, "PADDED_D": padded}
            array = {"qkv": f"*{name}", "table": "*i32"}
            for write in (True, False):  # NEGATIVE only replaces a maximum by a minimum
                yield Variant(
                    f"_attend {name} D={dim}" + ("" if write else " lse only"), _attend,
                    {**array, "output": f"*{name}", "lse": "*fp32", "scale": "fp32", **strides},
                    {**dims, "QUERIES": blocks.queries, "KEYS": blocks.keys, "NEGATIVE": False, "WRITE_OUTPUT": write},
                    {"num_warps": blocks.warps, "num_stages": blocks.stages},
                )  # fmt: skip
            for fields in (("rows", "norms"), ("rows",), ("norms",)):
                absent = {"rows", "norms"} - {*fields} | ({"taps", "lse"} if "rows" not in fields else set())
                types = {
                    **array, "taps": "*i32", "lse": "*fp32", "rows": "*fp32", "norms": "*fp32", "scale": "fp32",
                    "heads": "i32", **strides, "count": "i32",
                }  # fmt: skip
                yield Variant(
                    f"_statistics {name} D={dim} {' '.join(fields)}", _statistics,
                    {argument: t for argument, t in types.items() if argument not in absent},
                    {**dims, "TOKENS": TOKENS, **dict.fromkeys(absent)}, STATISTICS,
                )  # fmt: skip
