# SPDX-License-Identifier: MIT
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import ndimage

import namedmask_kernels as nk
from namedmask_kernels import Ragged

BACKENDS = ["cpu", "cuda", "reference"]
STRUCTURES = {4: None, 8: np.ones((3, 3))}  # scipy's, by connectivity
connectivities = pytest.mark.parametrize("connectivity", STRUCTURES)
MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70))


def random_masks(seed, shapes, density=0.6):
    rng = np.random.default_rng(seed)
    return [rng.random(shape) < density for shape in shapes]


@connectivities
@settings(max_examples=30)
@given(mask=MASKS)
def test_labels_equal_scipy(backend, device, connectivity, mask):
    expected, count = ndimage.label(mask, STRUCTURES[connectivity])
    result = nk.connected_components(torch.from_numpy(mask).to(device), connectivity=connectivity, backend=backend)
    assert all(x.dtype == torch.int32 and x.device.type == device for x in result)
    result = nk.Components(*(x.cpu().numpy() for x in result))
    np.testing.assert_array_equal(result.labels, expected)
    np.testing.assert_array_equal(result.areas, np.bincount(expected.ravel(), minlength=count + 1)[1:])
    objects = ndimage.find_objects(expected) if count else []
    boxes = [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in objects]
    np.testing.assert_array_equal(result.boxes, np.array(boxes, np.int32).reshape(-1, 4))
    np.testing.assert_array_equal(result.offsets, [0, count])


@connectivities
@settings(max_examples=30)
@given(mask=MASKS)
def test_largest_component_and_fill_holes_equal_scipy(backend, device, connectivity, mask):
    labels, count = ndimage.label(mask, STRUCTURES[connectivity])
    largest = labels == np.bincount(labels.ravel(), minlength=1)[1:].argmax() + 1 if count else np.zeros_like(mask)
    filled = ndimage.binary_fill_holes(mask, STRUCTURES[connectivity])
    tensor, options = torch.from_numpy(mask).to(device), {"connectivity": connectivity, "backend": backend}
    np.testing.assert_array_equal(nk.largest_component(tensor, **options).cpu(), largest)
    np.testing.assert_array_equal(nk.fill_holes(tensor, **options).cpu(), filled)


@connectivities
@pytest.mark.parametrize("width", [64, 65, 66, 129, 200])
def test_as_many_runs_and_contacts_as_fit(backend, device, connectivity, width):
    """Rows are processed 64 pixels at a time; with 8 neighbors, 33 runs can touch the row above there."""
    full = np.add.outer(np.arange(6), np.arange(width)) % 2 == 0
    late = full.copy()
    late[0, :64] = False
    torn = full ^ (np.random.default_rng(0).random(full.shape) < 0.05)
    for mask in (full, ~full, late, torn):
        expected, count = ndimage.label(mask, STRUCTURES[connectivity])
        result = nk.connected_components(torch.from_numpy(mask).to(device), connectivity=connectivity, backend=backend)
        np.testing.assert_array_equal(result.labels.cpu(), expected)
        np.testing.assert_array_equal(result.areas.cpu(), np.bincount(expected.ravel(), minlength=count + 1)[1:])


def test_numpy_in_numpy_out():
    (mask,) = random_masks(1, [(9, 13)])
    result = nk.connected_components(mask)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.int32 for x in result)
    for op in (nk.largest_component, nk.fill_holes):
        assert isinstance(op(mask), np.ndarray) and op(mask).dtype == bool


@pytest.mark.parametrize("shape", [(40, 61), (1, 1), (0, 4), (9, 0)])
def test_numpy_arrays_of_any_layout(shape, monkeypatch):
    """Numpy arrays bypass torch: results are identical to those of tensors, and every element is written."""
    (mask,) = random_masks(6, [shape])
    read_only = mask.copy()
    read_only.flags.writeable = False
    plain = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: np.full_like(plain(*a, **k), 77))
    for array in (mask, read_only, np.asfortranarray(mask), mask[::-1, ::2], mask.repeat(2, 1)[:, ::2], mask[1:, 1:]):
        tensor = torch.from_numpy(array.copy())
        result, expected = nk.connected_components(array), nk.connected_components(tensor)
        for field, expected_field in zip(result, expected, strict=True):
            np.testing.assert_array_equal(field, expected_field.numpy())
        for op in (nk.largest_component, nk.fill_holes):
            np.testing.assert_array_equal(op(array), op(tensor).numpy())


@connectivities
@pytest.mark.parametrize("shape", [(480, 480), (1, 1000), (1000, 1), (65, 129), (333, 64)])
@pytest.mark.parametrize("density", [0.4, 0.59, 0.95])
def test_large_masks_equal_scipy(backend, device, connectivity, shape, density):
    if backend == "reference" and shape == (480, 480):
        pytest.skip("plain Python takes seconds on a mask of this size")
    (mask,) = random_masks(7, [shape], density)
    structure, options = STRUCTURES[connectivity], {"connectivity": connectivity, "backend": backend}
    tensor = torch.from_numpy(mask).to(device)
    labels = nk.connected_components(tensor, **options).labels
    np.testing.assert_array_equal(labels.cpu(), ndimage.label(mask, structure)[0])
    filled = nk.fill_holes(tensor, **options)
    np.testing.assert_array_equal(filled.cpu(), ndimage.binary_fill_holes(mask, structure))


@pytest.mark.parametrize("flip", [False, True])
def test_diagonals(backend, device, flip):
    """A diagonal line across tiles and words is one component of connectivity 8, and a ring that it closes leaks."""
    line = torch.eye(130, dtype=torch.bool, device=device)
    line = line.flip(1) if flip else line
    assert len(nk.connected_components(line, backend=backend).areas) == 130
    result = nk.connected_components(line, connectivity=8, backend=backend)
    assert result.areas.tolist() == [130] and torch.equal(result.labels.bool(), line)
    ring = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool, device=device)
    assert nk.fill_holes(ring, backend=backend)[1, 1]
    assert torch.equal(nk.fill_holes(ring, connectivity=8, backend=backend), ring)
    assert nk.largest_component(ring, connectivity=8, backend=backend).sum() == 4


def test_spiral_is_one_component(backend, device):
    """Labels of a spiral are merged long after they were assigned."""
    n = 201
    mask = np.zeros((n, n), bool)
    for ring in range(0, n // 2, 2):
        mask[ring : n - ring, ring : n - ring] = True
        mask[ring + 1 : n - ring - 1, ring + 1 : n - ring - 1] = False
        mask[ring, ring + 1] = False
        if ring:
            mask[ring + 2, ring - 1] = True
    result = nk.connected_components(torch.from_numpy(mask).to(device), backend=backend)
    np.testing.assert_array_equal(result.labels.cpu(), ndimage.label(mask)[0])


@connectivities
def test_results_do_not_depend_on_batch_composition(backend, device, connectivity):
    shapes = [(5, 7), (1, 1), (33, 65), (0, 4), (64, 64), (9, 0)]
    masks = [torch.from_numpy(m).to(device) for m in random_masks(3, shapes)]
    batch = Ragged.pack(masks)
    options = {"connectivity": connectivity, "backend": backend}
    result = nk.connected_components(batch, **options)
    for b, (mask, labels) in enumerate(zip(masks, result.labels.grids(), strict=True)):
        alone = nk.connected_components(mask, **options)
        own = slice(int(result.offsets[b]), int(result.offsets[b + 1]))
        assert torch.equal(labels, alone.labels)
        assert torch.equal(result.areas[own], alone.areas) and torch.equal(result.boxes[own], alone.boxes)
    for op in (nk.largest_component, nk.fill_holes):
        for mask, out in zip(masks, op(batch, **options).grids(), strict=True):
            assert torch.equal(out, op(mask, **options))


def test_empty_batch(backend, device):
    empty = Ragged.of_shapes(torch.zeros(0, dtype=torch.bool, device=device), [])
    result = nk.connected_components(empty, backend=backend)
    assert result.labels.rows.shape == (0,) and result.areas.shape == (0,) and result.boxes.shape == (0, 4)
    assert result.offsets.tolist() == [0]
    assert nk.largest_component(empty, backend=backend).rows.shape == (0,)


def test_non_contiguous_views():
    (mask,) = random_masks(5, [(40, 60)])
    view = torch.from_numpy(mask).T[3::2, 1:]
    np.testing.assert_array_equal(nk.connected_components(view).labels, ndimage.label(mask.T[3::2, 1:])[0])


def test_every_output_is_written(backend, device, monkeypatch):
    """Outputs are allocated uninitialized: fill them with garbage and compare."""
    (mask,) = random_masks(11, [(31, 47)])
    mask = torch.from_numpy(mask).to(device)
    expected = nk.connected_components(mask)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(77 if k.get("dtype") else True))
    assert torch.equal(nk.connected_components(mask, backend=backend).labels, expected.labels)
    assert torch.equal(nk.largest_component(mask, backend=backend), expected.labels == expected.areas.argmax() + 1)


@pytest.mark.parametrize("op", [nk.connected_components, nk.largest_component, nk.fill_holes])
def test_invalid_arguments_raise(op):
    name = op.__name__
    with pytest.raises(TypeError, match=f"{name}: mask must be bool or uint8, but is float32"):
        op(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=rf"{name}: mask must have 2 dimensions, but has shape \[3, 3, 3\]"):
        op(torch.zeros(3, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"{name}: mask must be a numpy array, a torch tensor or a Ragged, but is list"):
        op([[True]])
    with pytest.raises(ValueError, match=f"{name}: backend 'cuda' cannot run: the tensors are on cpu"):
        op(torch.zeros(3, 3, dtype=torch.bool), backend="cuda")
    rows = torch.zeros(6, dtype=torch.bool)
    wrong = Ragged(rows, torch.tensor([0, 6], dtype=torch.int32), torch.tensor([[2, 2]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"image 0 has shape 2 x 2 but owns rows 0 to 6"):
        op(wrong)
    for value in (6, 1, 0, -4, True):
        with pytest.raises(ValueError, match=f"{name}: connectivity must be "):
            op(torch.zeros(3, 3, dtype=torch.bool), connectivity=value)
    for value in (4.0, "8", None):
        with pytest.raises(TypeError, match=f"{name}: connectivity must be an integer, but is "):
            op(torch.zeros(3, 3, dtype=torch.bool), connectivity=value)
    op(torch.zeros(3, 3, dtype=torch.bool), connectivity=np.int64(8))


def test_opcheck():
    (mask,) = random_masks(2, [(6, 9)])
    batch = Ragged.pack([torch.from_numpy(mask)])
    ops = torch.ops.namedmask_kernels
    torch.library.opcheck(ops.connected_components, (*batch, 8, "cpu"))
    torch.library.opcheck(ops.largest_component, (*batch, 8, "cpu"))
    torch.library.opcheck(ops.fill_holes, (*batch, 8, "cpu"))


def test_explain():
    assert nk.explain(nk.fill_holes, torch.zeros(3, 3, dtype=torch.bool)).splitlines() == [
        "fill_holes on cpu: cpu",
        "  cuda: the tensors are on cpu, not on a CUDA device",
        "  triton: fill_holes has no triton implementation",
        "  reference: can run, but is slow",
    ]
    lines = nk.explain(nk.fill_holes, torch.zeros(3, 3, dtype=torch.bool), backend="reference").splitlines()
    assert lines[0] == "fill_holes on cpu: reference (as requested)" and "  cpu: can run" in lines


def test_instruction_levels_agree_with_the_reference(tmp_path, native_at_levels):
    script = """
result = []
for connectivity, mask in ((c, m) for m in np.load(sys.argv[2]).values() for c in (4, 8)):
    shape = np.array([0, mask.size], np.int32), np.array([mask.shape], np.int32)
    labels, first = np.empty(mask.size, np.int32), np.empty(2, np.int32)
    areas, boxes = native.connected_components(mask.ravel(), *shape, labels, first, connectivity)
    outs = [np.empty(mask.size, bool) for _ in range(2)]
    native.largest_component(mask.ravel(), *shape, outs[0], connectivity)
    native.fill_holes(mask.ravel(), *shape, outs[1], connectivity)
    result += [x.tobytes().hex() for x in (labels, areas, boxes, *outs)]
print(*result)
"""
    masks = [*random_masks(9, [(40, 130), (33, 63), (33, 64), (20, 65), (9, 7)]), np.ones((3, 128), bool)]
    np.savez(tmp_path / "masks.npz", *masks)
    expected = []
    for connectivity, mask in ((c, m) for m in masks for c in (4, 8)):
        options = {"connectivity": connectivity, "backend": "reference"}
        result = nk.connected_components(mask, **options)
        outs = [op(mask, **options) for op in (nk.largest_component, nk.fill_holes)]
        expected += [np.ascontiguousarray(x).tobytes().hex() for x in (*result[:3], *outs)]

    for result in native_at_levels(script, tmp_path / "masks.npz").values():
        assert result == expected
