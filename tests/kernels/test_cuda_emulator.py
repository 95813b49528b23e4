# SPDX-License-Identifier: MIT
"""The logic of the CUDA kernels, run on the CPU by cuda_emulator/: for machines without a GPU. On a GPU the operators'
own tests run the real thing."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import namedmask_kernels as nk
from namedmask_kernels import Ragged

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not here to compile the emulated kernels")


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "connected_components.so"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, f"-I{HERE / 'cuda_emulator'}"]
    sources = [HERE / "cuda_emulator" / "connected_components.cpp", CSRC / "cpu" / "tensor_view.cpp"]
    subprocess.run([*command, f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", *sources], check=True)
    function = ctypes.CDLL(str(library)).run

    def run(op, batch, out_dtype, counts=None, found=0):
        """Calls the launcher with every output and the scratch memory poisoned; -> out, counts, areas, boxes."""
        rows, photos = len(batch.rows), len(batch.shapes)
        out = torch.full((rows,), 77, dtype=torch.uint8 if out_dtype == torch.bool else out_dtype)
        counts = torch.full((photos,), -77, dtype=torch.int32) if counts is None else counts
        areas, boxes = torch.full((found,), 77, dtype=torch.int32), torch.full((found, 4), 77, dtype=torch.int32)
        workspace = torch.full((2 * rows + 4 * photos,), 12345678, dtype=torch.int32)
        tensors = [batch.rows, batch.offsets, batch.shapes], [out, counts, areas, boxes], [workspace]
        given, results, scratch = ([ctypes.c_void_p(t.data_ptr()) for t in group] for group in tensors)
        function(op.encode(), *given, rows, photos, *results, found, *scratch)
        return out.view(out_dtype) if out_dtype == torch.bool else out, counts, areas, boxes

    return run


def blobs(rng, shape, density):
    """Noise, smoothed a little: runs of all lengths, holes, components that cross tiles."""
    noise = torch.from_numpy(rng.random(shape, dtype=np.float32))
    if min(shape) > 4:
        noise = torch.nn.functional.avg_pool2d(noise[None, None], 3, 1, 1)[0, 0]
        density = float(noise.flatten().quantile(density)) if noise.numel() < 1 << 20 else density
    return noise < density


def comb(height, width):
    """Teeth that only meet in the last row: every tile's labels are united late."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def batches():
    rng = np.random.default_rng(0)
    shapes = [(5, 7), (0, 4), (1, 1), (33, 65), (70, 31), (1, 100), (100, 1), (64, 64), (9, 0)]
    for density in (0.1, 0.45, 0.6, 0.9):
        yield Ragged.pack([blobs(rng, shape, density) for shape in shapes])
    full = torch.ones(40, 70, dtype=torch.bool)
    yield Ragged.pack([full, ~full, comb(70, 67), comb(67, 70).T, ~comb(66, 99)])
    yield Ragged.pack([blobs(rng, (2, 3), 0.5) for _ in range(203)])  # more photos than a launch takes
    yield Ragged.of_shapes(torch.zeros(0, dtype=torch.bool), [])


@pytest.mark.parametrize("batch", list(batches()))
def test_emulated_components_equal_the_cpu(components, batch):
    expected = nk.connected_components(batch, backend="cpu")
    labels, counts, *_ = components("connected_components", batch, torch.int32)
    assert torch.equal(labels, expected.labels.rows)
    assert torch.equal(counts, expected.offsets.diff())
    _, _, areas, boxes = components(
        "component_stats", batch.with_rows(labels), torch.int32, counts, len(expected.areas)
    )
    assert torch.equal(areas, expected.areas) and torch.equal(boxes, expected.boxes)
    for op in (nk.largest_component, nk.fill_holes):
        assert torch.equal(components(op.__name__, batch, torch.bool)[0], op(batch, backend="cpu").rows)
