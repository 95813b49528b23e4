# SPDX-License-Identifier: MIT
"""What a ViT block does between its matrix products, for GPUs: residual, LayerScale and LayerNorm in one pass; GELU.

Both are bound by memory, so a pass over the tokens that is saved is time that is saved. They are no operators: they
write in place, and torch.compile fuses the same layers of anybody's own network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tables import Variant

ELEMENTS = 2048  # per block of either kernel


@triton.jit
def _residual_norm(
    x, y, gamma, weight, bias, out, rows, row_stride, eps,
    C: tl.constexpr, PADDED_C: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Adds gamma * y to x [rows, C], and writes the LayerNorm of the sum to `out`; grid (blocks of ROWS rows)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, PADDED_C)
    channel = c < C
    mask = (row < rows)[:, None] & channel[None, :]
    at = row[:, None] * row_stride + c[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            added *= tl.load(gamma + c, mask=channel, other=0.0).to(tl.float32)[None, :]
        total = (value + added).to(x.dtype.element_ty)
        tl.store(x + at, total, mask=mask)
        value = total.to(tl.float32)  # the norm of what was written, as in torch
    mean = tl.sum(value, 1) / C
    centered = tl.where(mask, value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    w = tl.load(weight + c, mask=channel, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=channel, other=0.0).to(tl.float32)
    normed = centered * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gelu(x, count, ELEMENTS: tl.constexpr):
    """x [count] = x * Phi(x) in place, where Phi is the normal distribution; grid (blocks of ELEMENTS)."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(x + at, result.to(x.dtype.element_ty), mask=at < count)


def _shape(channels: int) -> dict[str, int]:
    padded = triton.next_power_of_2(channels)
    return {"C": channels, "PADDED_C": padded, "ROWS": max(1, ELEMENTS // padded)}


def residual_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Adds gamma * y to x in place and returns the LayerNorm of the sum, computed in float32, on the current stream.

    Args:
        x: [n, C] on a GPU, contiguous, like all arguments; up to 2^31 rows.
        y: [n, C], or None to add nothing.
        gamma: [C], or None for 1.
        weight: [C] of the LayerNorm.
        bias: [C] of the LayerNorm.
        eps: Added to the variance.
    """
    out = torch.empty_like(x)
    if x.numel():
        shape = _shape(x.shape[1])
        with torch.cuda.device_of(x):
            launch(
                _residual_norm, (triton.cdiv(len(x), shape["ROWS"]),),
                x, y, gamma, weight, bias, out, len(x), x.stride(0), eps, **shape,
                ADD=y is not None, SCALE=gamma is not None,
            )  # fmt: skip
    return out


def gelu(x: Tensor) -> Tensor:
    """Replaces x, contiguous on a GPU, by its GELU, computed in float32, and returns it; on the current stream."""
    if x.numel():
        with torch.cuda.device_of(x):
            launch(_gelu, (triton.cdiv(x.numel(), ELEMENTS),), x, x.numel(), ELEMENTS=ELEMENTS)
    return x


def ahead_of_time() -> Iterator[Variant]:
    """The kernels that `residual_norm` and `gelu` launch."""
    for name in ("fp32", "bf16"):
        parameters = dict.fromkeys(("weight", "bias"), f"*{name}")
        sizes = {"rows": "i32", "row_stride": "i32", "eps": "fp32"}
        for channels in (192, 384, 768, 1024):
            for add, scale in ((False, False), (True, False), (True, True)):
                types = {
                    "x": f"*{name}",
                    **({"y": f"*{name}"} if add else {}),
                    **({"gamma": f"*{name}"} if scale else {}),
                }
                absent = {key: None for key in ("y", "gamma") if key not in types}
                yield Variant(
                    f"_residual_norm {name} C={channels}" + " add" * add + " scale" * scale, _residual_norm,
                    {**types, **parameters, "out": f"*{name}", **sizes},
                    {**absent, **_shape(channels), "ADD": add, "SCALE": scale}, {},
                )  # fmt: skip
        yield Variant(f"_gelu {name}", _gelu, {"x": f"*{name}", "count": "i32"}, {"ELEMENTS": ELEMENTS}, {})
