#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Compiles every Triton kernel of namedmask_kernels ahead of time for sm_80 and sm_90; requires no GPU.

    python tools/compile_triton.py [WORD ...]      only kernels whose label contains one of the words

Prints the registers, spills and shared memory of each. Also compiles each kernel with its integer arguments replaced by
the constant 1, one at a time and all at once, as Triton does at run time for arguments of 1. Exits with 1 if a kernel
does not compile, spills registers, or requires more shared memory than the smallest device of its generation has.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas  # chooses the ptxas for the architecture
from triton.compiler import ASTSource

import namedmask_kernels.triton as package
from namedmask_kernels.triton.tables import Variant

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}  # code for sm_80 also runs on sm_86 and sm_89, which have the least
NEVER_ONE = {"token_stride", "row_stride"}  # at least 3, and a multiple of 64


def compile_for(arch: int, variant: Variant) -> tuple[int, int, int]:
    """Returns registers, bytes spilled (stores and loads), bytes of shared memory; raises if it does not compile."""
    # What the launcher detects at run time on common inputs: pointers and strides are multiples of 16.
    types = variant.types
    names = [name for name, t in types.items() if t.startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=variant.kernel,
        signature={**types, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=variant.constants,
        attrs={(variant.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    # compiled.n_spills requires a driver to load the kernel; running ptxas again on the PTX does not.
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [get_ptxas(arch).path, "--verbose", "--gpu-name", target, file.name, "--output-file", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return int(re.search(r"Used (\d+) registers", report)[1]), spills, compiled.metadata.shared


def with_ones(variant: Variant) -> Iterator[Variant]:
    """The variant with each of the integer arguments that can be 1 replaced by it, then with all of them."""
    names = [name for name, type in variant.types.items() if type == "i32" and name not in NEVER_ONE]
    choices = {name: [name] for name in names if len(names) > 1} | ({"all integers": names} if names else {})
    for label, ones in choices.items():
        yield variant._replace(
            label=f"{variant.label}, {label} = 1",
            types={name: type for name, type in variant.types.items() if name not in ones},
            constants=variant.constants | dict.fromkeys(ones, 1),
        )


def variants(module: str) -> Iterator[Variant]:
    """All variants of the kernels of a module of namedmask_kernels.triton."""
    listed = getattr(importlib.import_module(f"{package.__name__}.{module}"), "ahead_of_time", lambda: ())
    kernels = set()
    for variant in listed():
        yield variant
        if variant.kernel not in kernels:  # the types of pointers and the block sizes make no difference
            kernels.add(variant.kernel)
            yield from with_ones(variant._replace(archs=variant.archs[-1:]))


def main(words: list[str]) -> int:
    failures = 0
    print(f"triton {triton.__version__}\n{'kernel':56} arch  registers  shared  spilled bytes")
    for module in pkgutil.iter_modules(package.__path__):
        for variant in variants(module.name):
            if words and not any(word in variant.label for word in words):
                continue
            for arch in variant.archs:
                registers, spills, shared = compile_for(arch, variant)
                bad = spills > 0 or shared > SHARED_LIMIT[arch]
                failures += bad
                name = f"{module.name}.{variant.label.lstrip('_')}"
                line = f"{name:56} sm_{arch}  {registers:8}  {shared:6}  {spills:13}"
                print(line + ("  <- too much" if bad else ""), flush=True)
    print(f"{failures} kernels spill or require too much shared memory" if failures else "no spills")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
