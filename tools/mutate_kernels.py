#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Mutation tests of the C++ kernels: changes one operator, constant or condition at a time and runs its tests.

    python tools/mutate_kernels.py --seed 1 --count 40 --work build/mutants [--files pamr dense_crf]

A mutant is noticed if a test fails, crashes or takes longer than the limit. Mutants that do not compile are replaced by
others. Prints a table, and the survivors as diffs. The working tree is not changed: the sources are copied to the work
folder.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from overlay import overlay

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = (
    "attention_features", "bilateral_solver", "connected_components", "dense_crf", "normalized_cut", "pamr",
    "random_walk", "spectral_clusters", "vote_masks",
)  # fmt: skip
# Test files of what several operators share.
SHARED_TESTS = {
    "lanczos": ("normalized_cut", "spectral_clusters"),
    "cosines": ("normalized_cut", "spectral_clusters"),
    "normalized_rows": ("normalized_cut", "spectral_clusters", "random_walk"),
    "exponential": ("random_walk", "pamr", "attention_features", "dense_crf"),
    "simd": ("bilateral_solver", "random_walk", "normalized_cut", "dense_crf"),
    "for_each_image": ("operators", "random_walk"),
    "parallel_for": ("random_walk", "normalized_cut"),
    "tensor_view": ("native", "operators"),
    "bilateral_grid": ("bilateral_solver",),
    "permutohedral": ("dense_crf",),
    "spline_grid": ("dense_crf",),
    "scale": ("extreme_values", "random_walk"),
}
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "+": "-", "-": "+",
    "*": "+", "/": "*", "+=": "-=", "-=": "+=", "*=": "+=", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "%": "/",
    "true": "false", "false": "true", "std::min": "std::max", "std::max": "std::min",
}  # fmt: skip
# clang-format puts spaces around binary operators only, which tells them from templates, pointers and references.
TOKEN = re.compile(
    r"(?<= )(?:<=|>=|==|!=|&&|\|\||<<|>>|\+=|-=|\*=|[-+*/%<>&|])(?= )|\b(?:true|false)\b|std::(?:min|max)\b"
    r"|(?<![\w.])\d+(?:\.\d+(?:e[-+]?\d+)?f?)?(?![\w.'])"
)
SKIPPED = re.compile(r"^\s*(//|#|static_assert|using |typedef |template)|expect\(|constexpr const char|prefetch|\"")
CHOSEN = "not reference and not cuda and not triton and not required and not compile and not opcheck and not modes"


class Mutant(NamedTuple):
    path: Path  # relative to the root
    line: int
    before: str
    after: str

    def diff(self) -> str:
        return f"{self.path}:{self.line + 1}\n- {self.before.strip()}\n+ {self.after.strip()}"


def changed(token: str) -> str:
    """What a token becomes: another operator, or another number."""
    if token in SWAPS:
        return SWAPS[token]
    if "." in token:
        suffix = "f" if token.endswith("f") else ""
        return f"{float(token.rstrip('f')) * 1.25 + (float(token.rstrip('f')) == 0)!r}{suffix}"
    return str(int(token) + 1)


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file, in order."""
    mutants = []
    for number, line in enumerate((ROOT / path).read_text().splitlines()):
        if SKIPPED.search(line):
            continue
        code = line.split("//")[0]
        for token in TOKEN.finditer(code):
            after = code[: token.start()] + changed(token[0]) + code[token.end() :]
            mutants.append(Mutant(path, number, line, after))
    return mutants


def tests_of(path: Path) -> tuple[str, ...]:
    stem = next((name for name in (*OPERATORS, *SHARED_TESTS) if path.name.startswith(name)), None)
    names = SHARED_TESTS.get(stem or "", (stem,) if stem else ())
    return tuple(f"tests/kernels/test_{name}.py" for name in names)


class Bench:
    """A copy of the sources, their build, and the tests with the built extension."""

    def __init__(self, work: Path) -> None:
        self.source, self.build = work / "source", work / "build"
        self.limits: dict[tuple[str, ...], float | None] = {}
        self.output = ""  # of the last tests
        for path in (ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")):
            copy = self.source / path.relative_to(ROOT)
            if not copy.exists() or copy.read_bytes() != path.read_bytes():  # others need no compilation
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
        flags = ("-DNMK_CUDA=OFF", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", f"-Dpybind11_DIR={pybind11}")
        ipo = "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"
        subprocess.run(["cmake", "-S", self.source, "-B", self.build, "-G", "Ninja", *flags, ipo], check=True)
        subprocess.run(["cmake", "--build", self.build], check=True)
        (extension,) = self.build.glob("_native*.so")
        path = overlay(work / "packages", extension)
        self.environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT / 'tests' / 'kernels'}"}

    def compiles(self) -> bool:
        return subprocess.run(["cmake", "--build", self.build], capture_output=True).returncode == 0

    def measure(self, tests: tuple[str, ...]) -> None:
        """Sets the time limit of tests, which must pass; a no-op for tests that have one. The sources are unchanged."""
        if tests not in self.limits:
            self.limits[tests] = None
            built, begin = self.compiles(), time.monotonic()  # the extension may still have the last mutant
            if not built or not self.passes(tests):
                raise SystemExit(f"{self.output}\n{' '.join(tests)}: fails without a change")
            self.limits[tests] = 30 + 4 * (time.monotonic() - begin)

    def passes(self, tests: tuple[str, ...]) -> bool:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *tests]
        limit = self.limits[tests]
        try:
            done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return False
        self.output = done.stdout.decode()
        return done.returncode == 0

    def write(self, mutant: Mutant, line: str) -> None:
        path = self.source / mutant.path
        lines = path.read_text().splitlines()
        lines[mutant.line] = line
        path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--files", nargs="*", default=[], help="only files whose names begin so")
    settings = parser.parse_args()

    paths = sorted((ROOT / "csrc").glob("cpu/*.*")) + sorted((ROOT / "csrc").glob("common/*.h"))
    paths = [path.relative_to(ROOT) for path in paths if tests_of(path)]
    if settings.files:
        paths = [path for path in paths if path.name.startswith(tuple(settings.files))]
    candidates = [mutant for path in paths for mutant in mutants_of(path)]
    random.Random(settings.seed).shuffle(candidates)
    bench = Bench(settings.work)

    noticed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    survivors = []
    for mutant in candidates:
        if tried.total() == settings.count:
            break
        tests = tests_of(mutant.path)
        bench.measure(tests)
        bench.write(mutant, mutant.after)
        if bench.compiles():
            tried[mutant.path.name] += 1
            if bench.passes(tests):
                survivors.append(mutant)
                print(mutant.diff(), flush=True)
            else:
                noticed[mutant.path.name] += 1
            print(f"{noticed.total()} of {tried.total()} noticed", file=sys.stderr, flush=True)
        bench.write(mutant, mutant.before)
    print("\n| file | tried | noticed |\n|---|---|---|")
    for name in sorted(tried):
        print(f"| {name} | {tried[name]} | {noticed[name]} |")
    print(f"| all | {tried.total()} | {noticed.total()} |")
    print(f"\n{len(candidates)} possible mutants; seed {settings.seed}")


if __name__ == "__main__":
    main()
