# SPDX-License-Identifier: MIT
"""The tables that tell a thread block which part of a packed batch it works on."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def block_table(offsets: Tensor, size: int, taps: list[int] | None = None) -> Tensor:
    """Splits every sequence into blocks of `size` tokens. Blocks of long sequences come first, so that the last ones to
    finish are short.

    Args:
        offsets: int32 [B + 1] on the CPU.
        size: Tokens per block.
        taps: If not None, only the blocks that contain one of these positions of their sequence.

    Returns:
        int32 [blocks, 3] on the CPU: the first token of the sequence, its length, the block's first token in it.
    """
    lengths, order = offsets.diff().sort(descending=True, stable=True)
    counts = (lengths + size - 1) // size
    if taps is not None:
        tapped = torch.tensor(sorted({tap // size for tap in taps}), dtype=torch.int32, device="cpu")
        counts = (lengths > 0) * len(tapped)
    block = torch.arange(int(counts.sum()), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    first = size * (block if taps is None else tapped[block])
    columns = offsets[:-1][order].repeat_interleave(counts), lengths.repeat_interleave(counts), first
    return torch.stack([column.to(torch.int32) for column in columns], 1)


def to_device(table: Tensor, like: Tensor) -> Tensor:
    """Copies a table to the device of `like`; from pinned memory, so that the copy does not wait for the stream."""
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table
