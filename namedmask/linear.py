# SPDX-License-Identifier: MIT
"""Linear layers by the library and in the dtype that are fastest on this processor, according to a measured table."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rates(NamedTuple):
    """What is fastest on a kind of processor.

    Attributes:
        bfloat16: Whether layers are computed in bfloat16 if it is requested, else in float32.
        onednn: Whether oneDNN multiplies, else the library that torch chooses, which is MKL for float32.
        rows: Rows of x per product. The output of the widest layer of a ViT-S, 1,536 channels, should stay in the
            cache, and the last rows of a batch are padded to this number.
        margin: The measurement.
    """

    bfloat16: bool
    onednn: bool
    rows: int
    margin: str


# By vendor and matrix instructions, as `processor` names them. The choice does not depend on a measurement at load: it
# would change the rounding, and so the results, from one run to the next.
TABLE = {
    "GenuineIntel amx": Rates(True, False, 256, "bfloat16 has matrix instructions of its own; not measured"),
    "GenuineIntel avx512_bf16": Rates(
        False, False, 256, "bfloat16 83, float32 152 GFLOP/s per core of a Sapphire Rapids without AMX"
    ),
    "AuthenticAMD avx512_bf16": Rates(
        True,
        True,
        192,
        "bfloat16 226 (weights not packed: 217), float32 by oneDNN 106, by MKL 96 GFLOP/s on one core of a Zen 4",
    ),
}
DEFAULT = Rates(False, False, 256, "not measured on this processor")


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
    """Whether oneDNN computes linear layers on a device, by operators of torch that are not public."""
    present = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return device.type == "cpu" and rates().onednn and torch.backends.mkldnn.is_available() and present


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Says in which dtype and by which library linear layers are computed on a CPU, and why."""
    library = "oneDNN" if uses_onednn(device) else "torch"
    return f"linear layers in {str(choose(device, dtype))[6:]} by {library} on {processor()}: {rates().margin}"


class Layers:
    """Linear layers on a device, without gradient, for weights that do not change.

    oneDNN multiplies by weights in a layout of its own. A weight that is a parameter is converted at its first use, and
    the copy is kept: the layers take twice the memory then, 43 MB more for a ViT-S in bfloat16.
    """

    def __init__(self, device: torch.device):
        self.onednn, self.rows = uses_onednn(device), rates().rows
        self.packed: dict[nn.Parameter, Tensor] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """x [n, C] times weight [D, C], plus bias [D], and the GELU of that if requested: [n, D].

        A weight [D, ...] with C elements per row is flattened. On a CPU n should be `rows` in all calls.
        """
        if not self.onednn:
            y = F.linear(x, weight.flatten(1), bias)
            return F.gelu(y) if gelu else y
        if isinstance(weight, nn.Parameter):
            if weight not in self.packed:
                self.packed[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1), self.rows)
            weight = self.packed[weight]
        activation, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
