# SPDX-License-Identifier: MIT
"""The attention of a ViT's block that needs only its output: the fastest of the libraries present, by a measured table.

Every library takes the tokens of all photos packed, qkv [T, 3, H, D] with photo b at tokens ends[b] to ends[b + 1], and
gives [T, H, D]. A photo's output is the same alone and in company.
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
    """torch's attention, a photo at a time."""
    out = torch.empty_like(qkv[:, 0])
    for begin, end in itertools.pairwise(ends):
        q, k, v = qkv[begin:end].permute(1, 2, 0, 3)[:, None]  # [1, H, n, D] each
        out[begin:end] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out


def _attention_features(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """Ours, the whole batch in one call."""
    offsets = torch.tensor(ends, dtype=torch.int32)
    return attention_features(qkv, offsets, scale=scale, want=("output",)).output


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
    margin: str  # by which it was the fastest, and in which range of head dims and lengths


# (device class, dtype) -> the fastest, on two threads, heads of 32, 64 and 128 dims side by side to 384 channels.
# `pytest bench/bench_backbones.py --benchmark-only -s -k libraries` measures it again, beside what is chosen here.
# avx512 and avx2 were measured on an AVX-512 machine held back by NMK_LEVEL, for avx2 torch's libraries too
# (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2). Lengths are no part of the key:
# only float32 at 197 tokens is up to 15% slower, of an attention that is a tenth of the network, and a choice by length
# would split batches. There are no rows for GPUs: none has run it, and torch's attention is taken until one has.
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
    """The rows of `TABLE` that hold for a device: "cpu avx512", "cuda sm_90"."""
    if device.type == "cuda":
        return "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"{device.type} {backends.native().level()}" if device.type == "cpu" and backends.native() else device.type


def obstacle(library: str, device: torch.device) -> str | None:
    """Why a library cannot run on a device; None when it can."""
    if library == "torch SDPA":
        return None
    if library == "attention_features":
        reasons = [backends.obstacle(library, backend, device) for backend in ("cpu", "triton")]
        return None if None in reasons else "; ".join(reasons)
    return _why_no_xformers(device)


@functools.cache
def _why_no_xformers(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on CUDA devices alone"
    try:
        _xformers(torch.zeros(2, 3, 1, 64, dtype=torch.bfloat16, device=device), [0, 1, 2], 1.0)
    except (ImportError, NotImplementedError) as error:  # of the second kind where no kernel of it can be loaded
        return str(error).splitlines()[0]
    return None


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The library for a device and dtype: that of `TABLE`, or torch's where none was measured or it cannot run."""
    found = TABLE.get((device_class(device), dtype))
    return "torch SDPA" if found is None or obstacle(found.library, device) else found.library


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Which library computes attention for a device and dtype, how that is known, and why others cannot."""
    place = f"{str(dtype)[6:]} on {device_class(device)}"
    found, chosen = TABLE.get((device_class(device), dtype)), choose(device, dtype)
    if found is None:
        lines = [f"attention in {place}: {chosen}, until somebody measures which is the fastest there"]
    elif found.library != chosen:
        lines = [f"attention in {place}: {chosen}, for {found.library}, the fastest there, cannot run"]
    else:
        lines = [f"attention in {place}: {chosen}, the fastest there: {found.margin}"]
    for library in LIBRARIES:
        if library != chosen:
            lines.append(f"  {library}: {obstacle(library, device) or 'could run'}")
    return "\n".join(lines)
