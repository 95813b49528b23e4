# SPDX-License-Identifier: MIT
"""What all operator tests share: where golden arrays lie and which backends this machine can test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from namedmask_kernels import Ragged, backends

GOLDEN = Path(__file__).parents[1] / "golden"


def pytest_generate_tests(metafunc):
    """A test that takes `backend` and `device` runs for each of its module's BACKENDS, on the device that it needs."""
    if {"backend", "device"} <= set(metafunc.fixturenames):
        placements = []
        for backend in metafunc.module.BACKENDS:
            reason = None
            if backend in ("cuda", "triton"):
                if not torch.cuda.is_available():
                    reason = "no CUDA device here"
                elif backend == "cuda" and not backends.native().has_cuda():
                    reason = "this build has no CUDA kernels"
            device = "cuda" if backend in ("cuda", "triton") else "cpu"
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            placements.append(pytest.param(backend, device, marks=marks, id=backend))
        metafunc.parametrize(("backend", "device"), placements)


@pytest.fixture(scope="session")
def golden():
    """golden("bilateral") -> the arrays of tests/golden/bilateral.npz, made by the peers' own code."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture
def run(backend, device):
    """A function (op, *arrays, **settings): calls the operator on the backend's device; results come to the CPU."""

    def move(value, to):
        if isinstance(value, Ragged):
            return value.with_rows(value.rows.to(to))
        if isinstance(value, tuple):
            return type(value)(*(move(part, to) for part in value))
        return value.to(to) if isinstance(value, torch.Tensor) else value

    def call(op, *arrays, **settings):
        return move(op(*(move(array, device) for array in arrays), backend=backend, **settings), "cpu")

    return call


@pytest.fixture
def run_at_level(tmp_path):
    """A function (level, code): runs the code in a process with kernels of the level, tmp_path its argument.

    Skips the test where this CPU has no such level.
    """

    def run(level: str, code: str) -> None:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=os.environ | {"NMK_LEVEL": level}, capture_output=True, text=True)
        if "this CPU goes up to" in done.stderr:
            pytest.skip(f"no {level} here")
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def on_threads():
    """A function (call, counts): what the call gives on each number of threads."""
    before = torch.get_num_threads()

    def run(call, counts=(1, 2, 3)) -> list:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
        return results

    yield run
    torch.set_num_threads(before)
