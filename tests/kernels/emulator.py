# SPDX-License-Identifier: MIT
"""Runs the CUDA kernels on the CPU, so that the operators' tests cover `backend="cuda"` on machines without a GPU.

`extension()` compiles csrc/cuda and its Python bindings with g++ against cuda_emulator/cuda_runtime.h, in which every
CUDA thread is a fiber. `emulated_cuda` in conftest.py puts it in the place of `namedmask_kernels._native.cuda`, and the
operators then run from their public function through the Python adapters, pybind11 and the launchers to the kernels.

The emulation finds wrong results and indices, scratch and output memory that is read before it is written, writes just
outside of an array, results that depend on the order of threads or blocks, and barriers that not all threads reach. It
cannot find:

- errors of memory order: a write is visible to all threads at once, in program order
- races between blocks, which run one after another, and between threads that no barrier, collective or atomic separates
- effects of the rounding of CUDA's math functions (ex2.approx behind expf) and of fused multiply-adds
- errors in the PTX of csrc/cuda/mma.h, which cuda_runtime.h replaces by loops, and in the barriers of cluster.h
- shared memory that is read before it is written, or used by kernels that run in clusters
- tensors on the wrong device and wrong streams: there is one memory and no stream
- too many registers or too much shared memory, and slow code
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import shlex
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = [
    HERE / "cuda_emulator" / "module.cpp",
    ROOT / "csrc" / "bindings" / "cuda_module.cpp",
    ROOT / "csrc" / "bindings" / "dlpack_reader.cpp",
    ROOT / "csrc" / "cpu" / "tensor_view.cpp",
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
]
INCLUDES = [
    HERE / "cuda_emulator",  # before any CUDA toolkit
    *(ROOT / "csrc" / name for name in ("include", "common", "cuda")),
    Path(sysconfig.get_path("include")),
    Path(torch.__file__).parent / "include",  # has pybind11
]
COMMAND = [
    "g++", "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",  # it takes a longjmp between stacks for an error
    "-DNMK_EMULATED_CUDA",
    *(f"-I{path}" for path in INCLUDES),
]  # fmt: skip


def obstacle() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    if shutil.which(COMMAND[0]) is None:
        return f"{COMMAND[0]} is not installed"
    if not (INCLUDES[-2] / "Python.h").exists():
        return "Python's C headers are not installed"
    return None


@functools.cache
def extension() -> types.ModuleType:
    """The compiled extension. Only what has changed is compiled; processes that need it at the same time wait."""
    folder = ROOT / "build" / "cuda_emulator" / hashlib.sha256(repr(COMMAND).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "emulated_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(lambda source: _compile(source, folder), SOURCES))
        if _is_outdated(library, objects):
            new = library.with_suffix(".new")  # a running process may have the old file in memory
            subprocess.run([COMMAND[0], "-shared", "-o", new, *objects], check=True)
            new.replace(library)
    spec = importlib.util.spec_from_file_location("emulated_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(source: Path, folder: Path) -> Path:
    out, rule = folder / f"{source.name}.o", folder / f"{source.name}.d"  # out's dependencies as a rule for make
    inputs = shlex.split(rule.read_text().replace("\\\n", " "))[1:] if rule.exists() else []
    if not inputs or _is_outdated(out, map(Path, inputs)):
        subprocess.run([*COMMAND, "-MMD", "-MF", rule, "-c", "-o", out, source], check=True)
    return out


def _is_outdated(out: Path, inputs) -> bool:
    if not out.exists():
        return True
    return any(not path.exists() or path.stat().st_mtime > out.stat().st_mtime for path in inputs)


class Cuda:
    """`namedmask_kernels._native.cuda` in the emulator: the same functions, on CPU tensors.

    Every array is passed as a copy between two guards; a kernel that writes into a guard raises AssertionError.
    """

    def __getattr__(self, name: str) -> Callable:
        function = getattr(extension(), name)

        def call(*arguments):
            guarded = {i: Guarded(x) for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_contiguous()}
            result = function(*(guarded[i].inner if i in guarded else x for i, x in enumerate(arguments)))
            for i, copy in guarded.items():
                assert copy.is_intact(), f"{name} wrote outside of its argument {i}"
                with torch.inference_mode():  # tables that `resize` keeps may have been made in this mode
                    arguments[i].copy_(copy.inner)
            return result

        return call


class Guarded:
    """A copy of a tensor between two guards, which read as NaN or as large integers."""

    GUARD = torch.tensor([0x7FC0BAD0] * 64, dtype=torch.int32).view(torch.uint8)

    def __init__(self, tensor: Tensor):
        self.begin, self.end = len(self.GUARD), len(self.GUARD) + tensor.nbytes
        self.all = torch.cat([self.GUARD, torch.zeros(tensor.nbytes, dtype=torch.uint8), self.GUARD])
        self.inner = self.all[self.begin : self.end].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def is_intact(self) -> bool:
        return torch.equal(self.all[: self.begin], self.GUARD) and torch.equal(self.all[self.end :], self.GUARD)
