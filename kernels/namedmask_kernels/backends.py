# SPDX-License-Identifier: MIT
"""Which backends exist here, which one fits a call, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping

import numpy as np
import torch

from .ragged import Ragged

# Fastest first: "auto" takes the first that can run. The reference is never taken unasked: it is slow.
ORDER = ("cuda", "triton", "cpu", "reference")

# operator -> backend -> implementation; each operator's module adds its own line.
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {}

# Operators whose cuda version has a part in Triton.
CUDA_WITH_TRITON = {"normalized_cut", "spectral_clusters"}


@functools.cache
def native():
    """The C++ extension `namedmask_kernels._native`, or None where it was not built (a bare source tree)."""
    try:
        return importlib.import_module("namedmask_kernels._native")
    except ModuleNotFoundError as error:
        if error.name != "namedmask_kernels._native":
            raise
        return None


def obstacle(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device`; None when it can."""
    if backend not in ORDER:
        return f"there is no such backend; known are {', '.join(ORDER)}"
    if backend not in IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} version"
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}"
        return None if native() else "the C++ extension is not built; install the package with `pip install .`"
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if backend == "cuda" and not (native() and native().has_cuda()):
        return "this build has no CUDA kernels; build with NMK_CUDA=ON"
    if (backend == "triton" or op in CUDA_WITH_TRITON) and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old: compute capability 8.0 (Ampere) is needed"
    return None


@functools.cache
def choose(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs `op`: the named one, or for "auto" the fastest that can. An answer is kept for good.

    Raises ValueError, with each backend's reason, when the named one cannot run or "auto" finds only the reference.
    """
    if backend != "auto":
        if reason := obstacle(op, backend, device):
            raise ValueError(f"{op}: backend {backend!r} cannot run: {reason}")
        return backend
    reasons = []
    for candidate in ORDER[:-1]:
        reason = obstacle(op, candidate, device)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"{op}: no fast backend can run ({'; '.join(reasons)}); backend='reference' is slow but works")


def run(op: str, backend: str, device: torch.device) -> Callable:
    """The implementation that `choose` names."""
    return IMPLEMENTATIONS[op][choose(op, backend, device)]


def without_torch(op: str, backend: str, *arrays: object) -> bool:
    """Whether these are numpy arrays that `op`'s C++ kernel can have as they are.

    By way of torch's tensors and dispatcher a call costs 25 to 45 us, and 400 where other work has pushed torch's code
    out of the caches: more than labeling a photo. Under torch.compile they go that way nevertheless.
    """
    if torch.compiler.is_compiling() or not all(isinstance(array, np.ndarray) for array in arrays):
        return False
    return choose(op, backend, torch.device("cpu")) == "cpu"


def _device_of(arguments: Mapping[str, object]) -> torch.device:
    for value in arguments.values():
        rows = value.rows if isinstance(value, Ragged) else value
        if isinstance(rows, torch.Tensor):
            return rows.device
    return torch.device("cpu")


def explain(op: Callable | str, *args, **kwargs) -> str:
    """Which backend would run `op(*args, **kwargs)` and why the others would not, as text; nothing is computed.

    op:     a public operator or its name.
    Errors: ValueError for a name that is no operator; TypeError for arguments that the operator does not take.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"explain: {name!r} is no operator; known are {', '.join(sorted(IMPLEMENTATIONS))}")
    if callable(op):
        kwargs = inspect.signature(op).bind_partial(*args, **kwargs).arguments
    else:
        kwargs = {**dict(enumerate(args)), **kwargs}
    device, asked = _device_of(kwargs), kwargs.get("backend", "auto")
    try:
        chosen = choose(name, asked, device)
        lines = [f"{name} on {device}: {chosen}" + ("" if asked == "auto" else " (as asked)")]
    except ValueError as error:
        chosen, lines = None, [str(error)]
    for backend in ORDER:
        if backend != chosen:
            reason = obstacle(name, backend, device)
            lines.append(f"  {backend}: {reason or ('runs, but is slow' if backend == 'reference' else 'could run')}")
    return "\n".join(lines)
