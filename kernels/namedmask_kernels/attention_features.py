# SPDX-License-Identifier: MIT
"""Attention over packed sequences that also tells its weights for chosen queries, log-sum-exps and key norms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import expect_dtype
from .reference import attention_features as reference

NAME = "attention_features"
FIELDS = ("output", "rows", "lse", "key_norms")


class AttentionFeatures(NamedTuple):
    """What `attention_features` found for T tokens, H heads of D dimensions and R tapped rows; None if not wanted.

    output:    [T, H, D], dtype of qkv
    rows:      float32 [T, H, R]: the weight that the query of tapped row r of the token's sequence gives to the token
    lse:       float32 [T, H]: the natural logarithm of the sum of exp(scale * q . k) over the keys, for each query
    key_norms: float32 [T]: the squared norm of the token's key across all heads
    """

    output: Tensor | None
    rows: Tensor | None
    lse: Tensor | None
    key_norms: Tensor | None


def attention_features(
    qkv: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    tap_rows: int | Sequence[int] = 1,
    want: Sequence[str] = FIELDS,
    backend: str = "auto",
) -> AttentionFeatures:
    """Softmax attention within each sequence of a packed batch, and what its pass over the keys can tell besides.

    qkv:      [T, 3, H, D] with D from 1 to 256: query, key and value of each token, the sequences one after another. A
              view is copied. float32, bfloat16 or float16, computed in float32; the reference also takes float64, and
              gives all fields in it.
    offsets:  int32 [B + 1] on the CPU (cu_seqlens): sequence b owns tokens offsets[b] to offsets[b + 1]. Sequences of
              length 0 are fine.
    scale:    factor of q . k before the softmax; None is 1 / sqrt(D).
    tap_rows: whose rows of weights are wanted: the first n tokens of each sequence (1: CLS), or these positions in it.
    want:     which fields to compute.
    Errors:   TypeError for a wrong dtype; ValueError for a wrong shape, offsets that do not fit, a tapped row beyond
              the end of a sequence, an unknown field, a backend that cannot run; RuntimeError where a gradient is
              wanted, since there is none.
    Cost:     4 n^2 D flops per head and sequence of n tokens (half without the output, none but for the taps where
              neither output nor lse is wanted); memory O(T). Deterministic: a sequence's results have the same bits
              alone, in any batch and with any thread count.
    Accuracy: that of torch's scaled_dot_product_attention in float32; 16-bit input loses nothing but the final
              rounding (triton also rounds the weights that meet the values, as torch does). On CPUs with AVX-512 VNNI
              bfloat16 queries and keys meet as 16-bit fixed point: lse is off by some 1e-5 |q| |k| scale, and output
              by less than the rounding that ends it. rows never are.
    Source:   T. Dao et al., FlashAttention, NeurIPS 2022; the taps are those that DINO's attention maps need.
    """
    if not isinstance(qkv, Tensor) or not isinstance(offsets, Tensor):
        name, value = ("offsets", offsets) if isinstance(qkv, Tensor) else ("qkv", qkv)
        raise TypeError(f"{NAME}: {name} must be a torch tensor, but is {type(value).__name__}")
    if qkv.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{NAME} has no gradient; call it under torch.no_grad() or on detached tensors")
    expect_dtype(NAME, "qkv", qkv, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not 1 <= qkv.shape[3] <= 256:
        raise ValueError(f"{NAME}: qkv must be [T, 3, H, D] with D from 1 to 256, but is {list(qkv.shape)}")
    expect_dtype(NAME, "offsets", offsets, torch.int32)
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.device.type != "cpu":
        raise ValueError(f"{NAME}: offsets must be [B + 1] on cpu, but is {list(offsets.shape)} on {offsets.device}")
    taps = list(range(tap_rows)) if isinstance(tap_rows, int) else [int(row) for row in tap_rows]
    if (isinstance(tap_rows, int) and tap_rows < 0) or any(row < 0 for row in taps):
        raise ValueError(f"{NAME}: tap_rows must not be negative, but is {tap_rows}")
    if isinstance(want, str) or not set(want) <= set(FIELDS):
        raise ValueError(f"{NAME}: want must name some of {', '.join(FIELDS)}, but is {want!r}")
    fields = _attend(
        qkv.contiguous(),
        offsets.contiguous(),
        qkv.shape[3] ** -0.5 if scale is None else float(scale),
        taps,
        *(name in want for name in FIELDS),
        backend,
    )
    return AttentionFeatures(*(x if name in want else None for name, x in zip(FIELDS, fields, strict=True)))


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _attend_reference(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *wanted: bool) -> Outputs:
    outputs = _fake_attend(qkv, offsets, scale, taps, *wanted)
    for begin, end in _sequences(qkv, offsets, taps if wanted[1] else []):
        if begin == end:
            continue
        fields = reference.attention_features(qkv[begin:end], scale, taps if wanted[1] else [])
        for out, field, needed in zip(outputs, fields, wanted, strict=True):
            if needed:
                out[begin:end] = field
    return outputs


def _sequences(qkv: Tensor, offsets: Tensor, taps: list[int]) -> list[tuple[int, int]]:
    """Where each sequence begins and ends. ValueError where offsets or taps do not fit, as the C++ code has it."""
    at = offsets.tolist()
    if at[0] != 0 or at[-1] != qkv.shape[0]:
        raise ValueError(
            f"{NAME}: offsets must run from 0 to the {qkv.shape[0]} tokens of qkv, but run from {at[0]} to {at[-1]}"
        )
    found = list(itertools.pairwise(at))
    for b, (begin, end) in enumerate(found):
        if begin > end:
            raise ValueError(f"{NAME}: offsets must not decrease, but sequence {b} runs from {begin} to {end}")
        if begin < end and taps and max(taps) >= end - begin:
            raise ValueError(
                f"{NAME}: tap_rows must lie inside every sequence, but row {max(taps)} is asked for "
                f"and sequence {b} has {end - begin} tokens"
            )
    return found


def _attend_cpu(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *wanted: bool) -> Outputs:
    if qkv.dtype == torch.float64:
        raise TypeError(f"{NAME}: qkv must be float32, bfloat16 or float16 for the cpu backend, but is float64")
    outputs = _fake_attend(qkv, offsets, scale, taps, *wanted)
    given = (out if needed else None for out, needed in zip(outputs, wanted, strict=True))
    backends.native().attention_features(qkv, offsets, torch.tensor(taps, dtype=torch.int32), scale, *given)
    return outputs


def _attend_triton(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *wanted: bool) -> Outputs:
    from .triton import attention_features as triton  # not at import: not every machine has Triton

    if qkv.dtype == torch.float64:
        raise TypeError(f"{NAME}: qkv must be float32, bfloat16 or float16 for the triton backend, but is float64")
    _sequences(qkv, offsets, taps if wanted[1] else [])
    outputs = _fake_attend(qkv, offsets, scale, taps, *wanted)
    given = (out if needed else None for out, needed in zip(outputs, wanted, strict=True))
    triton.attention_features(qkv, offsets, taps, scale, *given)
    return outputs


backends.IMPLEMENTATIONS[NAME] = {"reference": _attend_reference, "cpu": _attend_cpu, "triton": _attend_triton}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _fake_attend(
    qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], output: bool, rows: bool, lse: bool, *rest
) -> Outputs:
    """Empty outputs; those that are not wanted have no elements, since an operator cannot return None."""
    tokens, _, heads, dim = qkv.shape
    shapes = (tokens, heads, dim), (tokens, heads, len(taps)), (tokens, heads), (tokens,)
    computed = torch.promote_types(qkv.dtype, torch.float32)
    return tuple(
        qkv.new_empty(shape if needed else 0, dtype=dtype)
        for shape, needed, dtype in zip(
            shapes, (output, rows, lse, rest[0]), (qkv.dtype, computed, computed, computed), strict=True
        )
    )


def _dispatch(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *rest) -> Outputs:
    *wanted, backend = rest
    return backends.run(NAME, backend, qkv.device)(qkv, offsets, scale, taps, *wanted)


_attend = register(
    f"{NAME}(Tensor qkv, Tensor offsets, float scale, int[] taps, bool output, bool rows, bool lse, bool key_norms, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake_attend,
)
