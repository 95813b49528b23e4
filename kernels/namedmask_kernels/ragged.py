# SPDX-License-Identifier: MIT
"""`Ragged`, the packed batch that every operator accepts, and the argument checks that the operators share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Ragged(NamedTuple):
    """A batch of grids of different sizes, concatenated without padding.

    Image b owns ``rows[offsets[b] : offsets[b + 1]]``: exactly height * width rows in raster order. Rows that have no
    place in the grid (CLS and register tokens) are never part of a Ragged; the operator that needs them
    (`attention_features`) takes packed sequences instead.

    Attributes:
        rows: [T, ...], any dtype, any device.
        offsets: int32 [B + 1] on the CPU, from 0 to T.
        shapes: int32 [B, 2] on the CPU, the (height, width) of each grid.
    """

    rows: Tensor
    offsets: Tensor
    shapes: Tensor

    @classmethod
    def pack(cls, grids: Sequence[Tensor]) -> Ragged:
        """Packs grids [h_b, w_b, ...] of one dtype and device.

        Raises:
            ValueError: If `grids` is empty, since an empty list has no dtype. For an empty batch call
                ``Ragged.of_shapes(rows[:0], [])``.
        """
        if len(grids) == 0:
            raise ValueError(
                "Ragged.pack: grids must not be empty; for an empty batch call Ragged.of_shapes(rows[:0], [])"
            )
        shapes = [(grid.shape[0], grid.shape[1]) for grid in grids]
        return cls.of_shapes(torch.cat([grid.flatten(0, 1) for grid in grids]), shapes)

    @classmethod
    def of_shapes(cls, rows: Tensor, shapes: Sequence[tuple[int, int]]) -> Ragged:
        """Wraps rows [T, ...] that are already packed, given the (height, width) of each grid.

        Raises:
            ValueError: If the shapes do not add up to T rows.
        """
        ends = list(itertools.accumulate((h * w for h, w in shapes), initial=0))
        if ends[-1] != rows.shape[0]:
            raise ValueError(f"Ragged: shapes add up to {ends[-1]} rows, but there are {rows.shape[0]}")
        # Going through numpy takes a quarter of the time that torch needs to read a list.
        offsets = torch.from_numpy(np.array(ends, np.int32))
        return cls(rows, offsets, torch.from_numpy(np.array(shapes, np.int32).reshape(-1, 2)))

    def grids(self) -> list[Tensor]:
        """Returns the grids [h_b, w_b, ...] as views."""
        return [
            self.rows[begin:end].unflatten(0, (h, w))
            for begin, end, (h, w) in zip(
                self.offsets[:-1].tolist(), self.offsets[1:].tolist(), self.shapes.tolist(), strict=True
            )
        ]

    def with_rows(self, rows: Tensor) -> Ragged:
        """Returns a batch with the same grids and other rows [T, ...]."""
        return Ragged(rows, self.offsets, self.shapes)


Array = np.ndarray | Tensor
# What an operator accepts; the result has the same kind and arrangement.
Batch = TypeVar("Batch", bound=Ragged | np.ndarray | Tensor)


@dataclasses.dataclass
class Packed(Generic[Batch]):
    """An operator's argument as a packed batch.

    Attributes:
        name: The argument's name, for error messages.
        value: The argument as the caller passed it.
        leading: The dimensions of the value before those of a row, (h, w) or (B, h, w); None for a Ragged.
        rows: [T, *row]
        offsets: int32 [B + 1] on the CPU.
        shapes: int32 [B, 2] on the CPU.
    """

    name: str
    value: Batch
    leading: tuple[int, ...] | None
    rows: Tensor
    offsets: Tensor
    shapes: Tensor

    def restore(self, rows: Tensor) -> Batch:
        """Arranges results, one row per input row, like the argument: a Ragged, a tensor or a numpy array."""
        if self.leading is None:
            return cast(Batch, Ragged(rows, self.offsets, self.shapes))
        grid = rows.reshape(self.leading + rows.shape[1:])
        return cast(Batch, grid.numpy() if isinstance(self.value, np.ndarray) else grid)


def arrange(
    op: str, name: str, value: Batch, row_dims: int, *dtypes: torch.dtype, batches: bool = False
) -> Packed[Batch]:
    """Packs an argument of an operator, in any arrangement that the operator accepts.

    Args:
        op: Name of the operator, for error messages.
        name: Name of the argument, for error messages.
        value: A Ragged with rows [T, *row]; or one grid [h, w, *row], numpy or torch; or, with `batches`, grids of
            equal size [B, h, w, *row].
        row_dims: Number of dimensions of `row`.
        dtypes: The accepted dtypes.
        batches: Whether the operator accepts a batch of equal grids.

    Raises:
        TypeError: If the value is of another kind or dtype.
        ValueError: If it has another number of dimensions.
    """
    if isinstance(value, Ragged):
        if value.rows.ndim != 1 + row_dims:
            raise ValueError(
                f"{op}: the rows of {name} must have {1 + row_dims} dimensions, but have shape {list(value.rows.shape)}"
            )
        expect_dtype(op, name, value.rows, *dtypes)
        return Packed(name, value, None, *value)
    grid = value if isinstance(value, Tensor) else as_tensor(op, name, value)
    shape = tuple(grid.shape)
    dims = len(shape) - row_dims
    leading = shape[:dims]
    if dims == 2:
        count, (h, w) = 1, leading
    elif batches and dims == 3:
        count, h, w = leading
    else:
        expected = " or ".join(str(n + row_dims) for n in ((2, 3) if batches else (2,)))
        raise ValueError(f"{op}: {name} must have {expected} dimensions, but has shape {list(shape)}")
    expect_dtype(op, name, grid, *dtypes)
    rows = grid.reshape(count * h * w, *shape[dims:])
    return Packed(name, value, leading, *Ragged.of_shapes(rows, [(h, w)] * count))


def pack_numpy(*grids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Packs arrays [h, w, *row] of one image without torch: the rows of each, offsets, shapes."""
    h, w = grids[0].shape[:2]
    rows = (np.ascontiguousarray(grid).reshape(h * w, *grid.shape[2:]) for grid in grids)
    return *rows, np.array((0, h * w), np.int32), np.array(((h, w),), np.int32)


def as_tensor(op: str, name: str, value: object) -> Tensor:
    """Returns a tensor as it is, and a numpy array as a tensor, without a copy if torch can read it in place.

    Raises:
        TypeError: If the value is neither.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{op}: {name} must be a numpy array, a torch tensor or a Ragged, but is {type(value).__name__}"
        )
    # torch warns about read-only arrays such as np.asarray(pillow_image). The operators never write to their inputs,
    # but the warning would reach the user.
    array = np.ascontiguousarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


# -- argument checks: the messages name the operator, the argument, what was expected and what came -------------------


def expect_dtype(op: str, name: str, rows: Tensor, *dtypes: torch.dtype) -> None:
    """Raises TypeError unless the tensor has one of the dtypes."""
    if rows.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, but is {str(rows.dtype).removeprefix('torch.')}")


def expect_same_grids(op: str, one: Packed[Any], other: Packed[Any]) -> None:
    """Raises ValueError unless two arguments are on the same device and have the same grids."""
    if one.rows.device != other.rows.device:
        raise ValueError(
            f"{op}: {one.name} must be on {other.rows.device}, like {other.name}, but is on {one.rows.device}"
        )
    if one.leading and other.leading:  # reads no tensor, so torch.compile can trace it
        same = one.leading == other.leading
    else:
        same = one.shapes.shape == other.shapes.shape and torch.equal(one.shapes, other.shapes)
    if not same:
        sizes = [list(packed.leading or packed.shapes.tolist()[:4]) for packed in (one, other)]
        raise ValueError(
            f"{op}: {one.name} and {other.name} must have the same height and width, but have {sizes[0]} and {sizes[1]}"
        )


def expect_image(op: str, image: Ragged | Array, like: Packed[Any]) -> Tensor:
    """Returns the pixels, contiguous uint8 [P, 3], of an RGB image that has the grids and the device of `like`.

    Raises:
        TypeError: If the image is not a uint8 array, tensor or Ragged.
        ValueError: If it has another shape or is on another device.
    """
    packed = arrange(op, "image", image, 1, torch.uint8)
    if packed.rows.shape[1] != 3:
        raise ValueError(f"{op}: image must have 3 channels, but has {packed.rows.shape[1]}")
    expect_same_grids(op, packed, like)
    return packed.rows.contiguous()


def expect_finite(op: str, name: str, finite: Tensor, offsets: Tensor, first: int = 0) -> None:
    """Raises ValueError naming the first image with values that are not finite; waits for the GPU.

    Args:
        op: Name of the operator.
        name: Name of the argument.
        finite: bool [T] or [T, C], which values are finite.
        offsets: int32 [B + 1] on the CPU.
        first: Number that the first image of `offsets` has in the caller's batch.
    """
    if not finite.all():
        row = int(finite.flatten(1).all(1).byte().argmin()) if finite.ndim > 1 else int(finite.byte().argmin())
        raise not_finite(op, name, first + int(torch.searchsorted(offsets, row, right=True)) - 1)


def not_finite(op: str, name: str, image: int) -> ValueError:
    """The error for an image with values that are not finite."""
    return ValueError(f"{op}: {name} must be finite, but image {image} holds NaN or Inf")


def expect_rows(op: str, offsets: Tensor, shapes: Tensor, *arrays: Tensor) -> None:
    """Raises ValueError unless offsets and shapes, both on the CPU, match each other and the rows of all arrays."""
    bounds, sizes = offsets.tolist(), shapes.tolist()
    if len(bounds) != len(sizes) + 1:
        raise ValueError(f"{op}: {len(sizes)} shapes require {len(sizes) + 1} offsets, but there are {len(bounds)}")
    for array in arrays:
        if bounds[0] != 0 or bounds[-1] != len(array):
            raise ValueError(
                f"{op}: offsets must run from 0 to the {len(array)} rows, but run from {bounds[0]} to {bounds[-1]}"
            )
    for image, ((begin, end), (h, w)) in enumerate(zip(itertools.pairwise(bounds), sizes, strict=True)):
        if h < 0 or w < 0 or end - begin != h * w:
            raise ValueError(f"{op}: image {image} has shape {h} x {w} but owns rows {begin} to {end}")
