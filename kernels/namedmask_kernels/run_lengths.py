# SPDX-License-Identifier: MIT
"""COCO's run-length encoding of binary masks."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import cuda_stream, register
from .ragged import MASK, Array, Ragged, arrange, as_mask, pack_numpy
from .reference import run_lengths as reference

NAME = "run_lengths"


class RunLengths(NamedTuple):
    """Result of `run_lengths`: N runs in the B images of the batch. All arrays are on the CPU.

    Attributes:
        lengths: int32 [N]; per image in column-major order, of false and true pixels in turn, false first.
        offsets: int32 [B + 1]; the runs of image b are lengths[offsets[b] : offsets[b + 1]].
        areas: int32 [B], number of true pixels.
        boxes: int32 [B, 4], as x, y, width, height; zeros without a true pixel.
        strings: uint8 [C], the compressed strings in ASCII.
        ends: int32 [B + 1]; the string of image b is strings[ends[b] : ends[b + 1]].
    """

    lengths: Array
    offsets: Array
    areas: Array
    boxes: Array
    strings: Array
    ends: Array

    def counts(self) -> list[bytes]:
        """The string of each image, as `counts` of pycocotools' compressed RLE."""
        text, ends = np.asarray(self.strings).tobytes(), np.asarray(self.ends).tolist()
        return [text[begin:end] for begin, end in itertools.pairwise(ends)]


def run_lengths(mask: Ragged | Array, *, backend: str = "auto") -> RunLengths:
    """Encodes masks as COCO's run lengths and compressed strings, equal to those of pycocotools.

    From a GPU, only the run lengths are copied, not the masks.

    Args:
        mask: bool or uint8 [H, W] (numpy or torch), or Ragged with rows [P]. In uint8 masks (0 and 1, or OpenCV's 0 and
            255) any nonzero value is true.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        A `RunLengths`, with arrays of the kind of `mask`.

    Raises:
        TypeError: If the mask is not a bool or uint8 array, tensor or Ragged.
        ValueError: If it has the wrong shape, or the backend cannot run.

    Cost:
        One pass over the mask, and time and memory in proportion to the number of runs. The CUDA version makes two
        passes and waits for the GPU to learn the number of runs.

    Determinism:
        Identical on every backend, in any batch and with any number of threads.

    Source:
        The format of pycocotools' mask API, T.-Y. Lin et al., Microsoft COCO, ECCV 2014.

    Examples:
        >>> mask = torch.zeros(3, 4, dtype=torch.bool)
        >>> mask[1, 1:3] = True
        >>> runs = run_lengths(mask)
        >>> runs.lengths.tolist(), runs.boxes.tolist(), runs.counts()
        ([4, 1, 2, 1, 4], [[1, 1, 2, 1]], [b'41202'])
    """
    arrays = backends.numpy_arguments(NAME, backend, (mask, 0, (np.bool_, np.uint8)))
    if arrays:
        rows, offsets, shapes = pack_numpy(arrays[0].astype(np.bool_, copy=False))
        first = np.empty(2, np.int32)
        lengths = backends.native().run_lengths(rows, offsets, shapes, first)
        return RunLengths(lengths, first, *_compress(lengths, first, shapes))
    packed = arrange(NAME, "mask", mask, 0, *MASK)
    runs = _run_lengths(as_mask(packed.rows).contiguous(), packed.offsets, packed.shapes, backend)
    if isinstance(mask, np.ndarray):
        return RunLengths(*(tensor.numpy() for tensor in runs))
    return RunLengths(*runs)


def _compress(lengths: np.ndarray, first: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Areas, boxes, strings and their ends, from the runs."""
    count = len(shapes)
    areas, boxes, ends = np.empty(count, np.int32), np.empty((count, 4), np.int32), np.empty(count + 1, np.int32)
    strings = backends.native().compress_runs(lengths, first, shapes, areas, boxes, ends)
    return areas, boxes, strings, ends


# -- backends: every implementation takes the arguments of the schema below and returns its results ------------------

Outputs = tuple[Tensor, ...]  # as RunLengths


def _fake(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Outputs:
    size = torch.library.get_ctx().new_dynamic_size
    lengths, strings = offsets.new_empty(size()), offsets.new_empty(size(), dtype=torch.uint8)
    areas, boxes = offsets.new_empty(shapes.shape[0]), offsets.new_empty(shapes.shape[0], 4)
    return lengths, torch.empty_like(offsets), areas, boxes, strings, torch.empty_like(offsets)


def _reference(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Outputs:
    grids = [grid.cpu().numpy() for grid in Ragged(mask, offsets, shapes).grids()]
    lengths = [reference.run_lengths(grid) for grid in grids]
    texts = [np.frombuffer(reference.compress_runs(own), np.uint8) for own in lengths]
    boxes = np.zeros((len(grids), 4), np.int32)
    for box, grid in zip(boxes, grids, strict=True):
        if grid.any():
            y, x = np.nonzero(grid)
            box[:] = x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1
    first, ends = (np.cumsum([0, *map(len, parts)], dtype=np.int32) for parts in (lengths, texts))
    areas = np.array([grid.sum() for grid in grids], np.int32)
    joined = np.concatenate([np.empty(0, np.int32), *lengths]), first, areas, boxes
    return (
        *map(torch.from_numpy, joined),
        torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *texts])),
        torch.from_numpy(ends),
    )


def _with_strings(lengths: Tensor, first: Tensor, shapes: Tensor) -> Outputs:
    rest = _compress(lengths.numpy(), first.numpy(), shapes.numpy())
    return lengths, first, *map(torch.from_numpy, rest)


def _cpu(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Outputs:
    first = torch.empty_like(offsets)
    lengths = backends.native().run_lengths(mask, offsets, shapes, first)
    return _with_strings(torch.from_numpy(lengths), first, shapes)


def _cuda(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Outputs:
    native, stream = backends.native().cuda, cuda_stream(mask)
    empty = torch.empty(0, dtype=torch.int32, device=mask.device)
    columns, counts = empty.new_empty(int(shapes[:, 1].sum())), empty.new_empty(shapes.shape[0])
    native.run_counts(mask, offsets, shapes, columns, counts, stream)
    first = torch.nn.functional.pad((counts + 1).cumsum(0, dtype=torch.int32), (1, 0))
    on_cpu = first.cpu()
    n = int(on_cpu[-1])
    begins, lengths = empty.new_empty(n), empty.new_empty(n)
    native.run_lengths(mask, offsets, shapes, columns, first, begins, lengths, stream)
    return _with_strings(lengths.cpu(), on_cpu, shapes)


_run_lengths = register(
    f"{NAME}(Tensor mask, Tensor offsets, Tensor shapes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_fake,
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    differentiable=False,
)
