# SPDX-License-Identifier: MIT
import numpy as np
import pytest
import torch

from namedmask_kernels.ragged import Ragged, arrange, expect_finite, expect_int


def test_grids_inverts_pack():
    grids = [torch.randn(h, w, 3) for h, w in ((2, 3), (1, 1), (0, 5), (4, 2))]
    batch = Ragged.pack(grids)
    assert batch.offsets.tolist() == [0, 6, 7, 7, 15] and batch.offsets.dtype == torch.int32
    assert batch.shapes.tolist() == [[2, 3], [1, 1], [0, 5], [4, 2]]
    assert all(torch.equal(a, b) for a, b in zip(batch.grids(), grids, strict=True))
    assert batch.grids()[0].data_ptr() == batch.rows.data_ptr()  # views, not copies


def test_rows_and_shapes_that_do_not_match_raise():
    with pytest.raises(ValueError, match="shapes add up to 7 rows, but there are 6"):
        Ragged.of_shapes(torch.zeros(6), [(2, 3), (1, 1)])
    with pytest.raises(ValueError, match="grids must not be empty"):
        Ragged.pack([])
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


def test_pack_numpy_arrays():
    grids = [np.ones((2, 3, 4), np.float32)[::-1], np.zeros((1, 2, 4), ">f4")]
    batch = Ragged.pack(grids)
    assert isinstance(batch.rows, torch.Tensor) and batch.rows.dtype == torch.float32
    assert batch.shapes.tolist() == [[2, 3], [1, 2]] and batch.rows.sum() == 24


def test_grids_that_do_not_fit_together_raise():
    one = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match=r"Ragged.pack: grid 1 must be float32, but is float64"):
        Ragged.pack([one, one.double()])
    for other in (one[..., :2], one[0, 0], one.to("meta"), one[..., 0]):
        with pytest.raises(ValueError, match=r"Ragged.pack: all grids must be \[h, w, ...\] .* but grid 1 is "):
            Ragged.pack([one, other])
    with pytest.raises(TypeError, match=r"Ragged.pack: grid 0 must be a numpy array, a torch tensor .* but is list"):
        Ragged.pack([[[0.0]]])


def test_sizes_are_checked():
    rows = torch.zeros(6)
    for shape, message in (((-2, -3), "height must be at least 0"), ((2**31, 0), "height must be at most")):
        with pytest.raises(ValueError, match=f"Ragged: {message}"):
            Ragged.of_shapes(rows, [shape])
    with pytest.raises(TypeError, match=r"Ragged: width must be an integer, but is 1.5"):
        Ragged.of_shapes(rows, [(4, 1.5)])
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
