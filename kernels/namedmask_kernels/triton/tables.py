# SPDX-License-Identifier: MIT
"""The tables that tell a thread block which part of a packed batch it works on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Variant(NamedTuple):
    """A kernel as its launcher calls it, for compilation ahead of time.

    Attributes:
        label: Its name and what distinguishes it from the kernel's other variants.
        kernel: The function that `triton.jit` returned.
        types: The types of its arguments, as Triton writes them.
        constants: The values of its tl.constexpr arguments.
        options: Compiler options.
        archs: The compute capabilities that it runs on.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    archs: tuple[int, ...] = (80, 90)


MOST_BLOCKS = 2**16 - 1  # along the second axis of a grid; CUDA's limit


def expect_blocks(op: str, name: str, size: int, each: int = 1) -> None:
    """Raises ValueError if a dimension of `size` has more blocks of `each` than the second axis of a grid."""
    if size > each * MOST_BLOCKS:
        raise ValueError(f"{op}: {name} must be at most {each * MOST_BLOCKS} on a GPU, but are {size}")


def table_on_device(build: Callable[..., np.ndarray], like: Tensor, *arguments: Tensor | Hashable) -> Tensor:
    """The table that `build` returns for the arguments, on the device of `like`, for use on the current stream.

    The next calls with equal arguments get the same table: all blocks of a network ask for the same ones. Every stream
    has its own, so that a table is neither read before its copy nor overwritten after its last use.

    Args:
        build: A function of a module, not one that is made for each call.
        like: Any tensor on the device.
        arguments: Those of `build`. An int32 tensor on the CPU reaches it as a flat array.
    """
    key = tuple(x.numpy().tobytes() if isinstance(x, Tensor) else x for x in arguments)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _table(build, key, like.device, stream)


@functools.lru_cache(maxsize=64)
def _table(build: Callable[..., np.ndarray], key: tuple[Hashable, ...], device: torch.device, stream: int) -> Tensor:
    table = torch.from_numpy(build(*(np.frombuffer(x, np.int32) if isinstance(x, bytes) else x for x in key)))
    # From pinned memory, so that the copy does not wait for the stream.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def block_table(offsets: np.ndarray, size: int, taps: tuple[int, ...] | None = None) -> np.ndarray:
    """Splits every sequence into blocks of `size` tokens. Blocks of long sequences come first, so that the last ones to
    finish are short.

    Args:
        offsets: int32 [B + 1].
        size: Tokens per block.
        taps: If not None, only the blocks that contain one of these positions of their sequence.

    Returns:
        int32 [blocks, 3]: the first token of the sequence, its length, the block's first token in it.
    """
    lengths = np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = offsets[:-1][order], lengths[order]
    if taps is None:
        counts, first = blocks_of(lengths, size)
    else:
        tapped = np.unique(np.array(taps, np.int64) // size) * size
        counts = np.where(lengths > 0, len(tapped), 0)
        first = np.tile(tapped, np.count_nonzero(lengths))
    return np.stack([begins.repeat(counts), lengths.repeat(counts), first], 1).astype(np.int32)


def blocks_of(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits sequences into blocks of `size` elements: their number for each sequence, and the first element of each
    block in its sequence.
    """
    counts = -(-lengths.astype(np.int64) // size)
    ends = counts.cumsum()
    return counts, size * (np.arange(counts.sum()) - (ends - counts).repeat(counts))
