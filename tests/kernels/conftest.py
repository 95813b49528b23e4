# SPDX-License-Identifier: MIT
"""What the operators' tests share: golden arrays, the backends to test here, CUDA emulated where there is no GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import emulator
from namedmask_kernels import Ragged, backends

GOLDEN = Path(__file__).parents[1] / "golden"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported: kernels then run on the CPU


if (native := backends.native()) is not None:
    native.limit_threads(64)  # tests run on more threads than a container's CPU quota may allow


def pytest_configure(config):
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the CPU, see emulator.py")
    # Tests pass NaN and infinity on purpose, and Triton's interpreter computes with numpy.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_generate_tests(metafunc):
    """A test that takes `backend` and `device` runs for each of its module's BACKENDS, on the device that it needs.

    Where there is no GPU, the backend "cuda" is emulated, on the device "cpu".
    """
    if {"backend", "device"} <= set(metafunc.fixturenames):
        placements = []
        for backend in metafunc.module.BACKENDS:
            device, marks = "cpu", []
            if backend in ("cuda", "triton"):
                if torch.cuda.is_available():
                    device = "cuda"
                    if backend == "cuda" and not backends.native().has_cuda():
                        marks = [pytest.mark.skip(reason="this build has no CUDA kernels")]
                elif backend == "cuda":
                    marks = [pytest.mark.emulated]
                else:
                    marks = [pytest.mark.skip(reason="no CUDA device here")]
            placements.append(pytest.param(backend, device, marks=marks, id=backend))
        metafunc.parametrize(("backend", "device"), placements)


@pytest.fixture(autouse=True)
def _emulate(request):
    """Emulates CUDA in tests marked `emulated`."""
    if request.node.get_closest_marker("emulated"):
        request.getfixturevalue("emulated_cuda")


@pytest.fixture(scope="session")
def emulator_extension():
    """emulator.extension(), compiled once: after an error, the other tests do not try again."""
    if torch.cuda.is_available():
        pytest.skip("CUDA kernels run on this machine's GPU")
    if reason := emulator.obstacle():
        pytest.skip(reason)
    return emulator.extension()


@pytest.fixture
def emulated_cuda(request, monkeypatch, emulator_extension):
    """Makes `backend="cuda"` run on CPU tensors: CUDA kernels in the emulator, Triton kernels in Triton's interpreter.

    New memory is filled (`filled_memory`).
    """
    real_choose = backends.choose

    def choose(op, backend, device):
        if backend == "cuda" and op in backends.CUDA_WITH_TRITON:
            pytest.importorskip("triton")
        return backend if backend == "cuda" else real_choose(op, backend, device)

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(backends.native(), "cuda", emulator.Cuda(), raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    emulator_extension.seed(zlib.crc32(request.node.nodeid.encode()))  # another order of threads for every test
    with filled_memory():
        yield


@contextlib.contextmanager
def filled_memory():
    """Memory from torch.empty and its siblings holds NaN or the largest integer: reads of unwritten memory show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


fill_memory = pytest.fixture(lambda: filled_memory)


@pytest.fixture(scope="session")
def golden():
    """golden("bilateral") returns the arrays of tests/golden/bilateral.npz, from the original code."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture
def run(backend, device):
    """A function (op, *arrays, **settings) that calls the operator on the backend's device and returns CPU tensors."""

    def move(value, to):
        if isinstance(value, Ragged):
            return value.with_rows(value.rows.to(to))
        if isinstance(value, tuple):
            return type(value)(*(move(part, to) for part in value))
        return value.to(to) if isinstance(value, torch.Tensor) else value

    def call(op, *arrays, **settings):
        return move(op(*(move(array, device) for array in arrays), backend=backend, **settings), "cpu")

    return call


UNSUPPORTED = "the highest level of this CPU is"  # in the error for a SIMD level that this CPU does not have
LOAD_NATIVE = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("namedmask_kernels._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.level())
"""


@pytest.fixture
def native_at_levels():
    """A function (code, *arguments) that runs code with `native`, the extension alone, at each SIMD level of this CPU.

    It returns the words that the code prints at each level. Importing torch would take seconds per level.
    """

    def run(code: str, *arguments: object) -> dict[str, list[str]]:
        printed = {}
        for level in ("portable", "avx2", "avx512"):
            command = [sys.executable, "-c", LOAD_NATIVE + code, backends.native().__file__, *map(str, arguments)]
            done = subprocess.run(command, env=os.environ | {"NMK_LEVEL": level}, capture_output=True, text=True)
            if level != "portable" and UNSUPPORTED in done.stderr:
                continue
            assert done.returncode == 0, done.stderr
            name, *printed[level] = done.stdout.split()
            assert name == level
        return printed

    return run


@pytest.fixture
def run_at_level(tmp_path):
    """A function (level, code) that runs Python code in a process restricted to a SIMD level; its argument is tmp_path.

    Skips the test if this CPU does not support the level.
    """

    def run(level: str, code: str) -> None:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=os.environ | {"NMK_LEVEL": level}, capture_output=True, text=True)
        if UNSUPPORTED in done.stderr:
            pytest.skip(f"this CPU does not support {level}")
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def on_threads():
    """A function (call, counts) that returns the call's result for each number of threads."""
    before = torch.get_num_threads()

    def run(call, counts=(1, 2, 3)) -> list:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
        return results

    yield run
    torch.set_num_threads(before)
