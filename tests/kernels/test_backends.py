# SPDX-License-Identifier: MIT
"""Which backend a call uses and why others cannot run, on machines with and without GPU, Triton and CUDA kernels."""

import importlib.util
import inspect
import types

import numpy as np
import pytest
import torch
from operator_calls import CALLS
from torch.utils._python_dispatch import TorchDispatchMode

import namedmask_kernels as nk
from namedmask_kernels import Ragged, backends

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
MASK = (np.bool_, np.uint8)


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends to be on a machine; by default it has everything."""

    def pretend(built=True, kernels=True, triton=True, gpu=True, capability=(8, 0)):
        extension = types.SimpleNamespace(has_cuda=lambda: kernels) if built else None
        monkeypatch.setattr(backends, "native", lambda: extension)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton if name == "triton" and triton else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        backends.choose.cache_clear()

    yield pretend
    backends.choose.cache_clear()


@pytest.mark.parametrize(
    ("op", "name", "place", "without", "reason"),
    [
        ("fill_holes", "fast", CPU, {}, "unknown backend; the backends are cuda, triton, cpu, reference"),
        ("fill_holes", "triton", GPU, {}, "fill_holes has no triton implementation"),
        ("fill_holes", "reference", GPU, {"built": False, "gpu": False}, None),
        ("fill_holes", "cpu", CPU, {"kernels": False, "triton": False, "gpu": False}, None),
        ("fill_holes", "cpu", GPU, {}, "the tensors are on cuda:1"),
        ("fill_holes", "cpu", CPU, {"built": False}, "the C++ extension is not built; install the package"),
        ("fill_holes", "cuda", CPU, {}, "the tensors are on cpu, not on a CUDA device"),
        ("fill_holes", "cuda", GPU, {"triton": False}, None),
        ("fill_holes", "cuda", GPU, {"built": False}, "this build has no CUDA kernels"),
        ("fill_holes", "cuda", GPU, {"kernels": False}, "this build has no CUDA kernels"),
        ("fill_holes", "cuda", GPU, {"gpu": False}, "torch finds no CUDA device"),
        ("fill_holes", "cuda", GPU, {"capability": (7, 5)}, "GPU 1 is too old: compute capability 8.0"),
        ("fill_holes", "cuda", GPU, {"capability": (9, 0)}, None),
        ("normalized_cut", "cuda", GPU, {}, None),
        ("normalized_cut", "cuda", GPU, {"triton": False}, "triton is not installed"),
        ("random_walk", "triton", GPU, {"built": False, "kernels": False}, None),
        ("random_walk", "triton", GPU, {"triton": False}, "triton is not installed"),
        ("random_walk", "triton", GPU, {"gpu": False}, "torch finds no CUDA device"),
    ],
)
def test_obstacles(machine, op, name, place, without, reason):
    machine(**without)
    found = backends.obstacle(op, name, place)
    assert found is None if reason is None else found.startswith(reason)
    if reason is not None:
        with pytest.raises(ValueError, match=f"{op}: backend {name!r} cannot run: "):
            backends.choose(op, name, place)
    else:
        assert backends.choose(op, name, place) == name


def test_auto_takes_the_fastest_that_can_run(machine):
    machine()
    names = "fill_holes", "random_walk", "vote_masks"
    assert [backends.choose(op, "auto", GPU) for op in names] == ["cuda", "triton", "cuda"]
    assert [backends.choose(op, "auto", CPU) for op in names] == ["cpu"] * 3
    machine(triton=False)
    with pytest.raises(
        ValueError, match=r"random_walk: no fast backend can run \(cuda: .* no cuda .*; triton: .*; cpu: t"
    ):
        backends.choose("random_walk", "auto", GPU)
    machine(built=False)
    with pytest.raises(
        ValueError, match=r"cpu: the C.. extension is not built.*; backend='reference' is slow but works"
    ):
        backends.choose("fill_holes", "auto", CPU)


def test_explain(machine):
    machine()
    rows = types.SimpleNamespace(device=GPU)
    assert backends._device_of({0: 3, "mask": torch.zeros(1, device="meta")}) == torch.device("meta")
    assert backends._device_of({0: Ragged(torch.zeros(1, device="meta"), rows, rows)}) == torch.device("meta")
    assert backends._device_of({0: np.zeros(1), 1: None}) == CPU
    mask = torch.zeros(2, 2, dtype=torch.bool)
    expected = ["fill_holes on cpu: cpu", "  cuda: the tensors are on cpu, not on a CUDA device",
                "  triton: fill_holes has no triton implementation", "  reference: can run, but is slow"]  # fmt: skip
    for call in ((nk.fill_holes, mask), ("fill_holes", mask), ("fill_holes",)):
        assert nk.explain(*call).splitlines() == expected
    assert nk.explain("fill_holes", mask=mask, backend="cpu").splitlines()[0] == "fill_holes on cpu: cpu (as requested)"
    lines = nk.explain("fill_holes", mask, backend="cuda").splitlines()
    assert lines[0].startswith("fill_holes: backend 'cuda' cannot run: ") and lines[3] == "  cpu: can run"
    with pytest.raises(
        ValueError, match=r"explain: 'erode' is not an operator; the operators are attention_features, "
    ):
        nk.explain("erode")
    for value in (None, 3):
        with pytest.raises(ValueError, match=f"explain: {value} is not an operator; the operators are "):
            nk.explain(value)
    with pytest.raises(TypeError):
        nk.explain(nk.fill_holes, mask, size=3)


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ([(np.zeros((2, 3), bool), 0, MASK)], True),
        ([(np.zeros((2, 3), np.uint8), 0, MASK)], True),
        ([(np.zeros((2, 3), bool), 0, MASK), (np.zeros((2, 3, 4), np.uint8), 4, MASK)], True),
        ([(np.zeros((2, 3), np.int8), 0, MASK)], False),
        ([(np.zeros(6, bool), 0, MASK)], False),
        ([(np.zeros((2, 3, 1), bool), 0, MASK)], False),
        ([(np.zeros((2, 3, 4), bool), 3, MASK)], False),
        ([(np.zeros((2, 3), bool), 0, MASK), (np.zeros((3, 2, 4), bool), 4, MASK)], False),
        ([(torch.zeros(2, 3, dtype=torch.bool), 0, MASK)], False),
        ([(np.ma.masked_array(np.zeros((2, 3), bool)), 0, MASK)], False),
        ([(np.ndarray((2, 3), np.int16, np.zeros(13, np.uint8)[1:].data), 0, (np.int16,))], False),  # not aligned
    ],
)
def test_arrays_that_bypass_torch(arguments, accepted):
    arrays = backends.numpy_arguments("fill_holes", "auto", *arguments)
    assert (arrays is not None) == accepted
    if accepted:
        assert all(array is argument for array, (argument, _, _) in zip(arrays, arguments, strict=True))
        assert backends.numpy_arguments("fill_holes", "reference", *arguments) is None


def test_default_settings():
    """The documented ones."""
    cut = {"eps": 1e-5, "tolerance": 1e-8, "max_iterations": 128, "backend": "auto"}
    components = {"connectivity": 4, "backend": "auto"}
    for op, expected in {
        nk.normalized_cut: {"tau": 0.2, **cut},
        nk.mask_cut: {"objects": 3, "tau": 0.15, **cut},
        nk.random_walk: {"steps": 2, "sharpness": 10.0, "backend": "auto"},
        nk.spectral_clusters: {"seed": 0, "backend": "auto"},
        nk.vote_masks: {"backend": "auto"},
        nk.run_lengths: {"backend": "auto"},
        nk.connected_components: components,
        nk.largest_component: components,
        nk.fill_holes: components,
    }.items():
        parameters = inspect.signature(op).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == expected, op.__name__


# -- CUDA graphs ------------------------------------------------------------------------------------------------------

CAPTURABLE = [nk.bilateral_solver, nk.fill_holes, nk.largest_component, nk.vote_masks]


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_operators_that_cuda_graphs_cannot_capture(capturing):
    """They wait for the GPU, or keep tables in memory that the graph does not own."""
    for name in sorted(backends.IMPLEMENTATIONS.keys() - {op.__name__ for op in CAPTURABLE}):
        on_gpu = backends.IMPLEMENTATIONS[name].keys() & {"cuda", "triton"}
        assert on_gpu
        # torch.compile(mode="reduce-overhead") leaves such an operator out of its graphs
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.namedmask_kernels, name).default.tags
        for backend in on_gpu:
            with pytest.raises(RuntimeError, match=f"^{name} cannot be captured in a CUDA graph; call it outside"):
                backends.IMPLEMENTATIONS[name][backend]()


class Allocations(TorchDispatchMode):
    """Lets torch only allocate and view memory: it launches no kernel, copies nothing and waits for nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            assert function.is_view or function.__name__.split(".")[0] in ("empty", "empty_like", "new_empty", "view")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", CAPTURABLE, ids=lambda op: op.__name__)
def test_operators_that_cuda_graphs_can_capture_only_enqueue_kernels(op, capturing, monkeypatch):
    implementations, enqueued = backends.IMPLEMENTATIONS[op.__name__], []

    def on_gpu(*arguments):
        with Allocations():
            return implementations["cuda"](*arguments)

    kernels = types.SimpleNamespace(**{op.__name__: lambda *arguments: enqueued.append(arguments)})
    monkeypatch.setattr(backends.native(), "cuda", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(implementations, "cpu", on_gpu)
    op(*CALLS[op])
    assert len(enqueued) == 1
