# SPDX-License-Identifier: MIT
"""tools/compile_triton.py, on the variants that the interpreter cannot test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOL = Path(__file__).parents[2] / "tools" / "compile_triton.py"


def test_kernels_compile_for_integer_arguments_of_one():
    """Triton compiles an integer argument of 1 as a constant, which has fewer methods than a tensor."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TOOL, "all integers = 1"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count("all integers = 1") >= 7, child.stdout
