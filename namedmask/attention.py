# SPDX-License-Identifier: MIT
"""Attention of a ViT block by the fastest installed library, according to a measured table.

Every library takes the packed tokens of all photos, qkv [T, 3, H, D], where photo b has the tokens ends[b] to
ends[b + 1], and returns [T, H, D]. Results of each library do not depend on batch composition.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import attention_features, backends

from .errors import first_line


def _sdpa(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """torch's attention, one photo at a time."""
    out = torch.empty_like(qkv[:, 0])
    for begin, end in itertools.pairwise(ends):
        out[begin:end] = _dense(qkv[begin:end], 1, scale)
    return out


def _dense(qkv: Tensor, count: int, scale: float) -> Tensor:
    """torch's attention of `count` photos of equal length as one dense batch."""
    q, k, v = qkv.unflatten(0, (count, len(qkv) // count)).permute(2, 0, 3, 1, 4)  # [count, H, n, D] each
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def _varlen(qkv: Tensor, ends: list[int], scale: float) -> Tensor:
    """torch's attention over packed sequences (torch 2.10 or later), the whole batch in one call."""
    from torch.nn.attention.varlen import varlen_attn

    if ends[-1] == 0:
        return qkv[:, 0]
    q, k, v = qkv.unbind(1)
    if scale != q.shape[-1] ** -0.5:  # not every version of varlen_attn takes a scale
        q = q * (scale * q.shape[-1] ** 0.5)
    longest = max(end - begin for begin, end in itertools.pairwise(ends))
    offsets = torch.tensor(ends, dtype=torch.int32, device=qkv.device)
    output = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(output, Tensor)
    return output


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
    "torch varlen_attn": _varlen,
    "attention_features": _attention_features,
    "xformers": _xformers,
}


# Tokens of a dense batch. Its number of photos depends on their length alone: for every new shape of a batch, cuDNN
# builds a plan, which takes a tenth of a second and more.
DENSE_TOKENS = 2**15


class Choice(NamedTuple):
    """How a device computes attention.

    Attributes:
        library: Name in `LIBRARIES`.
        dense: Whether many consecutive photos of equal length are computed by torch SDPA instead, as dense batches.
    """

    library: str
    dense: bool = False


def attend(
    choice: Choice, qkv: Tensor, ends: list[int], scale: float, fields: Sequence[str] = ("output",)
) -> tuple[Tensor | None, Tensor | None]:
    """Computes attention and the attention weights of CLS.

    Args:
        choice: From `choose`.
        qkv: [T, 3, H, D]; the queries of other tokens than CLS and the values are not used without the output.
        ends: Photo b has the tokens ends[b] to ends[b + 1].
        scale: Factor of q . k before the softmax.
        fields: Of "output" and "rows".

    Returns:
        The output [T, H, D], and the softmax weights that the first token of each photo gives to its tokens, float32
        [T, H]; None if not among the fields.
    """
    output = rows = None
    if "rows" in fields:
        want = fields if choice == Choice("attention_features") else ("rows",)
        result = attention_features(qkv, torch.tensor(ends, dtype=torch.int32), scale=scale, want=want)
        assert result.rows is not None
        output, rows = result.output, result.rows[..., 0]
    if "output" in fields and output is None:
        outputs = []
        for first, last, dense in _parts(ends, choice.dense):
            part = qkv[ends[first] : ends[last]]
            if dense:
                outputs.append(_dense(part, last - first, scale))
            else:
                own = [end - ends[first] for end in ends[first : last + 1]]
                outputs.append(LIBRARIES[choice.library](part, own, scale))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output, rows


def _parts(ends: list[int], dense: bool) -> list[tuple[int, int, bool]]:
    """Splits a batch into parts (first photo, last photo + 1, whether it is a dense batch), at least one."""
    parts: list[tuple[int, int, bool]] = []
    first = rest = 0  # photos from `rest` on are not yet in a part
    for length, photos in itertools.groupby(end - begin for begin, end in itertools.pairwise(ends)):
        last = first + len(list(photos))
        count = 2 ** int(math.log2(max(2, DENSE_TOKENS // max(1, length))))
        while dense and length and last - first >= count:
            if rest < first:
                parts.append((rest, first, False))
            parts.append((first, first + count, True))
            first = rest = first + count
        first = last
    if rest < first or not parts:
        parts.append((rest, first, False))
    return parts


class Fastest(NamedTuple):
    library: str
    margin: str  # how much faster it was, and at which lengths
    dense: bool = False  # see `Choice`


# (device class, dtype) -> the fastest library, measured on two threads with heads of 32, 64 and 128 dims and 384
# channels in total. `pytest bench/bench_backbones.py --benchmark-only -s -k libraries` repeats the measurement.
# avx512_bf16 was measured on an AMD EPYC (Zen 4), avx512_vnni on an Intel Xeon (Sapphire Rapids). avx512 and avx2 were
# measured on that Xeon limited by NMK_LEVEL, for avx2 with torch's libraries limited too
# (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2). The key has no length: only float32
# at 197 tokens is up to 15% slower, attention is a tenth of the network there, and a choice by length would split
# batches. sm_90 was measured on an H100 with torch 2.11 and heads of 64 dims, by itself, not within this module.
TABLE: dict[tuple[str, torch.dtype], Fastest] = {
    ("cpu avx512_bf16", torch.float32): Fastest(  # of AMD alone, see csrc/cpu/level.h
        "attention_features", "1.2 to 1.3 times torch SDPA's speed at 785 to 3,601 tokens, 1.1 to 1.4 times at 197"
    ),
    ("cpu avx512_bf16", torch.bfloat16): Fastest(
        "attention_features", "2.2 to 2.6 times torch SDPA's speed at 785 to 3,601 tokens, 1.9 to 2.2 times at 197"
    ),
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
    ("cuda sm_90", torch.bfloat16): Fastest(
        "torch varlen_attn",
        "250 TFLOP/s for 16 lengths of 1,673 to 5,921 tokens, torch SDPA one at a time 236, attention_features 209; "
        "dense batches of equal lengths by torch SDPA: 270 to 416 at 785 to 5,505 tokens, attention_features 103 to "
        "338",
        dense=True,
    ),
    ("cuda sm_80", torch.bfloat16): Fastest(
        "torch varlen_attn",
        "the order of the libraries on sm_90, not measured; dense batches of equal lengths by torch SDPA",
        dense=True,
    ),
}


def device_class(device: torch.device) -> str:
    """The device part of a key of `TABLE`: "cpu avx512", "cuda sm_90"."""
    if device.type == "cuda":
        return "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device))
    native = backends.native() if device.type == "cpu" else None
    return device.type if native is None else f"{device.type} {native.level()}"


def obstacle(library: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why a library cannot run on a device in a dtype; None if it can."""
    if library == "torch SDPA":
        return None
    if library == "attention_features":
        obstacles = (backends.obstacle(library, backend, device) for backend in ("cpu", "triton"))
        reasons = [reason for reason in obstacles if reason is not None]
        return "; ".join(reasons) if len(reasons) == 2 else None
    if device.type != "cuda":
        return "runs on CUDA devices only"
    if library == "torch varlen_attn" and dtype.itemsize != 2:
        return "computes in 16 bits only"
    return _why_not(library, device)


@functools.cache
def _why_not(library: str, device: torch.device) -> str | None:
    """Why a call fails; None if it does not."""
    try:
        LIBRARIES[library](torch.zeros(2, 3, 1, 64, dtype=torch.bfloat16, device=device), [0, 1, 2], 0.125)
    except (ImportError, RuntimeError) as error:  # NotImplementedError, a RuntimeError: no kernel for the device
        return first_line(error)
    return None


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """Returns the choice of `TABLE` for a device and dtype; torch SDPA if there is none or its library cannot run."""
    fastest = TABLE.get((device_class(device), dtype))
    if fastest is None:
        return Choice("torch SDPA")
    return Choice("torch SDPA" if obstacle(fastest.library, device, dtype) else fastest.library, fastest.dense)


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Says which library computes attention for a device and dtype and why, and whether the others could run."""
    title = f"attention in {str(dtype)[6:]} on {device_class(device)}"
    fastest, chosen = TABLE.get((device_class(device), dtype)), choose(device, dtype).library
    if fastest is None:
        lines = [f"{title}: {chosen}, the default, because no measurement exists"]
    elif fastest.library != chosen:
        lines = [f"{title}: {chosen}, because the fastest library, {fastest.library}, cannot run"]
    else:
        lines = [f"{title}: {chosen}, the fastest library: {fastest.margin}"]
    for library in LIBRARIES:
        if library != chosen:
            lines.append(f"  {library}: {obstacle(library, device, dtype) or 'could run'}")
    return "\n".join(lines)
