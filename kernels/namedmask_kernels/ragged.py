# SPDX-License-Identifier: MIT
"""`Ragged`, the packed batch that every operator takes, and the way from plain arrays to it and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Grids of different sizes, one after another, without padding.

    The one rule: photo b owns `rows[offsets[b] : offsets[b + 1]]`, exactly height * width rows in raster order. Rows
    that belong to no place in the grid (CLS and register tokens) are never in a Ragged; the operator that needs them
    (`attention_features`) takes bare sequences.

    rows:    [T, ...] any dtype, any device
    offsets: int32 [B + 1] on the CPU, from 0 to T
    shapes:  int32 [B, 2] on the CPU, (height, width) of each grid
    """

    rows: Tensor
    offsets: Tensor
    shapes: Tensor

    @classmethod
    def pack(cls, grids: Sequence[Tensor]) -> Ragged:
        """Packs grids [h_b, w_b, ...] of one dtype and device; at least one, since an empty list has no dtype."""
        if len(grids) == 0:
            raise ValueError("Ragged.pack: at least one grid is needed; an empty batch: Ragged.of_shapes(rows[:0], [])")
        return cls.of_shapes(torch.cat([g.flatten(0, 1) for g in grids]), [tuple(g.shape[:2]) for g in grids])

    @classmethod
    def of_shapes(cls, rows: Tensor, shapes: Sequence[tuple[int, int]]) -> Ragged:
        """Rows [T, ...] that are packed already, with the (height, width) of each grid."""
        ends = list(itertools.accumulate((h * w for h, w in shapes), initial=0))
        if ends[-1] != rows.shape[0]:
            raise ValueError(f"Ragged: shapes ask for {ends[-1]} rows, but there are {rows.shape[0]}")
        # By way of numpy: a quarter of the time that torch takes to read a list.
        offsets = torch.from_numpy(np.array(ends, np.int32))
        return cls(rows, offsets, torch.from_numpy(np.array(shapes, np.int32).reshape(-1, 2)))

    def grids(self) -> list[Tensor]:
        """The grids [h_b, w_b, ...], as views."""
        return [
            self.rows[begin:end].unflatten(0, (h, w))
            for begin, end, (h, w) in zip(
                self.offsets[:-1].tolist(), self.offsets[1:].tolist(), self.shapes.tolist(), strict=True
            )
        ]

    def with_rows(self, rows: Tensor) -> Ragged:
        """Other rows [T, ...] on the same grids."""
        return Ragged(rows, self.offsets, self.shapes)


Array = np.ndarray | Tensor
Restore = Callable[[Tensor], "Ragged | Array"]


def arrange(
    op: str, argument: str, value: Ragged | Array, row_dims: int, *, batches: bool = False
) -> tuple[Ragged, Restore]:
    """Any arrangement that an operator accepts -> (Ragged, the way back for results with one row per input row).

    value:    a Ragged with rows [T, *row]; or one grid [h, w, *row], numpy or torch; or, with `batches`, equal grids
              [B, h, w, *row]. `row` has `row_dims` dimensions.
    Errors:   TypeError / ValueError with the operator's and the argument's name.
    """
    if isinstance(value, Ragged):
        if value.rows.ndim != 1 + row_dims:
            raise ValueError(
                f"{op}: the rows of {argument} must have {1 + row_dims} dimensions, but are {list(value.rows.shape)}"
            )
        return value, value.with_rows
    if not isinstance(value, (np.ndarray, Tensor)):
        raise TypeError(
            f"{op}: {argument} must be a numpy array, a torch tensor or a Ragged, but is {type(value).__name__}"
        )
    grid = as_tensor(value) if isinstance(value, np.ndarray) else value
    shape = tuple(grid.shape)
    lead, row = shape[: len(shape) - row_dims], shape[len(shape) - row_dims :]
    if len(lead) == 2:
        count, (h, w) = 1, lead
    elif batches and len(lead) == 3:
        count, h, w = lead
    else:
        expected = " or ".join(str(n + row_dims) for n in ((2, 3) if batches else (2,)))
        raise ValueError(f"{op}: {argument} must have {expected} dimensions, but is {list(shape)}")
    ragged = Ragged.of_shapes(grid.reshape(count * h * w, *row), [(h, w)] * count)

    def restore(rows: Tensor) -> Array:
        result = rows.reshape(*lead, *rows.shape[1:])
        return result.numpy() if isinstance(value, np.ndarray) else result

    return ragged, restore


def pack_numpy(*grids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays [h, w, *row] of one photo as a packed batch of numpy arrays: the rows of each, offsets, shapes."""
    h, w = grids[0].shape[:2]
    rows = (np.ascontiguousarray(grid).reshape(h * w, *grid.shape[2:]) for grid in grids)
    return *rows, np.array((0, h * w), np.int32), np.array(((h, w),), np.int32)


def as_tensor(array: np.ndarray) -> Tensor:
    """A numpy array as a tensor, without a copy where torch can read it as it is."""
    # torch warns of arrays that must not be written to, such as np.asarray(a Pillow image): operators only read.
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def expect_dtype(op: str, argument: str, rows: Tensor, *dtypes: torch.dtype) -> None:
    """TypeError unless the tensor has one of the dtypes."""
    if rows.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {argument} must be {wanted}, but is {str(rows.dtype).removeprefix('torch.')}")


def expect_same_grids(op: str, argument: str, value: Ragged, other_argument: str, other: Ragged) -> None:
    """ValueError unless both batches have the same grids."""
    if value.shapes.shape != other.shapes.shape or not torch.equal(value.shapes, other.shapes):
        raise ValueError(
            f"{op}: {argument} and {other_argument} must be of the same height and width, "
            f"but are {value.shapes.tolist()[:4]} and {other.shapes.tolist()[:4]}"
        )


def expect_rows(op: str, offsets: Tensor, shapes: Tensor, *arrays: Tensor) -> None:
    """ValueError unless offsets and shapes, both on the CPU, fit each other and the rows of all arrays."""
    if offsets[:1].any() or shapes.prod(1).tolist() != offsets.diff().tolist():
        raise ValueError(f"{op}: offsets and shapes do not fit each other")
    for array in arrays:
        if len(array) != offsets[-1]:
            raise ValueError(f"{op}: offsets and shapes are of {offsets[-1]} rows, but an array has {len(array)}")
