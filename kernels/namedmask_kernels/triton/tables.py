# SPDX-License-Identifier: MIT
"""What the launchers share: the tables that tell a thread block its place in a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor


def block_table(offsets: Tensor, size: int, taps: list[int] | None = None) -> Tensor:
    """Blocks of `size` tokens of every sequence: its first token, its length, the block's first token in it. With
    `taps`, only the blocks that hold one.

    offsets: int32 [B + 1] on the CPU -> int32 [blocks, 3] on the CPU. Blocks of long sequences come first, so that the
    last ones to finish are short.
    """
    lengths, order = offsets.diff().sort(descending=True, stable=True)
    counts = (lengths + size - 1) // size
    if taps is not None:
        held = torch.tensor(sorted({tap // size for tap in taps}), dtype=torch.int32)
        counts = (lengths > 0) * len(held)
    block = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    first = size * (block if taps is None else held[block])
    columns = offsets[:-1][order].repeat_interleave(counts), lengths.repeat_interleave(counts), first
    return torch.stack([column.to(torch.int32) for column in columns], 1)


def to_device(table: Tensor, like: Tensor) -> Tensor:
    """A table from the CPU beside `like`; pinned, so that the copy does not wait for the stream."""
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table
