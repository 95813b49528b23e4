# SPDX-License-Identifier: MIT
"""The CUDA emulator, and tests of all operators with CUDA kernels that apply to no other backend.

The operators' own test files have the rest: without a GPU they run `backend="cuda"` in the emulator.
"""

import re
import sys

import pytest
import torch

import emulator
import namedmask_kernels as nk
from namedmask_kernels import Ragged, library

BACKENDS = ["cuda"]
OPERATORS = [
    "connected_components", "largest_component", "fill_holes", "bilateral_solver", "dense_crf", "normalized_cut",
    "spectral_clusters", "vote_masks",
]  # fmt: skip


def comb(height, width):
    """Teeth that only meet in the last row, so that the labels of all tiles are united late."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def call(operator, shapes, run=None):
    """The tensors that the operator returns for a random batch: through `run`, or on the CPU backend."""
    generator = torch.Generator().manual_seed(len(shapes))

    def draw(*channels, function=torch.rand):
        return Ragged.pack([function(h, w, *channels, generator=generator) for h, w in shapes])

    if operator in ("connected_components", "largest_component", "fill_holes"):
        noise = [grid < 0.6 for grid in draw().grids()]
        full = torch.ones(40, 70, dtype=torch.bool)
        inputs = (Ragged.pack([*noise, full, ~full, comb(70, 67), comb(67, 70).T, ~comb(66, 99)]),)
        settings = {}
    elif operator in ("bilateral_solver", "dense_crf"):
        colors = draw(3)
        image = colors.with_rows((60 * colors.rows).byte())
        probabilities = draw(3)
        inputs = (draw(), image) if operator == "bilateral_solver" else (probabilities, image)
        settings = {"iterations": 3}
    elif operator == "vote_masks":
        soft = draw(6)
        inputs = (soft.with_rows(soft.rows < 0.3),)
        settings = {}
    else:
        inputs = (draw(24, function=torch.randn),)
        settings = {"k": [2, 3]} if operator == "spectral_clusters" else {"tolerance": 1e-10}
    function = getattr(nk, operator)
    found = run(function, *inputs, **settings) if run else function(*inputs, **settings, backend="cpu")
    parts = [found] if isinstance(found, Ragged) else found
    return [part.rows if isinstance(part, Ragged) else part for part in parts]


def with_and_without_clusters(run):
    """What `run` returns on a GPU without clusters of blocks, and what it returns twice on one that has them."""
    alone = run()
    emulator.extension().use_clusters(True)
    try:
        return alone, [run() for _ in range(2)]
    finally:
        emulator.extension().use_clusters(False)


@pytest.mark.parametrize("operator", OPERATORS)
def test_more_images_than_a_launch_takes(run, monkeypatch, operator):
    if operator == "normalized_cut":  # its adapter passes fewer at a time than a launch takes
        monkeypatch.setattr(sys.modules["namedmask_kernels.normalized_cut"], "TOGETHER", 1000)
    shapes = [(1, 1)] * 99 + [(2, 3)] * 4
    found, expected = call(operator, shapes, run), call(operator, shapes)
    fields = slice(1, 4) if operator == "normalized_cut" else slice(None)  # entries of its short vectors may be equal
    for one, other in zip(found[fields], expected[fields], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if one.dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_results_do_not_depend_on_the_order_of_threads(run, device, operator):
    results = []
    for seed in range(3):
        if device == "cpu":
            emulator.extension().seed(seed)
        results.append(call(operator, [(12, 13), (0, 4), (1, 1), (1, 33), (7, 9)], run))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_normalized_cut_names_an_image_that_is_not_finite_in_a_later_launch(run, monkeypatch):
    monkeypatch.setattr(sys.modules["namedmask_kernels.normalized_cut"], "TOGETHER", 2)
    images = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    images[3][0, 1, 2] = torch.inf
    with pytest.raises(ValueError, match="normalized_cut: features must be finite, but image 3 "):
        run(nk.normalized_cut, Ragged.pack(images))


@pytest.mark.parametrize("with_confidence", [False, True])
def test_bilateral_solver_is_the_same_in_a_cluster_of_blocks(emulated_cuda, with_confidence):
    """Sums of more vertices than a cluster has threads, and images with fewer."""
    shapes = [(107, 97), (1, 1), (0, 3), (40, 50)]
    generator = torch.Generator().manual_seed(0)
    target, confidence = (Ragged.pack([torch.rand(h, w, generator=generator) for h, w in shapes]) for _ in range(2))
    image = Ragged.pack([torch.randint(90, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in shapes])
    confidence = confidence.with_rows((confidence.rows - 0.3).clamp(min=0))
    settings = {"sigma_spatial": 3, "iterations": 4} | ({"confidence": confidence} if with_confidence else {})

    def solve():
        return nk.bilateral_solver(target, image, **settings, backend="cuda").rows

    alone, together = with_and_without_clusters(solve)
    assert alone.isfinite().all() and all(torch.equal(alone, other) for other in together)


@pytest.mark.parametrize("side", [0, 1, 5, 36])
def test_normalized_cut_is_the_same_in_a_cluster_of_blocks(emulated_cuda, side):
    """To rounding: sums have another order. The largest has more tokens than a cluster has threads."""
    generator = torch.Generator().manual_seed(side)
    features = torch.randn(side, side, 24, generator=generator)
    features[: side // 2, : side // 3] += 1

    def cut():
        return nk.normalized_cut(features, backend="cuda")

    alone, together = with_and_without_clusters(cut)
    for name, one, first, second in zip(alone._fields, alone, *together, strict=True):
        assert torch.equal(first, second), name
        if name != "residual":
            torch.testing.assert_close(one, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side, channels", [(0, 24), (1, 24), (3, 2), (7, 24), (36, 24), (12, 4100)])
def test_spectral_clusters_are_the_same_in_a_cluster_of_blocks(emulated_cuda, side, channels):
    """The largest has more tokens than a cluster has threads, another more channels."""
    generator = torch.Generator().manual_seed(side)
    centers = 3 * torch.randn(4, channels, generator=generator)
    which = torch.randint(4, (side, side), generator=generator)
    features = centers[which] + torch.randn(side, side, channels, generator=generator)

    def split():
        return nk.spectral_clusters(features, [2, 4], backend="cuda")

    alone, together = with_and_without_clusters(split)
    assert all(torch.equal(alone, other) for other in together)


@pytest.fixture
def failing_launches(emulated_cuda):
    emulator.extension().fail_launches(True)
    yield
    emulator.extension().fail_launches(False)


@pytest.mark.parametrize("operator", OPERATORS)
def test_launch_errors_name_the_operator(failing_launches, run, operator):
    with pytest.raises(RuntimeError, match=f"{operator}: CUDA error: the emulator was told to fail\n.*=1 shows which"):
        call(operator, [(12, 13)], run)


def test_faults_of_kernels_name_the_operator_if_launches_are_blocking(emulated_cuda, monkeypatch):
    def synchronize(device):
        raise RuntimeError(f"CUDA error: illegal memory access on {device}")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    mask = torch.ones(3, 4)
    nk.largest_component(mask > 0, backend="cuda")  # does not wait
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(RuntimeError, match=r"^largest_component: CUDA error: illegal memory access on cpu$"):
        nk.largest_component(mask > 0, backend="cuda")
    nk.largest_component(mask > 0, backend="cpu")


def test_errors_that_are_not_of_cuda_and_lack_of_memory_keep_their_types():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), NotImplementedError("no"), RuntimeError("odd")):

        def fail(tensor, error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            library._on_gpu("erode", fail, True)(torch.zeros(1))
        assert raised.value is error


def test_new_memory_is_poisoned(emulated_cuda):
    assert torch.empty(9).isnan().all() and torch.zeros(1, dtype=torch.float64).new_empty(9).isnan().all()
    assert (torch.empty_like(torch.zeros(9, dtype=torch.int32)) == 2**31 - 1).all()
    assert torch.empty(9, dtype=torch.bool).all()


@pytest.mark.parametrize("at", [-1, 4])
def test_writes_outside_of_an_array_are_noticed(emulated_cuda, monkeypatch, at):
    def careless(array):
        torch.as_strided(array, (1,), (1,), array.storage_offset() + at).fill_(7)

    monkeypatch.setattr(emulator.extension(), "careless", careless, raising=False)
    with pytest.raises(AssertionError, match="careless wrote outside of its argument 0"):
        nk.backends.native().cuda.careless(torch.zeros(4))


def test_sources_are_compiled_once_and_after_a_change(emulated_cuda, tmp_path):
    source, header = tmp_path / "a b.cpp", tmp_path / "c.h"
    source.write_text('#include "c.h"\n')
    header.write_text("int f();\n")
    times = []
    for change in (False, False, True):
        if change:
            header.write_text("int g();\n")
        times.append(emulator._compile(source, tmp_path).stat().st_mtime_ns)
    assert times[0] == times[1] < times[2]


def test_kernels_say_how_many_threads_they_get():
    """Else ptxas may give each thread more registers than a block has, and every launch on a GPU fails."""
    folder = emulator.ROOT / "csrc" / "cuda"
    sources = {path.name: path.read_text() for path in (*folder.glob("*.cu"), *folder.glob("*.h"))}
    kernels = [(name, text) for name, source in sources.items() for text in re.findall(r"__global__[^{;]*", source)]
    assert len(kernels) > 30
    assert not [(name, text) for name, text in kernels if "__launch_bounds__" not in text]
