# SPDX-License-Identifier: MIT
"""The C++ extension: the arrays that it accepts, and its coexistence with torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode

from namedmask_kernels import backends

native = backends.native()


def arguments(mask, out):
    shapes = np.array([mask.shape], np.int32) if mask.ndim == 2 else np.array([[1, mask.size]], np.int32)
    return mask.reshape(-1), np.array([0, mask.size], np.int32), shapes, out.reshape(-1)


def test_accepts_arrays_of_any_library_that_supports_dlpack():
    mask = np.random.default_rng(0).random((9, 13)) < 0.6
    out = np.empty_like(mask)
    native.fill_holes(*arguments(mask, out), 4)
    np.testing.assert_array_equal(out, ndimage.binary_fill_holes(mask))
    mixed = torch.from_numpy(np.empty_like(mask))
    flat, offsets, shapes, _ = arguments(mask, out)
    native.fill_holes(torch.from_numpy(flat), torch.from_numpy(offsets), shapes, mixed.reshape(-1), 4)
    assert torch.equal(mixed, torch.from_numpy(out))


def test_invalid_arrays_raise():
    mask = np.zeros((2, 3), bool)
    flat, offsets, shapes, out = arguments(mask, np.empty_like(mask))
    with pytest.raises(TypeError, match="supports DLPack"):
        native.fill_holes([True], offsets, shapes, out, 4)
    with pytest.raises(TypeError, match="unsupported dtype"):
        native.fill_holes(flat.astype(np.complex64), offsets, shapes, out, 4)
    with pytest.raises(BufferError, match="DLPack"):
        native.fill_holes(np.zeros(6, "S3841"), offsets, shapes, out, 4)  # 256 x 15 + 1 bytes
    with pytest.raises(BufferError, match="byte order"):
        native.fill_holes(flat, offsets.astype(">i4"), shapes, out, 4)
    with FakeTensorMode():
        fake = torch.zeros(6, dtype=torch.bool)
    with pytest.raises((TypeError, RuntimeError), match=r"without memory|FakeTensor|fake"):
        native.fill_holes(fake, offsets, shapes, out, 4)


def test_shapes_and_dtypes_are_checked():
    mask = np.zeros((2, 3), bool)
    flat, offsets, shapes, out = arguments(mask, np.empty_like(mask))
    with pytest.raises(
        ValueError, match=r"fill_holes: mask must be bool \[\*\] on cpu, contiguous, but is float32 \[6\]"
    ):
        native.fill_holes(flat.astype(np.float32), offsets, shapes, out, 4)
    with pytest.raises(ValueError, match=r"fill_holes: out must be bool \[6\] on cpu, contiguous, but is bool \[5\]"):
        native.fill_holes(flat, offsets, shapes, out[:5], 4)
    unaligned = np.ndarray(2, np.int32, np.zeros(9, np.uint8)[1:].data)
    with pytest.raises(ValueError, match=r"offsets must be int32 \[2\] .* but is int32 \[2\] on cpu, not aligned"):
        native.fill_holes(flat, unaligned, shapes, out, 4)
    with pytest.raises(ValueError, match="not contiguous"):
        native.fill_holes(np.zeros(12, bool)[::2], offsets, shapes, out, 4)
    with pytest.raises(ValueError, match="offsets must run from 0 to the 6 rows, but run from 0 to 5"):
        native.fill_holes(flat, np.array([0, 5], np.int32), shapes, out, 4)


def test_unknown_instruction_level_is_named():
    code = "import numpy as np, namedmask_kernels as nk; nk.fill_holes(np.zeros((2, 3), bool))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NMK_LEVEL": "sse9"}, capture_output=True)
    assert b"NMK_LEVEL=sse9: must be portable, avx2, avx512, avx512_vnni or avx512_bf16" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("order", ["torch, namedmask_kernels", "namedmask_kernels, torch"])
def test_one_libgomp_in_the_process(order):
    """Two OpenMP runtimes in one process would compete for the cores."""
    code = (
        f"import {order}, re\n"
        "namedmask_kernels.fill_holes(torch.zeros(64, 64, dtype=torch.bool))\n"
        "print(len(set(re.findall(r'/\\S*libgomp\\S*', open('/proc/self/maps').read()))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
