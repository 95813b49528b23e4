#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Compiles every Triton kernel of namedmask_kernels ahead of time for sm_80 and sm_90; no GPU is needed.

    python tools/compile_triton.py [WORD ...]      only kernels whose label contains one of the words

Prints what ptxas says of each: registers, spills, and Triton's shared memory. Exits with 1 if a kernel does not
compile, spills registers, or needs more shared memory than the smallest device of its generation has.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas  # it has one for older and one for newer architectures
from triton.compiler import ASTSource

import namedmask_kernels.triton as package

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}  # sm_80's file also runs on sm_86 and sm_89, which have the least


def compile_for(arch: int, kernel, types: dict, constants: dict, options: dict) -> tuple[int, int, int]:
    """Registers, bytes spilled (stores and loads), bytes of shared memory. Raises where it does not compile."""
    # What the launcher finds at run time on common inputs: pointers and strides are multiples of 16.
    aligned = [i for i, (name, t) in enumerate(types.items()) if t.startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # compiled.n_spills needs a driver to load the kernel; ptxas, run once more on the same PTX, does not.
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [get_ptxas(arch).path, "--verbose", "--gpu-name", target, file.name, "--output-file", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spills, compiled.metadata.shared


def variants(module: str):
    """The kernels of a module of namedmask_kernels.triton; `tables` has none."""
    found = importlib.import_module(f"{package.__name__}.{module}")
    return found.ahead_of_time() if hasattr(found, "ahead_of_time") else ()


def main(words: list[str]) -> int:
    failures = 0
    print(f"triton {triton.__version__}\n{'kernel':44} arch  registers  shared  spilled bytes")
    for module in pkgutil.iter_modules(package.__path__):
        for label, kernel, types, constants, options, *only in variants(module.name):
            if words and not any(word in label for word in words):
                continue
            for arch in only or (80, 90):
                registers, spills, shared = compile_for(arch, kernel, types, constants, options)
                bad = spills > 0 or shared > SHARED_LIMIT[arch]
                failures += bad
                name = f"{module.name}.{label.lstrip('_')}"
                line = f"{name:44} sm_{arch}  {registers:8}  {shared:6}  {spills:13}"
                print(line + ("  <- too much" if bad else ""), flush=True)
    print(f"{failures} of them spill or ask for too much shared memory" if failures else "no spills")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
