# SPDX-License-Identifier: MIT
"""The backends of each operator: which exist on this machine, which one a call uses, and why the others cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .ragged import MOST, Ragged
from .threads import usable_cores

# Fastest first: "auto" takes the first that can run. It never takes the reference, which is slow.
ORDER = ("cuda", "triton", "cpu", "reference")

# operator -> backend -> implementation; filled by `library.register`
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}

# operators whose CUDA implementation has a part in Triton; filled by `library.register`
CUDA_WITH_TRITON: set[str] = set()


def native() -> Any:
    """The C++ extension `namedmask_kernels._native`, or None if it was not built (in a bare source tree).

    It uses as many threads as torch, but unless OMP_NUM_THREADS is set at most `usable_cores`.
    """
    # OpenMP keeps a number of threads for each thread. Torch sets it when it first reads the number in a new thread.
    torch.get_num_threads()
    return _extension()


@functools.cache
def _extension() -> Any:
    try:
        extension = importlib.import_module("namedmask_kernels._native")
    except ModuleNotFoundError as error:
        if error.name != "namedmask_kernels._native":
            raise
        return None
    if not os.environ.get("OMP_NUM_THREADS"):
        extension.limit_threads(usable_cores())
    return extension


def obstacle(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device`; None if it can."""
    if backend not in ORDER:
        return f"unknown backend; the backends are {', '.join(ORDER)}"
    if backend not in IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
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
        return f"{torch.cuda.get_device_name(device)} is too old: compute capability 8.0 (Ampere) is required"
    return None


@functools.cache
def choose(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs `op`: the named one, or for "auto" the fastest that can run. Answers are cached.

    Raises:
        ValueError: If the named backend cannot run, or "auto" finds none but the reference; gives the reasons.
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


def numpy_arguments(op: str, backend: str, *arguments: tuple[object, int, tuple[Any, ...]]) -> list[np.ndarray] | None:
    """The arguments of a call that can go straight from numpy arrays to the C++ kernel; None if it cannot.

    Through torch's tensors and dispatcher a call costs 25 to 45 us, and 400 us if other work has evicted torch's code
    from the caches: more than labeling an image. All other calls go through torch: those with tensors, those with
    invalid arguments, and those under torch.compile.

    Args:
        op: Name of the operator.
        backend: As the caller passed it.
        arguments: For each array of the operator the value, its number of channels (0 for an array [h, w]) and its
            accepted dtypes.
    """
    if torch.compiler.is_compiling() or not isinstance(backend, str):
        return None
    arrays: list[np.ndarray] = []
    size: tuple[int, ...] = ()
    for array, channels, dtypes in arguments:
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            return None
        if array.ndim < 2 or array.dtype not in dtypes or not array.flags.aligned:
            return None
        size = size or array.shape[:2]
        if array.shape != ((*size, channels) if channels else size):
            return None
        arrays.append(array)
    if max(*size, size[0] * size[1]) > MOST:
        return None
    return arrays if choose(op, backend, torch.device("cpu")) == "cpu" else None


def _device_of(arguments: Mapping[Any, object]) -> torch.device:
    for value in arguments.values():
        rows = value.rows if isinstance(value, Ragged) else value
        if isinstance(rows, torch.Tensor):
            return rows.device
    return torch.device("cpu")


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """Tells which backend would run ``op(*args, **kwargs)`` and why the others would not, without running it.

    Args:
        op: A public operator or its name.
        args: The operator's positional arguments.
        kwargs: The operator's keyword arguments.

    Returns:
        One line for the chosen backend and one for each of the others.

    Raises:
        ValueError: If there is no such operator.
        TypeError: If the operator does not take these arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", op)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"explain: {name!r} is not an operator; the operators are {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    arguments: Mapping[Any, object]
    if callable(op):
        arguments = inspect.signature(op).bind_partial(*args, **kwargs).arguments
    else:
        arguments = {**dict(enumerate(args)), **kwargs}
    device, asked = _device_of(arguments), str(arguments.get("backend", "auto"))
    chosen = None
    try:
        chosen = choose(name, asked, device)
        lines = [f"{name} on {device}: {chosen}" + ("" if asked == "auto" else " (as requested)")]
    except ValueError as error:
        lines = [str(error)]
    for backend in ORDER:
        if backend != chosen:
            reason = obstacle(name, backend, device)
            lines.append(f"  {backend}: {reason or ('can run, but is slow' if backend == 'reference' else 'can run')}")
    return "\n".join(lines)
