# SPDX-License-Identifier: MIT
"""`Ragged`, the packed batch that every operator accepts, and the argument checks that the operators share."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASK = (torch.bool, torch.uint8)
MOST = 2**31 - 1  # the largest int32: offsets, and the counts that an operator takes


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
    def pack(cls, grids: Iterable[Array]) -> Ragged:
        """Packs grids [h_b, w_b, ...] (torch or numpy) of one dtype and device. The rows are a tensor.

        Raises:
            TypeError: If `grids` are no iterable of tensors and numpy arrays, or their dtypes differ.
            ValueError: If a grid differs from the first in anything but height and width; or if `grids` is empty, since
                an empty list has no dtype. For an empty batch call ``Ragged.of_shapes(rows[:0], [])``.
        """
        if not isinstance(grids, Iterable):
            raise TypeError(f"Ragged.pack: grids must be a list of arrays, but are {grids!r}")
        tensors = [as_tensor("Ragged.pack", f"grid {b}", grid, ARRAYS) for b, grid in enumerate(grids)]
        if not tensors:
            raise ValueError(
                "Ragged.pack: grids must not be empty; for an empty batch call Ragged.of_shapes(rows[:0], [])"
            )
        first = tensors[0]
        for b, grid in enumerate(tensors):
            if grid.ndim < 2:
                raise ValueError(f"Ragged.pack: grid {b} must be [h, w, ...], but has shape {list(grid.shape)}")
            expect_dtype("Ragged.pack", f"grid {b}", grid, first.dtype)
            if grid.shape[2:] != first.shape[2:] or grid.device != first.device:
                raise ValueError(
                    f"Ragged.pack: all grids must be [h, w, ...] with the channels and the device of the first, which "
                    f"is {list(first.shape)} on {first.device}, but grid {b} is {list(grid.shape)} on {grid.device}"
                )
        shapes = [(grid.shape[0], grid.shape[1]) for grid in tensors]
        return cls.of_shapes(torch.cat([grid.flatten(0, 1) for grid in tensors]), shapes)

    @classmethod
    def of_shapes(cls, rows: Array, shapes: Sequence[tuple[int, int]]) -> Ragged:
        """Wraps rows [T, ...] (torch or numpy) that are already packed, given the (height, width) of each grid.

        Raises:
            TypeError: If the rows are not an array, or a shape is not a pair of integers.
            ValueError: If the shapes do not add up to T rows, one is negative, or there are more than 2^31 - 1 rows.
        """
        rows = as_tensor("Ragged", "rows", rows, ARRAYS)
        try:
            pairs = [(h, w) for h, w in shapes]
        except (TypeError, ValueError):
            raise TypeError(
                f"Ragged: shapes must be pairs of a height and a width, but are {reprlib.repr(shapes)}"
            ) from None
        sizes = [(expect_int("Ragged", "height", h), expect_int("Ragged", "width", w)) for h, w in pairs]
        total = sum(h * w for h, w in sizes)
        if rows.shape[:1] != (total,):
            raise ValueError(f"Ragged: shapes add up to {total} rows, but rows have shape {list(rows.shape)}")
        return cls(rows, *packed_shapes(sizes))

    def grids(self) -> list[Tensor]:
        """Returns the grids [h_b, w_b, ...] as views."""
        return [
            self.rows[begin:end].unflatten(0, (h, w))
            for begin, end, (h, w) in zip(
                self.offsets[:-1].tolist(), self.offsets[1:].tolist(), self.shapes.tolist(), strict=True
            )
        ]

    def with_rows(self, rows: Array) -> Ragged:
        """Returns a batch with the same grids and other rows [T, ...] (torch or numpy).

        Raises:
            TypeError: If the rows are not an array.
            ValueError: If the number of rows differs.
        """
        rows = as_tensor("Ragged.with_rows", "rows", rows, ARRAYS)
        if rows.shape[:1] != self.rows.shape[:1]:
            raise ValueError(f"Ragged.with_rows: rows must be [{self.rows.shape[0]}, ...], but are {list(rows.shape)}")
        return Ragged(rows, self.offsets, self.shapes)


def packed_shapes(shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The offsets int32 [B + 1] and shapes int32 [B, 2] of grids (height, width), on the CPU.

    Raises:
        ValueError: If there are more than 2^31 - 1 rows.
    """
    ends = list(itertools.accumulate((h * w for h, w in shapes), initial=0))
    if ends[-1] > MOST:
        raise ValueError(f"Ragged: a batch may have at most {MOST} rows, but has {ends[-1]}")
    if torch.compiler.is_compiling():  # numpy would bind the graph to these sizes, which may be symbols
        sides = torch.tensor([side for shape in shapes for side in shape], dtype=torch.int32, device="cpu")
        return torch.tensor(ends, dtype=torch.int32, device="cpu"), sides.reshape(-1, 2)
    # Going through numpy takes a quarter of the time that torch needs to read a list.
    offsets = torch.from_numpy(np.array(ends, np.int32))
    return offsets, torch.from_numpy(np.array(shapes, np.int32).reshape(-1, 2))


Array = np.ndarray | Tensor
ARRAYS = "a numpy array or a torch tensor"
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
        if not all(isinstance(part, Tensor) for part in value):
            raise TypeError(f"{op}: {name} must be a Ragged of tensors; Ragged.pack makes one from numpy arrays")
        rows, offsets, shapes = value
        expect_dense(op, f"the rows of {name}", rows)
        if offsets.device.type != "cpu" or shapes.device.type != "cpu":
            raise ValueError(f"{op}: offsets and shapes of {name} must be on cpu, also where its rows are on a GPU")
        expect_dtype(op, f"offsets of {name}", offsets, torch.int32)
        expect_dtype(op, f"shapes of {name}", shapes, torch.int32)
        if shapes.ndim != 2 or shapes.shape[1] != 2 or offsets.shape != (shapes.shape[0] + 1,):
            raise ValueError(
                f"{op}: offsets of {name} must be [B + 1] and shapes [B, 2], but are {list(offsets.shape)} and "
                f"{list(shapes.shape)}"
            )
        if rows.ndim != 1 + row_dims:
            raise ValueError(
                f"{op}: the rows of {name} must have {1 + row_dims} dimensions, but have shape {list(rows.shape)}"
            )
        expect_dtype(op, name, rows, *dtypes)
        return Packed(name, value, None, rows, offsets.contiguous(), shapes.contiguous())
    grid = as_tensor(op, name, value)
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


def as_tensor(op: str, name: str, value: object, kinds: str = "a numpy array, a torch tensor or a Ragged") -> Tensor:
    """Returns a tensor as it is, and a numpy array as a tensor, without a copy if torch can read it in place.

    Args:
        op: Name of the operator, for error messages.
        name: Name of the argument, for error messages.
        value: The argument.
        kinds: What the caller accepts, for error messages.

    Raises:
        TypeError: If the value is neither, a sparse or nested tensor, a masked array or of a dtype that torch does not
            have.
    """
    if isinstance(value, Tensor):
        expect_dense(op, name, value)
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{op}: {name} must be {kinds}, but is {type(value).__name__}")
    if torch.compiler.is_compiling():  # its numpy arrays are tensors, without byte order and flags
        return torch.as_tensor(value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} must not be a masked array; replace masked elements with .filled(value) first")
    # torch warns about read-only arrays such as np.asarray(pillow_image). The operators never write to their inputs,
    # but the warning would reach the user.
    array = np.require(value, value.dtype.newbyteorder("="), ("C_CONTIGUOUS", "ALIGNED"))
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError:
        raise TypeError(f"{op}: {name} must have a dtype that torch supports, but is {value.dtype}") from None


def as_mask(mask: Tensor) -> Tensor:
    """Returns a binary mask, bool or uint8, as bool: any nonzero value is true."""
    return mask if mask.dtype == torch.bool else mask != 0


# -- argument checks: the messages name the operator, the argument, what was expected and what came -------------------


def expect_dense(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for a sparse or nested tensor."""
    if tensor.is_nested:
        raise TypeError(f"{op}: {name} must not be a nested tensor; Ragged.pack(tensor.unbind()) makes a batch of it")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, but is {tensor.layout}; call .to_dense() first")


def expect_dtype(op: str, name: str, rows: Tensor, *dtypes: torch.dtype) -> None:
    """Raises TypeError unless the tensor has one of the dtypes."""
    if rows.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, but is {str(rows.dtype).removeprefix('torch.')}")


def expect_int(op: str, name: str, value: object, low: int = 0, high: int = MOST) -> int:
    """Returns an integer argument as an int, whether Python's, numpy's or another type with ``__index__``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below `low` or above `high`.
    """
    if type(value) is not int:
        try:
            value = operator.index(bool(value) if isinstance(value, np.bool_) else cast(Any, value))
        except TypeError:
            raise TypeError(f"{op}: {name} must be an integer, but is {value!r}") from None
    if value < low:
        raise ValueError(f"{op}: {name} must be at least {low}, but is {value}")
    if value > high:
        raise ValueError(f"{op}: {name} must be at most {high}, but is {value}")
    return value


def is_sequence(value: object) -> bool:
    """Whether an argument is several numbers; a numpy array or tensor without dimensions is one number."""
    return not isinstance(value, (int, float, str)) and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) > 0


def expect_ints(op: str, name: str, values: object, low: int = 0, high: int = MOST, most: int = MOST) -> list[int]:
    """Returns a sequence of at most `most` integers as a list; stops at the first invalid one.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If there are more than `most`, or one is below `low` or above `high`.
    """
    try:
        items = iter(cast(Any, values))
    except TypeError:
        raise TypeError(f"{op}: {name} must be a sequence of integers, but is {values!r}") from None
    numbers = [expect_int(op, name, value, low, high) for value in itertools.islice(items, most)]
    if next(items, None) is not None:
        raise ValueError(f"{op}: {name} must have at most {most} elements")
    return numbers


def as_float(op: str, name: str, value: object) -> float:
    """Returns a number as a float; integers beyond the range of floats become infinite.

    Raises:
        TypeError: If it is not a number.
    """
    if type(value) is float:
        return value
    try:
        # Not a string. torch.compile before torch 2.14 cannot ask a symbolic integer for its attributes.
        if not isinstance(value, int) and not hasattr(value, "__float__"):
            raise TypeError
        return float(cast(Any, value))
    except OverflowError:
        return math.inf if cast(Any, value) > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a number, but is {value!r}") from None


def expect_per_image(op: str, name: str, value: object, batch: Ragged | Array) -> list[Any]:
    """Returns a setting that is one number for all images of a batch, or one for each, as a list of one or all values.

    Raises:
        ValueError: If there is another number of values.
    """
    return expect_one_per_image(op, name, cast(Any, value), batch) if is_sequence(value) else [value]


def expect_one_per_image(
    op: str, name: str, values: Iterable[Any], batch: Ragged | Array, kind: str = "number"
) -> list[Any]:
    """Returns values as a list. Raises ValueError unless there is one for each image."""
    listed, images = list(values), image_count(batch)
    if len(listed) != images:
        raise ValueError(
            f"{op}: {name} must be one {kind}, or one for each of the {images} images, but has {len(listed)}"
        )
    return listed


def image_count(batch: Ragged | Array) -> int:
    """The number of images of an argument."""
    return len(batch.shapes) if isinstance(batch, Ragged) else 1


@torch.library.custom_op("namedmask_kernels::same_shapes", mutates_args=())
def _same_shapes(one: Tensor, other: Tensor, op: str, one_name: str, other_name: str) -> Tensor:
    """The comparison of `expect_same_grids` under torch.compile, which cannot branch on the values of a tensor."""
    if one.shape != other.shape or not torch.equal(one, other):
        raise _different_grids(op, one_name, other_name, one.tolist()[:4], other.tolist()[:4])
    return other.clone()


@_same_shapes.register_fake
def _(one: Tensor, other: Tensor, op: str, one_name: str, other_name: str) -> Tensor:
    return torch.empty_like(other)


def _different_grids(op: str, one: str, other: str, one_size: list[Any], other_size: list[Any]) -> ValueError:
    return ValueError(
        f"{op}: {one} and {other} must have the same height and width, but have {one_size} and {other_size}"
    )


def expect_same_grids(op: str, one: Packed[Any], other: Packed[Any]) -> None:
    """Raises ValueError unless two arguments are on the same device and have the same grids and number of rows."""
    if one.rows.device != other.rows.device:
        raise ValueError(
            f"{op}: {one.name} must be on {other.rows.device}, like {other.name}, but is on {one.rows.device}"
        )
    if one.leading and other.leading:
        if one.leading != other.leading:
            raise _different_grids(op, one.name, other.name, list(one.leading), list(other.leading))
    elif torch.compiler.is_compiling():
        # The operator depends on the result, so the check is not removed as dead code.
        other.shapes = _same_shapes(one.shapes, other.shapes, op, one.name, other.name)
    elif one.shapes.shape != other.shapes.shape or not torch.equal(one.shapes, other.shapes):
        sizes = [list(packed.leading or packed.shapes.tolist()[:4]) for packed in (one, other)]
        raise _different_grids(op, one.name, other.name, *sizes)
    if one.rows.shape[0] != other.rows.shape[0]:
        raise ValueError(
            f"{op}: {one.name} and {other.name} must have the same number of rows, but have {one.rows.shape[0]} and "
            f"{other.rows.shape[0]}"
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
        raise not_finite(op, name, first + image_of_row(row, offsets))


def image_of_row(row: int, offsets: Tensor) -> int:
    """The image that a row of a packed batch belongs to, by offsets int32 [B + 1] on the CPU."""
    return int(torch.searchsorted(offsets, row, right=True)) - 1


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
