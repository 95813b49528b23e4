#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Compiles every Triton kernel of namedmask_kernels ahead of time for sm_80 and sm_90; requires no GPU.

    python tools/compile_triton.py [WORD ...]      only kernels whose label contains one of the words

Prints the registers, spills and shared memory of each. Exits with 1 if a kernel does not compile, spills registers, or
requires more shared memory than the smallest device of its generation has.
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


def compile_for(arch: int, variant: Variant) -> tuple[int, int, int]:
    """Returns registers, bytes spilled (stores and loads), bytes of shared memory; raises if it does not compile."""
    # What the launcher detects at run time on common inputs: pointers and strides are multiples of 16.
    types = variant.types
    aligned = [i for i, (name, t) in enumerate(types.items()) if t.startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=variant.kernel,
        signature={**types, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
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


def variants(module: str) -> Iterator[Variant]:
    """All variants of the kernels of a module of namedmask_kernels.triton."""
    listed = getattr(importlib.import_module(f"{package.__name__}.{module}"), "ahead_of_time", lambda: ())
    return iter(listed())


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
