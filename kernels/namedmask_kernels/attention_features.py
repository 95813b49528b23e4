# SPDX-License-Identifier: MIT
"""Attention over packed sequences that also returns softmax weights of chosen queries, log-sum-exps and key norms."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import FLOATING, as_float, expect_dense, expect_dtype, expect_int, expect_ints, is_sequence
from .reference import attention_features as reference

NAME = "attention_features"
FIELDS = ("output", "rows", "lse", "key_norms")
MOST_TAPS_OF_NOTHING = 2**16  # of a batch without tokens, where any row is valid


class AttentionFeatures(NamedTuple):
    """Result of `attention_features` for T tokens, H heads of D dimensions and R tapped rows.

    Fields that were not requested are None.

    Attributes:
        output: [T, H, D], dtype of qkv.
        rows: float32 [T, H, R]; the softmax weight that the query of tapped row r of the token's sequence gives to the
            token.
        lse: float32 [T, H]; the natural logarithm of the sum of exp(scale * q . k) over the keys, for each query.
        key_norms: float32 [T]; the squared norm of the token's key across all heads.
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
    """Computes softmax attention within each sequence of a packed batch, and statistics of the same pass over the keys.

    Args:
        qkv: [T, 3, H, D] with D from 1 to 256: query, key and value of each token, the sequences concatenated. A
            non-contiguous view is copied. float32, bfloat16 or float16, computed in float32. The reference also accepts
            float64, and then returns all fields in float64.
        offsets: int32 [B + 1] on the CPU (``cu_seqlens``): sequence b owns tokens offsets[b] to offsets[b + 1].
            Sequences of length 0 are allowed.
        scale: Factor of q . k before the softmax, finite in float32. Default: 1 / sqrt(D).
        tap_rows: The queries whose softmax rows are returned: the first n tokens of each sequence (1 for CLS), or a
            list of positions in the sequence.
        want: The fields to compute.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        An `AttentionFeatures`.

    Raises:
        TypeError: If an argument is not a tensor or has the wrong dtype, or a setting is not a number.
        ValueError: If a shape is wrong, `offsets` do not match `qkv`, a tapped row lies beyond the end of a sequence,
            `scale` is not finite, a field is unknown, or the backend cannot run.
        RuntimeError: If `qkv` requires a gradient, since there is none.

    Accuracy:
        That of torch's scaled_dot_product_attention in float32. 16-bit input loses nothing but the final rounding,
        with two exceptions. The Triton version, and AMD CPUs with AVX512-BF16 for bfloat16 input, also round the
        softmax weights before they are multiplied with the values, as torch does; these CPUs take numbers below 2^-126
        as 0. On other CPUs with AVX-512 VNNI, bfloat16 queries and keys are multiplied as 16-bit fixed-point numbers:
        lse is off by about 1e-5 |q| |k| scale, and output by less than its final rounding. As in torch, NaN,
        Inf and products beyond the range of float32 make results of their sequence and head NaN or Inf.

    Cost:
        4 n^2 D flops per head and sequence of n tokens; half of that without the output, and only the tapped rows if
        neither output nor lse is requested. O(T) memory. On an H100, bfloat16, 6 heads of 64 dimensions, 16 sequences
        of 3,601 tokens: the kernel of the output takes 0.856 ms (372 TFLOP/s), a single call for it took 1.20 ms (266
        TFLOP/s), since the GPU waited for the host. The first call with given offsets builds tables for the GPU, which
        the next ones use; no GPU has timed that.

    Determinism:
        Results of a sequence are bit-identical in any batch and with any number of threads.

    Source:
        T. Dao et al., FlashAttention, NeurIPS 2022. The tapped rows are those that DINO's attention maps are made of.

    Examples:
        >>> qkv = torch.randn(197 + 257, 3, 6, 64, dtype=torch.bfloat16)  # tokens of two images, CLS first
        >>> offsets = torch.tensor([0, 197, 197 + 257], dtype=torch.int32)
        >>> attention_features(qkv, offsets).rows.shape  # the attention weights of CLS
        torch.Size([454, 6, 1])
    """
    if not isinstance(qkv, Tensor) or not isinstance(offsets, Tensor):
        name, value = ("offsets", offsets) if isinstance(qkv, Tensor) else ("qkv", qkv)
        raise TypeError(f"{NAME}: {name} must be a torch tensor, but is {type(value).__name__}")
    expect_dense(NAME, "qkv", qkv)
    if qkv.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{NAME} has no gradient; call it under torch.no_grad() or on detached tensors")
    expect_dtype(NAME, "qkv", qkv, *FLOATING)
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not 1 <= qkv.shape[3] <= 256:
        raise ValueError(f"{NAME}: qkv must be [T, 3, H, D] with D from 1 to 256, but has shape {list(qkv.shape)}")
    expect_dtype(NAME, "offsets", offsets, torch.int32)
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.device.type != "cpu":
        raise ValueError(
            f"{NAME}: offsets must be [B + 1] on cpu, but has shape {list(offsets.shape)} on {offsets.device}"
        )
    # No sequence is longer than all tokens; the backends check the sequences.
    most = qkv.shape[0] or MOST_TAPS_OF_NOTHING
    if is_sequence(tap_rows):
        taps = expect_ints(NAME, "tap_rows", tap_rows, high=most - 1)
    else:
        taps = list(range(expect_int(NAME, "tap_rows", tap_rows, high=most)))
    if isinstance(want, str) or not isinstance(want, Collection) or not all(field in FIELDS for field in want):
        raise ValueError(f"{NAME}: want must be a subset of {', '.join(FIELDS)}, but is {want!r}")
    scale = qkv.shape[3] ** -0.5 if scale is None else as_float(NAME, "scale", scale)
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{NAME}: scale must be finite in float32, but is {scale}")
    fields = _attend(
        qkv.contiguous(),
        offsets.contiguous(),
        scale,
        taps,
        *(name in want for name in FIELDS),
        backend,
    )
    return AttentionFeatures(*(x if name in want else None for name, x in zip(FIELDS, fields, strict=True)))


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------

Outputs = tuple[Tensor, ...]  # output, rows, lse, key_norms


def _outputs(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *requested: bool) -> Outputs:
    """Fields that are not requested have no elements, since an operator cannot return None."""
    tokens, _, heads, dim = qkv.shape
    shapes = (tokens, heads, dim), (tokens, heads, len(taps)), (tokens, heads), (tokens,)
    computed = torch.promote_types(qkv.dtype, torch.float32)
    return tuple(
        qkv.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, needed, dtype in zip(shapes, requested, (qkv.dtype, computed, computed, computed), strict=True)
    )


def _sequences(qkv: Tensor, offsets: Tensor, taps: list[int]) -> list[tuple[int, int]]:
    """Begin and end of each sequence.

    Raises:
        ValueError: If offsets or taps do not match `qkv`, with the messages of the C++ kernel.
    """
    at = offsets.tolist()
    if at[0] != 0 or at[-1] != qkv.shape[0]:
        raise ValueError(
            f"{NAME}: offsets must run from 0 to the {qkv.shape[0]} tokens of qkv, but run from {at[0]} to {at[-1]}"
        )
    bounds, furthest = list(itertools.pairwise(at)), max(taps, default=-1)
    for b, (begin, end) in enumerate(bounds):
        if begin > end:
            raise ValueError(f"{NAME}: offsets must not decrease, but sequence {b} runs from {begin} to {end}")
        if begin < end <= begin + furthest:
            raise ValueError(
                f"{NAME}: tap_rows must lie inside every sequence, but row {furthest} is asked for "
                f"and sequence {b} has {end - begin} tokens"
            )
    return bounds


def _attend_reference(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *requested: bool) -> Outputs:
    outputs = _outputs(qkv, offsets, scale, taps, *requested)
    for begin, end in _sequences(qkv, offsets, taps if requested[1] else []):
        if begin == end:
            continue
        fields = reference.attention_features(qkv[begin:end], scale, taps if requested[1] else [])
        for out, field, needed in zip(outputs, fields, requested, strict=True):
            if needed:
                out[begin:end] = field
    return outputs


def _attend_cpu(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *requested: bool) -> Outputs:
    if qkv.dtype == torch.float64:
        raise TypeError(f"{NAME}: qkv must be float32, bfloat16 or float16 for the cpu backend, but is float64")
    outputs = _outputs(qkv, offsets, scale, taps, *requested)
    fields = (out if needed else None for out, needed in zip(outputs, requested, strict=True))
    backends.native().attention_features(
        qkv, offsets, torch.tensor(taps, dtype=torch.int32, device="cpu"), scale, *fields
    )
    return outputs


def _attend_triton(qkv: Tensor, offsets: Tensor, scale: float, taps: list[int], *requested: bool) -> Outputs:
    from .triton import attention_features as triton  # not at import: Triton is optional

    if qkv.dtype == torch.float64:
        raise TypeError(f"{NAME}: qkv must be float32, bfloat16 or float16 for the triton backend, but is float64")
    _sequences(qkv, offsets, taps if requested[1] else [])
    outputs = _outputs(qkv, offsets, scale, taps, *requested)
    output, rows, lse, key_norms = (out if needed else None for out, needed in zip(outputs, requested, strict=True))
    triton.attention_features(qkv, offsets, taps, scale, output, rows, lse, key_norms)
    return outputs


_attend = register(
    f"{NAME}(Tensor qkv, Tensor offsets, float scale, int[] taps, bool output, bool rows, bool lse, bool key_norms) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs,
    reference=_attend_reference,
    cpu=_attend_cpu,
    triton=_attend_triton,
)
