# SPDX-License-Identifier: MIT
"""Plain attention of a ViT block by the fastest installed library, according to a measured table.

Every library takes the packed tokens of all photos, qkv [T, 3, H, D], where photo b has the tokens ends[b] to
ends[b + 1], and returns [T, H, D]. Results do not depend on batch composition.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import attention_features, backends


def _sdpa(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """torch's attention, one photo at a time."""
    out = torch.empty_like(qkv[:, 0])
    for begin, end in itertools.pairwise(ends):
        q, k, v = qkv[begin:end].permute(1, 2, 0, 3)[:, None]  # [1, H, n, D] each
        out[begin:end] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out


def _attention_features(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """The operator of `namedmask_kernels`, the whole batch in one call."""
    offsets = torch.tensor(ends, dtype=torch.int32)
    output = attention_features(qkv, offsets, scale=scale, want=("output",)).output
    assert output is not None
    return output


def _xformers(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """xformers' block-diagonal attention, the whole batch in one call."""
    from xformers.ops import fmha

    if ends[-1] == 0:
        return qkv[:, 0]
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    mask = fmha.BlockDiagonalMask.from_seqlens([n for n in lengths if n > 0])
    q, k, v = qkv[None].unbind(2)  # [1, T, H, D] each
    return fmha.memory_efficient_attention(q, k, v, mask, scale=scale)[0]


LIBRARIES: dict[str, Callable[[Tensor, list[int], float], Tensor]] = {
    "torch SDPA": _sdpa,
    "attention_features": _attention_features,
    "xformers": _xformers,
}


class Fastest(NamedTuple):
    library: str
    margin: str  # how much faster it was, and at which lengths


# (device class, dtype) -> the fastest library, measured on two threads with heads of 32, 64 and 128 dims and 384
# channels in total. `pytest bench/bench_backbones.py --benchmark-only -s -k libraries` repeats the measurement.
# avx512 and avx2 were measured on an AVX-512 machine limited by NMK_LEVEL, for avx2 with torch's libraries limited too
# (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2). The key has no length: only float32
# at 197 tokens is up to 15% slower, attention is a tenth of the network there, and a choice by length would split
# batches. There are no rows for GPUs: there torch's attention is the default.
TABLE: dict[tuple[str, torch.dtype], Fastest] = {
    ("cpu avx512_vnni", torch.float32): Fastest(
        "attention_features", "1.1 to 1.4 times torch SDPA's speed at 785 to 3,601 tokens, 0.87 to 1 times at 197"
    ),
    ("cpu avx512_vnni", torch.bfloat16): Fastest(
        "attention_features", "1.8 to 2.3 times torch SDPA's speed at 785 to 3,601 tokens, 1.3 to 1.5 times at 197"
    ),
    ("cpu avx512", torch.float32): Fastest(  # the same code as above
        "attention_features", "1.1 to 1.4 times torch SDPA's speed at 785 to 3,601 tokens, 0.87 to 1 times at 197"
    ),
    ("cpu avx512", torch.bfloat16): Fastest(
        "attention_features", "1.6 to 2.0 times torch SDPA's speed at 785 to 3,601 tokens, 1.3 to 1.7 times at 197"
    ),
    ("cpu avx2", torch.float32): Fastest(
        "attention_features", "1 to 1.1 times torch SDPA's speed at 785 to 3,601 tokens, 0.9 times at 197"
    ),
    ("cpu avx2", torch.bfloat16): Fastest(
        "attention_features", "1.1 to 1.3 times torch SDPA's speed at 785 to 3,601 tokens, 1 to 1.1 times at 197"
    ),
}


def device_class(device: torch.device) -> str:
    """The device part of a key of `TABLE`: "cpu avx512", "cuda sm_90"."""
    if device.type == "cuda":
        return "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device))
    native = backends.native() if device.type == "cpu" else None
    return device.type if native is None else f"{device.type} {native.level()}"


def obstacle(library: str, device: torch.device) -> str | None:
    """Returns the reason why a library cannot run on a device; None if it can."""
    if library == "torch SDPA":
        return None
    if library == "attention_features":
        obstacles = (backends.obstacle(library, backend, device) for backend in ("cpu", "triton"))
        reasons = [reason for reason in obstacles if reason is not None]
        return "; ".join(reasons) if len(reasons) == 2 else None
    return _why_no_xformers(device)


@functools.cache
def _why_no_xformers(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA devices only"
    try:
        _xformers(torch.zeros(2, 3, 1, 64, dtype=torch.bfloat16, device=device), [0, 1, 2], 1.0)
    except (ImportError, NotImplementedError) as error:  # NotImplementedError: none of its kernels can be loaded
        return str(error).splitlines()[0]
    return None


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the library of `TABLE` for a device and dtype; torch's if there is no entry or the library cannot run."""
    fastest = TABLE.get((device_class(device), dtype))
    return "torch SDPA" if fastest is None or obstacle(fastest.library, device) else fastest.library


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Says which library computes attention for a device and dtype and why, and whether the others could run."""
    title = f"attention in {str(dtype)[6:]} on {device_class(device)}"
    fastest, chosen = TABLE.get((device_class(device), dtype)), choose(device, dtype)
    if fastest is None:
        lines = [f"{title}: {chosen}, the default, because no measurement exists"]
    elif fastest.library != chosen:
        lines = [f"{title}: {chosen}, because the fastest library, {fastest.library}, cannot run"]
    else:
        lines = [f"{title}: {chosen}, the fastest library: {fastest.margin}"]
    for library in LIBRARIES:
        if library != chosen:
            lines.append(f"  {library}: {obstacle(library, device) or 'could run'}")
    return "\n".join(lines)
