# SPDX-License-Identifier: MIT
"""Linear layers by the library and in the dtype that are fastest on this processor, according to a measured table."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rates(NamedTuple):
    """What is fastest on a kind of processor.

    Attributes:
        bfloat16: Whether layers are computed in bfloat16 if it is requested, else in float32.
        onednn: Whether oneDNN multiplies, else the library that torch chooses, which is MKL for float32.
        margin: The measurement.
    """

    bfloat16: bool
    onednn: bool
    margin: str


# By vendor and matrix instructions, as `processor` names them. The choice does not depend on a measurement at load: it
# would change the rounding, and so the results, from one run to the next.
TABLE = {
    "GenuineIntel amx": Rates(True, False, "bfloat16 has matrix instructions of its own; not measured"),
    "GenuineIntel avx512_bf16": Rates(
        False, False, "bfloat16 83, float32 152 GFLOP/s per core of a Sapphire Rapids without AMX"
    ),
    "AuthenticAMD avx512_bf16": Rates(
        True, True, "bfloat16 210, float32 by oneDNN 106, by MKL 96 GFLOP/s on one core of a Zen 4, 256 rows"
    ),
}
DEFAULT = Rates(False, False, "not measured on this processor")


@functools.cache
def processor() -> str:
    """Vendor and matrix instructions of the CPU, a key of `TABLE` if it has been measured."""
    try:
        found = re.search(r"vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        found = None
    amx, bfloat16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return f"{found[1] if found else 'unknown'} {'amx' if amx else 'avx512_bf16' if bfloat16 else 'no bfloat16'}"


def rates() -> Rates:
    """The row of `TABLE` for this processor."""
    return TABLE.get(processor(), DEFAULT)


def choose(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of linear layers and of the tokens between blocks if `dtype` is requested.

    It is `dtype`, except on CPUs where float32 is faster than bfloat16.
    """
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not rates().bfloat16
    return torch.float32 if slow else dtype


def uses_onednn(device: torch.device) -> bool:
    """Whether oneDNN computes linear layers on a device."""
    return device.type == "cpu" and rates().onednn and torch.backends.mkldnn.is_available()


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Says in which dtype and by which library linear layers are computed on a CPU, and why."""
    library = "oneDNN" if uses_onednn(device) else "torch"
    return f"linear layers in {str(choose(device, dtype))[6:]} by {library} on {processor()}: {rates().margin}"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, C] times weight [D, C], plus bias [D]: [n, D]. Without gradient."""
    if uses_onednn(x.device):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
