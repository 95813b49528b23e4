# SPDX-License-Identifier: MIT
import numpy as np
import pytest
import torch

from namedmask_kernels.ragged import (
    MOST,
    Packed,
    Ragged,
    arrange,
    as_float,
    as_mask,
    as_tensor,
    expect_finite,
    expect_image,
    expect_int,
    expect_ints,
    expect_rows,
    expect_same_grids,
    image_of_row,
    is_sequence,
    pack_numpy,
)


def test_grids_inverts_pack():
    grids = [torch.randn(h, w, 3) for h, w in ((2, 3), (1, 1), (0, 5), (4, 2))]
    batch = Ragged.pack(grids)
    assert batch.offsets.tolist() == [0, 6, 7, 7, 15] and batch.offsets.dtype == torch.int32
    assert batch.shapes.tolist() == [[2, 3], [1, 1], [0, 5], [4, 2]]
    assert all(torch.equal(a, b) for a, b in zip(batch.grids(), grids, strict=True))
    assert batch.grids()[0].data_ptr() == batch.rows.data_ptr()  # views, not copies


def test_rows_and_shapes_that_do_not_match_raise():
    with pytest.raises(ValueError, match=r"shapes add up to 7 rows, but rows have shape \[6\]"):
        Ragged.of_shapes(torch.zeros(6), [(2, 3), (1, 1)])
    with pytest.raises(ValueError, match="grids must not be empty"):
        Ragged.pack([])
    with pytest.raises(ValueError, match=r"Ragged.with_rows: rows must be \[6, ...\], but are \[7, 2\]"):
        Ragged.of_shapes(torch.zeros(6), [(2, 3)]).with_rows(torch.zeros(7, 2))
    empty = Ragged.of_shapes(torch.zeros(0, 4), [])
    assert empty.grids() == [] and empty.offsets.tolist() == [0] and empty.shapes.shape == (0, 2)


@pytest.mark.parametrize("kind", ["torch", "numpy", "batch", "ragged"])
def test_restore_arranges_results_like_the_argument(kind):
    rows = torch.arange(24.0).reshape(12, 2)
    value = {
        "torch": rows.reshape(3, 4, 2),
        "numpy": rows.reshape(3, 4, 2).numpy(),
        "batch": rows.reshape(2, 2, 3, 2),
        "ragged": Ragged.of_shapes(rows, [(2, 2), (4, 2)]),
    }[kind]
    packed = arrange("op", "features", value, 1, torch.float32, batches=True)
    assert torch.equal(packed.rows, rows)
    back = packed.restore(packed.rows[:, 0])
    expected = {"torch": (3, 4), "numpy": (3, 4), "batch": (2, 2, 3), "ragged": None}[kind]
    if kind == "ragged":
        assert isinstance(back, Ragged) and torch.equal(back.offsets, value.offsets)
    else:
        assert type(back) is type(value) and tuple(back.shape) == expected


def test_non_contiguous_numpy_arrays():
    value = np.arange(24, dtype=np.float32).reshape(4, 6)[::-1, ::2]
    packed = arrange("op", "mask", value, 0, torch.float32)
    np.testing.assert_array_equal(packed.rows.numpy(), value.ravel())
    np.testing.assert_array_equal(packed.restore(packed.rows), value)


def test_rows_without_dimensions_raise():
    with pytest.raises(ValueError, match=r"Ragged: shapes add up to 1 rows, but rows have shape \[\]"):
        Ragged.of_shapes(torch.tensor(1.0), [(1, 1)])
    with pytest.raises(ValueError, match=r"Ragged.with_rows: rows must be \[1, ...\], but are \[\]"):
        Ragged.of_shapes(torch.ones(1), [(1, 1)]).with_rows(torch.tensor(1.0))


def test_pack_takes_any_iterable():
    grids = [torch.rand(2, 3), torch.rand(1, 4)]
    assert torch.equal(Ragged.pack(grid for grid in grids).rows, Ragged.pack(grids).rows)
    for value in (None, 3):
        with pytest.raises(TypeError, match=f"Ragged.pack: grids must be a list of arrays, but are {value}"):
            Ragged.pack(value)
    with pytest.raises(ValueError, match="grids must not be empty"):
        Ragged.pack(iter(()))


def test_pack_numpy_arrays():
    grids = [np.ones((2, 3, 4), np.float32)[::-1], np.zeros((1, 2, 4), ">f4")]
    batch = Ragged.pack(grids)
    assert isinstance(batch.rows, torch.Tensor) and batch.rows.dtype == torch.float32
    assert batch.shapes.tolist() == [[2, 3], [1, 2]] and batch.rows.sum() == 24


def test_grids_that_do_not_fit_together_raise():
    one = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match=r"Ragged.pack: grid 1 must be float32, but is float64"):
        Ragged.pack([one, one.double()])
    for other in (one[..., :2], one.to("meta"), one[..., 0]):
        with pytest.raises(ValueError, match=r"Ragged.pack: all grids must be \[h, w, ...\] .* but grid 1 is "):
            Ragged.pack([one, other])
    with pytest.raises(ValueError, match=r"Ragged.pack: grid 0 must be \[h, w, ...\], but has shape \[4\]"):
        Ragged.pack([one[0, 0]])


@pytest.mark.parametrize("value", [[0.0], Ragged.of_shapes(torch.zeros(1), [(1, 1)]), None, "rows"], ids=str)
def test_rows_and_grids_that_are_no_arrays_are_rejected(value):
    batch = Ragged.of_shapes(torch.zeros(1), [(1, 1)])
    message = f"must be a numpy array or a torch tensor, but is {type(value).__name__}"
    for name, call in (
        ("Ragged.pack: grid 0", lambda: Ragged.pack([value])),
        ("Ragged: rows", lambda: Ragged.of_shapes(value, [(1, 1)])),
        ("Ragged.with_rows: rows", lambda: batch.with_rows(value)),
    ):
        with pytest.raises(TypeError, match=f"^{name} {message}$"):
            call()


def test_rows_of_numpy_become_tensors():
    rows = np.arange(6.0)
    batch = Ragged.of_shapes(rows, [(2, 3)])
    for value in (batch, batch.with_rows(rows)):
        assert isinstance(value.rows, torch.Tensor) and value.grids()[0].tolist() == rows.reshape(2, 3).tolist()


def test_sizes_are_checked():
    rows = torch.zeros(6)
    for shape, message in (((-2, -3), "height must be at least 0"), ((2**31, 0), "height must be at most")):
        with pytest.raises(ValueError, match=f"Ragged: {message}"):
            Ragged.of_shapes(rows, [shape])
    with pytest.raises(TypeError, match=r"Ragged: width must be an integer, but is 1.5"):
        Ragged.of_shapes(rows, [(4, 1.5)])
    for shapes in ((2, 3), [(2, 3, 1)], [6], 6):
        with pytest.raises(TypeError, match="Ragged: shapes must be pairs of a height and a width, but are "):
            Ragged.of_shapes(rows, shapes)
    assert Ragged.of_shapes(rows, np.array([[2, 3]])).shapes.tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="at most 2147483647 rows, but has 2147483648"):
        Ragged.of_shapes(torch.zeros(1).expand(2**31), [(2**30, 2)])


@pytest.mark.parametrize("columns", [(), (2,)])
def test_values_that_are_not_finite_are_named_by_image(columns):
    offsets, finite = torch.tensor([0, 3, 3, 5]).int(), torch.ones(5, *columns, dtype=torch.bool)
    expect_finite("op", "x", finite, offsets)
    for row, image in ((0, 0), (2, 0), (3, 2), (4, 2)):
        broken = finite.clone()
        broken[row, ...] = False
        with pytest.raises(ValueError, match=f"op: x must be finite, but image {image + 7} holds NaN or Inf"):
            expect_finite("op", "x", broken, offsets, first=7)


def test_bounds_of_integers_are_inclusive():
    assert [expect_int("op", "x", value, 2, 5) for value in (2, 5)] == [2, 5]
    for value, message in ((1, "at least 2"), (6, "at most 5")):
        with pytest.raises(ValueError, match=f"op: x must be {message}, but is {value}"):
            expect_int("op", "x", value, 2, 5)


def test_only_the_expected_numbers_of_dimensions_are_accepted():
    cases = [
        ((2, 3), 0, False),
        ((2, 3), 1, False),
        ((2, 3, 4), 1, False),
        ((2, 3, 4, 5), 1, True),
        ((2,) * 5, 1, True),
    ]
    accepted = []
    for shape, row_dims, batches in cases:
        try:
            accepted.append(arrange("op", "x", torch.zeros(shape), row_dims, torch.float32, batches=batches).leading)
        except ValueError as error:
            accepted.append(str(error).partition("must have ")[2])
    assert accepted == [(2, 3), "3 dimensions, but has shape [2, 3]", (2, 3), (2, 3, 4),
                        "3 or 4 dimensions, but has shape [2, 2, 2, 2, 2]"]  # fmt: skip
    with pytest.raises(ValueError, match=r"op: x must have 3 dimensions, but has shape \[2, 3, 4, 5\]"):
        arrange("op", "x", torch.zeros(2, 3, 4, 5), 1, torch.float32)
    batch = arrange("op", "x", torch.zeros(2, 3, 4, 5), 1, torch.float32, batches=True)
    assert (
        batch.rows.shape == (24, 5) and batch.shapes.tolist() == [[3, 4]] * 2 and batch.offsets.tolist() == [0, 12, 24]
    )


def test_ragged_arguments_are_checked():
    batch = Ragged.of_shapes(torch.zeros(6, 2), [(2, 3)])
    for row_dims in (0, 2):
        message = rf"op: the rows of x must have {1 + row_dims} dimensions, but have shape \[6, 2\]"
        with pytest.raises(ValueError, match=message):
            arrange("op", "x", batch, row_dims, torch.float32)
    for field in ("offsets", "shapes"):
        with pytest.raises(ValueError, match="op: offsets and shapes of x must be on cpu"):
            arrange("op", "x", batch._replace(**{field: getattr(batch, field).to("meta")}), 1, torch.float32)
        with pytest.raises(TypeError, match="op: x must be a Ragged of tensors"):
            arrange("op", "x", batch._replace(**{field: getattr(batch, field).tolist()}), 1, torch.float32)


def test_pack_numpy_equals_pack():
    grids = np.arange(12).reshape(3, 4).T, np.arange(24).reshape(4, 3, 2)
    first, second, offsets, shapes = pack_numpy(*grids)
    batch = Ragged.pack([grids[0]])
    np.testing.assert_array_equal(first, batch.rows)
    np.testing.assert_array_equal(second, grids[1].reshape(12, 2))
    np.testing.assert_array_equal(pack_numpy(*grids[::-1])[1], first)
    for ours, theirs in ((offsets, batch.offsets), (shapes, batch.shapes)):
        assert ours.dtype == np.int32 and ours.tolist() == theirs.tolist()


def test_arrays_are_read_in_place_if_possible():
    array = np.arange(6.0)
    assert as_tensor("op", "x", array).data_ptr() == array.ctypes.data
    array.flags.writeable = False
    assert as_tensor("op", "x", array).data_ptr() != array.ctypes.data
    mask = torch.tensor([0, 1, 255], dtype=torch.uint8)
    assert as_mask(mask).tolist() == [False, True, True] and as_mask(mask > 1).tolist() == [False, False, True]


def test_numbers():
    assert [expect_int("op", "x", value) for value in (True, np.bool_(True), np.int8(3), MOST)] == [1, 1, 3, 2**31 - 1]
    assert expect_int("op", "x", 0) == 0
    for value in (-1, 2**31):
        with pytest.raises(ValueError, match="op: x must be at "):
            expect_int("op", "x", value)
    assert expect_ints("op", "x", range(3), most=3) == [0, 1, 2]
    for values in ([0, -1], [2**31]):
        with pytest.raises(ValueError, match="op: x must be at "):
            expect_ints("op", "x", values)
    with pytest.raises(ValueError, match="op: x must have at most 3 elements"):
        expect_ints("op", "x", range(4), most=3)
    with pytest.raises(TypeError, match="op: x must be a sequence of integers, but is 3"):
        expect_ints("op", "x", 3)
    values = [1, True, "ab", [1], (), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3]), range(3), None]
    assert list(map(is_sequence, values)) == [False, False, False, *[True] * 2, False, True, False, True, True, False]
    numbers = [0.5, 2, np.float32(0.5), 10**400, -(10**400), torch.tensor(2.0)]
    assert [as_float("op", "x", n) for n in numbers] == [0.5, 2.0, 0.5, np.inf, -np.inf, 2.0]
    for value in ("1", None, 1j, [1.0], torch.ones(2)):
        with pytest.raises(TypeError, match="op: x must be a number, but is "):
            as_float("op", "x", value)


def packed(name: str, *shapes: tuple[int, int], device: str = "cpu", leading=None) -> Packed:
    rows = torch.zeros(sum(h * w for h, w in shapes), device=device)
    return Packed(name, None, leading, *Ragged.of_shapes(rows, shapes))


def test_grids_of_two_arguments_are_compared():
    one = packed("one", (2, 3))
    expect_same_grids("op", one, packed("two", (2, 3)))
    expect_same_grids("op", packed("one", (2, 3), leading=(2, 3)), packed("two", (2, 3)))
    expect_same_grids("op", packed("one", (2, 3), leading=(2, 3)), packed("two", (2, 3), leading=(2, 3)))
    with pytest.raises(ValueError, match="op: one must be on meta, like two, but is on cpu"):
        expect_same_grids("op", one, packed("two", (2, 3), device="meta"))
    for ours, theirs, sizes in (
        (one, packed("two", (3, 2)), r"\[\[2, 3\]\] and \[\[3, 2\]\]"),
        (one, packed("two", (2, 3), (1, 1)), r"\[\[2, 3\]\] and \[\[2, 3\], \[1, 1\]\]"),
        (packed("one", (2, 3), leading=(2, 3)), packed("two", (3, 2), leading=(3, 2)), r"\[2, 3\] and \[3, 2\]"),
        (packed("one", (2, 3), leading=(2, 3)), packed("two", (3, 2)), r"\[2, 3\] and \[\[3, 2\]\]"),
        (packed("one", *[(1, 1)] * 6), one, r"\[\[1, 1\], \[1, 1\], \[1, 1\], \[1, 1\]\] and "),
    ):
        with pytest.raises(ValueError, match=f"must have the same height and width, but have {sizes}"):
            expect_same_grids("op", ours, theirs)


def test_images_are_checked():
    image, like = torch.zeros(2, 3, 3, dtype=torch.uint8), packed("mask", (2, 3), leading=(2, 3))
    assert expect_image("op", image.permute(1, 0, 2).contiguous().permute(1, 0, 2), like).is_contiguous()
    with pytest.raises(ValueError, match="op: image must have 3 channels, but has 4"):
        expect_image("op", torch.zeros(2, 3, 4, dtype=torch.uint8), like)
    with pytest.raises(ValueError, match=r"op: image and mask must have the same height .* \[3, 2\] and \[2, 3\]"):
        expect_image("op", image.transpose(0, 1), like)


def test_offsets_and_shapes_are_checked():
    offsets, shapes = torch.tensor([0, 6, 6, 8]), torch.tensor([[2, 3], [0, 5], [1, 2]])
    expect_rows("op", offsets, shapes, torch.zeros(8), torch.zeros(8, 2))
    assert [image_of_row(row, offsets) for row in (0, 5, 6, 7)] == [0, 0, 2, 2]
    for changed, sizes, rows, message in (
        ([0, 6, 8], shapes, 8, "3 shapes require 4 offsets, but there are 3"),
        ([1, 6, 6, 8], shapes, 8, "offsets must run from 0 to the 8 rows, but run from 1 to 8"),
        ([0, 6, 6, 8], shapes, 9, "offsets must run from 0 to the 9 rows, but run from 0 to 8"),
        ([0, 5, 6, 8], shapes, 8, "image 0 has shape 2 x 3 but owns rows 0 to 5"),
        ([0, 6, 6, 8], shapes * torch.tensor([1, 1, -1])[:, None], 8, "image 2 has shape -1 x -2 but owns rows 6 to 8"),
    ):
        with pytest.raises(ValueError, match=f"op: {message}"):
            expect_rows("op", torch.tensor(changed), sizes, torch.zeros(rows))
