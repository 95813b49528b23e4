# SPDX-License-Identifier: MIT
"""The CUDA kernels of csrc/cuda as cuda_emulator/ runs them on the CPU: what `_native.cuda` is on a GPU.

Functions of the same names that take the same arguments, except that the tensors lie on the CPU: those with which tests
run a backend as a whole. All scratch memory is poisoned first.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """cuda_emulator/NAME.cpp, compiled."""
    includes = [
        f"-I{path}" for path in (HERE / "cuda_emulator", *(CSRC / part for part in ("include", "common", "cuda")))
    ]
    # _FORTIFY_SOURCE takes a longjmp between stacks for a fault.
    options = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    sources = [HERE / "cuda_emulator" / f"{name}.cpp", CSRC / "cpu" / "tensor_view.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{name}.so"
        subprocess.run([COMPILER, *options, "-o", out, *includes, *sources], check=True)
        return ctypes.CDLL(str(out))


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _c(value):
    """An argument as C takes it: a tensor's pointer, an int64_t or a double."""
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)


def _poison(scratch: Tensor) -> None:
    scratch.fill_(torch.nan if scratch.is_floating_point() else 12345678)


def connected_components(mask, offsets, shapes, labels, counts, workspace, stream):
    _poison(workspace)
    none = counts[:0]
    given, results = pointers(mask, offsets, shapes), pointers(labels, counts, none, none)
    function = library("connected_components").run
    function(b"connected_components", *given, len(mask), len(shapes), *results, 0, *pointers(workspace))


def normalized_cut(
    bits, offsets, shapes, vector, value, residual, iterations, partition, seed, workspace,
    eps, tolerance, max_iterations, stream,
):  # fmt: skip
    _poison(workspace)
    arguments = [bits, len(bits), offsets, shapes, len(shapes), vector, len(vector), value, residual, iterations,
                 partition, seed, workspace, len(workspace), float(eps), float(tolerance), max_iterations]  # fmt: skip
    library("normalized_cut").run(*map(_c, arguments))


def spectral_clusters_workspace(offsets, shapes, counts, tokens, channels):
    function = library("spectral_clusters").workspace
    function.restype = ctypes.c_int64
    return function(*map(_c, [offsets, shapes, len(shapes), counts, len(counts), tokens, channels]))


def spectral_clusters(unit, ranges, offsets, shapes, counts, labels, workspace, seed, stream):
    _poison(workspace)
    arguments = [unit, *unit.shape, ranges, offsets, shapes, len(shapes), counts, len(counts), labels, workspace,
                 len(workspace), seed]  # fmt: skip
    library("spectral_clusters").run(*map(_c, arguments))
