#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Mutation testing of the Python modules: changes an operator, constant or condition, runs the module's own tests.

    pip install cosmic-ray
    python tools/mutate.py --count 300 --seed 0                  # a sample of all modules, by their size
    python tools/mutate.py --count 40 namedmask/archive.py       # of one module
    python tools/mutate.py --given mutants.jsonl                 # lines of {"file": …, "line": …, "from": …, "to": …}

No file is changed: a mutant replaces the source of its module when Python imports it, in the test process and in all
processes that the tests start. Each mutant runs in a fork of a process that has imported torch and timm. A mutant
survives if all tests pass; running too long counts as noticed. The survivors are printed as diffs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]
# The tests of modules whose test file has another name. All others: tests/*/test_NAME.py, of the module or its folder.
TESTS = {
    "kernels/namedmask_kernels/__init__.py": ["kernels/test_threads", "kernels/test_operators"],
    "kernels/namedmask_kernels/backends.py": [
        "kernels/test_backends",
        "kernels/test_operators",
        "kernels/test_threads",
    ],
    "kernels/namedmask_kernels/library.py": ["kernels/test_operators"],
    "kernels/namedmask_kernels/normalized_cut.py": ["kernels/test_normalized_cut", "kernels/test_mask_cut"],
    "kernels/namedmask_kernels/ragged.py": ["kernels/test_ragged", "kernels/test_operators"],
    "namedmask/backbones.py": ["pipeline/test_backbones", "pipeline/test_deeplab"],
    "namedmask/__init__.py": ["pipeline/test_entry"],
    "namedmask/__main__.py": ["pipeline/test_entry", "pipeline/test_process"],
    "namedmask/batches.py": ["pipeline/test_detect_and_refine", "pipeline/test_pseudolabel"],
    **{
        f"namedmask/commands/{name}.py": ["pipeline/test_cli", *more]
        for name, more in {
            "convert": ["pipeline/test_convert"],
            "estimate": ["pipeline/test_estimate"],
            "evaluate": ["pipeline/test_benchmarks", "pipeline/test_metrics"],
            "imports": ["pipeline/test_imports"],
            "options": [],
            "segment": ["pipeline/test_predict"],
            "stages": ["pipeline/test_run"],
        }.items()
    },
    "namedmask/command_line.py": ["pipeline/test_cli"],
    "namedmask/config.py": ["pipeline/test_config", "pipeline/test_cli"],
    "namedmask/console.py": ["pipeline/test_progress"],
    "namedmask/decoding.py": ["pipeline/test_photos", "pipeline/test_memory"],
    "namedmask/distributed.py": ["pipeline/test_distributed", "pipeline/test_process"],
    "namedmask/launcher.py": ["pipeline/test_launcher", "pipeline/test_process", "pipeline/test_run"],
    "namedmask/doctor.py": ["pipeline/test_hub", "pipeline/test_cli"],
    "namedmask/errors.py": ["pipeline/test_errors", "pipeline/test_process", "pipeline/test_cli"],
    "namedmask/files.py": ["pipeline/test_files", "pipeline/test_masks"],
    "namedmask/formats.py": ["pipeline/test_metrics"],
    "namedmask/report.py": ["pipeline/test_report", "pipeline/test_pages"],
    "namedmask/run.py": [
        *("pipeline/test_run_folder", "pipeline/test_run", "pipeline/test_overwrite"),
        "pipeline/test_update",
    ],
    "namedmask/stages.py": ["pipeline/test_stages", "pipeline/test_cli"],
    **{
        f"namedmask/imports/{name}.py": ["pipeline/test_imports"]
        for name in ("__init__", "archive", "embeddings", "experts", "masks")
    },
    "namedmask/names.py": ["pipeline/test_candidates"],
    "namedmask/photos.py": ["pipeline/test_photos", "pipeline/test_memory"],
    "kernels/namedmask_kernels/attention_features.py": ["kernels/test_attention_features", "kernels/test_operators"],
    "namedmask/pseudolabel.py": ["pipeline/test_detect_and_refine", "pipeline/test_run", "pipeline/test_pseudolabel"],
    "namedmask/refine.py": ["pipeline/test_refine", "pipeline/test_detect_and_refine"],
    "namedmask/saliency/__init__.py": ["pipeline/test_detect_and_refine", "pipeline/test_selfmask"],
    "namedmask/saliency/detector.py": ["pipeline/test_detect_and_refine", "pipeline/test_selfmask"],
    "namedmask/saliency/spectral.py": ["pipeline/test_detect_and_refine"],
    "namedmask/saliency/cluster_vote.py": ["pipeline/test_detect_and_refine"],
    "namedmask/saliency/selfmask_training.py": ["pipeline/test_selfmask"],
    "namedmask/segmenter/batch_norm.py": ["pipeline/test_segmenter_training"],
    "namedmask/segmenter/card.py": ["pipeline/test_segmenter_hub"],
    **{
        f"namedmask/segmenter/{name}.py": ["pipeline/test_predict", "pipeline/test_overwrite"]
        for name in ("folder", "mask_names", "overlay", "segment")
    },
    "namedmask/segmenter/report.py": ["pipeline/test_segmented_report"],
    "namedmask/segmenter/training.py": ["pipeline/test_segmenter_training"],
    "namedmask/suffixes.py": ["pipeline/test_photos"],
    "namedmask/tars.py": ["pipeline/test_photos", "pipeline/test_remote"],
    "namedmask/timing.py": ["pipeline/test_pseudolabel"],
    "namedmask/training.py": ["pipeline/test_training", "pipeline/test_segmenter_training"],
    "namedmask/evaluate/benchmarks.py": ["pipeline/test_benchmarks"],
    "namedmask/evaluate/folders.py": ["pipeline/test_metrics", "pipeline/test_predict"],
    "namedmask/evaluate/runs.py": ["pipeline/test_evaluate_runs"],
    "namedmask/evaluate/saliency.py": ["pipeline/test_benchmarks"],
    "namedmask/evaluate/scoring.py": ["pipeline/test_benchmarks"],
    "namedmask/urls.py": ["pipeline/test_remote"],
}
# The demo's figures are pinned as a whole; references are what tests compare with; Triton needs a GPU.
LEFT_OUT = ("namedmask/demo/", "kernels/namedmask_kernels/reference/", "kernels/namedmask_kernels/triton/")

SWAPS = [("Add", "Sub"), ("Mul", "Div"), ("FloorDiv", "Mul"), ("Mod", "Mul"), ("Pow", "Mul"), ("BitAnd", "BitOr")]
COMPARISONS = [("Eq", "NotEq"), ("Lt", "LtE"), ("Gt", "GtE"), ("Lt", "GtE"), ("Gt", "LtE"), ("Is", "IsNot")]
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for x, y in SWAPS for a, b in ((x, y), (y, x))),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for x, y in COMPARISONS for a, b in ((x, y), (y, x))),
    *(f"core/{name}" for name in ("AddNot", "ReplaceUnaryOperator_Delete_Not", "ReplaceAndWithOr", "ReplaceOrWithAnd")),
    *(f"core/{name}" for name in ("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue")),
    "core/ReplaceUnaryOperator_Delete_USub",
]

# Python runs this module at its start; the tests' subprocesses get it through PYTHONPATH.
SITECUSTOMIZE = """
import os
from importlib.machinery import SourceFileLoader
path, _, mutant = os.environ.get("MUTANT", "").partition(":")
if path:
    get_code = SourceFileLoader.get_code
    def mutated(self, name):
        if os.path.realpath(self.path) == path:
            return compile(open(mutant, encoding="utf-8").read(), self.path, "exec")
        return get_code(self, name)
    SourceFileLoader.get_code = mutated
"""


def tests_of(module: str) -> list[str]:
    """The test files of a module."""
    if module in TESTS:
        return [f"tests/{name}.py" for name in TESTS[module]]
    for name in (Path(module).stem, Path(module).parent.name):
        if found := sorted(ROOT.glob(f"tests/*/test_{name}.py")):
            return [str(path.relative_to(ROOT)) for path in found]
    raise SystemExit(f"{module} has no tests/*/test_{Path(module).stem}.py: add it to TESTS in tools/mutate.py")


def modules() -> list[str]:
    """All modules with code."""
    paths = (p.relative_to(ROOT).as_posix() for top in ("namedmask", "kernels") for p in (ROOT / top).rglob("*.py"))
    return sorted(p for p in paths if not p.startswith(LEFT_OUT) and list(mutants(p)))


def code_only(source: str) -> str:
    """The syntax tree without what has no effect when it runs: annotations, docstrings, zip(strict=...)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = []
        for field in ("annotation", "returns"):
            if hasattr(node, field) and not isinstance(node, ast.AnnAssign):
                setattr(node, field, None)
    return ast.dump(tree)


def mutants(module: str) -> Iterator[tuple[str, str, int]]:
    """(module, operator, occurrence) of all mutants."""
    tree = get_ast((ROOT / module).read_text(encoding="utf-8"))
    nodes = list(ast_nodes(tree))
    for name in OPERATORS:
        operator = get_operator(name)()
        count = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        yield from ((module, name, occurrence) for occurrence in range(count))


def sample(names: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Draws (module, mutated source) in random order, so that a part of them is a sample, too.

    Mutants that change annotations alone are left out.
    """
    everything = [mutant for name in names for mutant in mutants(name)]
    random.Random(seed).shuffle(everything)
    drawn: list[tuple[str, str]] = []
    for module, name, occurrence in everything:
        source = (ROOT / module).read_text(encoding="utf-8")
        changed = mutate_code(source, get_operator(name)(), occurrence)
        try:
            if changed is not None and code_only(changed) != code_only(source):
                drawn.append((module, changed))
        except SyntaxError:
            continue
        if len(drawn) == count:
            break
    return drawn


def given(path: Path) -> list[tuple[str, str]]:
    """The mutants of a file of JSON lines that still apply: the text occurs near the line."""
    drawn = []
    for line in path.read_text(encoding="utf-8").splitlines():
        mutant = json.loads(line)
        lines = (ROOT / mutant["file"]).read_text(encoding="utf-8").splitlines(keepends=True)
        places = [n for n, text in enumerate(lines) if mutant["from"] in text]
        if not places:
            print(f"does not apply any more: {mutant['file']}:{mutant['line']}: {mutant['from']}")
            continue
        at = min(places, key=lambda n: abs(n + 1 - mutant["line"]))
        original = "".join(lines)
        lines[at] = lines[at].replace(mutant["from"], mutant["to"], 1)
        if code_only("".join(lines)) == code_only(original):
            print(f"does not apply any more: {mutant['file']}:{mutant['line']}: {mutant['from']}")
            continue
        drawn.append((mutant["file"], "".join(lines)))
    return drawn


def run_tests(module: str, source: str, folder: Path, timeout: float) -> tuple[bool, float]:
    """Runs a module's tests on its mutated source, in a fork; returns whether all passed, and the seconds."""
    mutant = folder / "mutant.py"
    mutant.write_text(source, encoding="utf-8")
    began = time.monotonic()
    if (pid := os.fork()) == 0:
        os.setsid()
        os.chdir(ROOT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.environ |= {"MUTANT": f"{ROOT / module}:{mutant}", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        exec(SITECUSTOMIZE, {})
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests_of(module)])))
    status = None
    while status is None and time.monotonic() - began < timeout:
        time.sleep(0.05)
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and what its tests started
    if status is None:
        os.waitpid(pid, 0)
    return status == 0, time.monotonic() - began


def diff(module: str, source: str) -> str:
    """The changed lines of a mutant."""
    original = (ROOT / module).read_text(encoding="utf-8").splitlines()
    lines = list(difflib.unified_diff(original, source.splitlines(), n=0, lineterm=""))[2:]
    return "\n".join(f"    {line}" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules to mutate; default: all")
    parser.add_argument("--count", type=int, default=300, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--given", type=Path, help="a file of mutants, instead of random ones")
    arguments = parser.parse_args()
    drawn = given(arguments.given) if arguments.given else sample(
        arguments.modules or modules(), arguments.count, arguments.seed
    )  # fmt: skip
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/kernels/conftest.py, which is too late after the imports
    import timm  # noqa: F401  imported once, before the forks
    import torch  # noqa: F401

    noticed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    timeouts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        for module, source in drawn:
            if module not in timeouts:
                passed, seconds = run_tests(module, (ROOT / module).read_text(encoding="utf-8"), folder, 1800)
                if not passed:
                    raise SystemExit(f"the tests of {module} fail without a mutation: {' '.join(tests_of(module))}")
                timeouts[module] = 3 * seconds + 30
            survived, seconds = run_tests(module, source, folder, timeouts[module])
            tried[module] += 1
            noticed[module] += not survived
            if survived:
                print(f"survived: {module}\n{diff(module, source)}", flush=True)
            print(f"{tried.total()} of {len(drawn)}, {noticed.total()} noticed", file=sys.stderr, flush=True)
    print("\n| module | noticed | of |\n|---|---|---|")
    for module in tried:
        print(f"| {module} | {noticed[module]} | {tried[module]} |")
    print(f"| all | {noticed.total()} ({noticed.total() / max(tried.total(), 1):.0%}) | {tried.total()} |")


if __name__ == "__main__":
    main()
