# SPDX-License-Identifier: MIT
"""The logic of the CUDA kernels, run on the CPU by cuda_emulator/: for machines without a GPU. On a GPU the operators'
own tests run the real thing."""

import ctypes
import itertools

import numpy as np
import pytest
import torch

import emulator
import namedmask_kernels as nk
from emulator import pointers
from namedmask_kernels import Ragged
from namedmask_kernels.reference import normalized_cut as cut_reference

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="g++ is not here to compile the emulated kernels")


SEEDS = [0, 1]  # of the order in which threads run


@pytest.fixture(scope="module")
def components():
    function = emulator.library("connected_components").run

    def run(op, batch, out_dtype, counts=None, found=0):
        """Calls the launcher with every output and the scratch memory poisoned; -> out, counts, areas, boxes."""
        rows, photos = len(batch.rows), len(batch.shapes)
        out = torch.full((rows,), 77, dtype=torch.uint8 if out_dtype == torch.bool else out_dtype)
        counts = torch.full((photos,), -77, dtype=torch.int32) if counts is None else counts
        areas, boxes = torch.full((found,), 77, dtype=torch.int32), torch.full((found, 4), 77, dtype=torch.int32)
        workspace = torch.full((2 * rows + 4 * photos,), 12345678, dtype=torch.int32)
        given = pointers(batch.rows, batch.offsets, batch.shapes)
        results = pointers(out, counts, areas, boxes)
        function(op.encode(), *given, rows, photos, *results, found, *pointers(workspace))
        return out.view(out_dtype) if out_dtype == torch.bool else out, counts, areas, boxes

    return run


def blobs(rng, shape, density):
    """Noise, smoothed a little: runs of all lengths, holes, components that cross tiles."""
    noise = torch.from_numpy(rng.random(shape, dtype=np.float32))
    if min(shape) > 4:
        noise = torch.nn.functional.avg_pool2d(noise[None, None], 3, 1, 1)[0, 0]
        density = float(noise.flatten().quantile(density)) if noise.numel() < 1 << 20 else density
    return noise < density


def comb(height, width):
    """Teeth that only meet in the last row: every tile's labels are united late."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def batches():
    rng = np.random.default_rng(0)
    shapes = [(5, 7), (0, 4), (1, 1), (33, 65), (70, 31), (1, 100), (100, 1), (64, 64), (9, 0)]
    for density in (0.1, 0.45, 0.6, 0.9):
        yield Ragged.pack([blobs(rng, shape, density) for shape in shapes])
    full = torch.ones(40, 70, dtype=torch.bool)
    yield Ragged.pack([full, ~full, comb(70, 67), comb(67, 70).T, ~comb(66, 99)])
    yield Ragged.pack([blobs(rng, (2, 3), 0.5) for _ in range(203)])  # more photos than a launch takes
    yield Ragged.of_shapes(torch.zeros(0, dtype=torch.bool), [])


@pytest.mark.parametrize("batch", list(batches()))
def test_emulated_components_equal_the_cpu(components, batch):
    expected = nk.connected_components(batch, backend="cpu")
    labels, counts, *_ = components("connected_components", batch, torch.int32)
    assert torch.equal(labels, expected.labels.rows)
    assert torch.equal(counts, expected.offsets.diff())
    _, _, areas, boxes = components(
        "component_stats", batch.with_rows(labels), torch.int32, counts, len(expected.areas)
    )
    assert torch.equal(areas, expected.areas) and torch.equal(boxes, expected.boxes)
    for op in (nk.largest_component, nk.fill_holes):
        assert torch.equal(components(op.__name__, batch, torch.bool)[0], op(batch, backend="cpu").rows)


class Scratch:
    """Poisoned memory (NaN, as floats) for a launcher; whatever is written beyond its end is found."""

    POISON, SPARE = 0x7FC0BAD0, 64

    def __init__(self, size):
        self.all = torch.full((size + self.SPARE,), self.POISON, dtype=torch.int32)
        self.own = self.all[:size]

    def check(self):
        assert (self.all[len(self.own) :] == self.POISON).all()


# -- bilateral_solver ------------------------------------------------------------------------------------------------


BILATERAL = {
    "confidence": 0.999, "sigma_spatial": 16.0, "sigma_luma": 16.0, "sigma_chroma": 8.0,
    "smoothness": 256.0, "iterations": 25, "tolerance": 1e-5,
}  # fmt: skip


class BilateralSettings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64 if name == "iterations" else ctypes.c_double) for name in BILATERAL]


def assert_numbered_as_met(offsets, vertices):
    """Whatever thread came first: a photo's vertices are numbered in the order in which its pixels meet them."""
    for begin, end in itertools.pairwise(offsets.tolist()):
        met = np.maximum.accumulate(np.concatenate([[-1], vertices[begin:end].numpy()]))
        assert (np.diff(met) <= 1).all()


@pytest.fixture(scope="module")
def solve():
    library = emulator.library("bilateral_solver")

    def run(targets, images, seed=0, check=lambda workspace: None, **changes):
        """The emulated bilateral_solver on a Ragged batch, its output and scratch poisoned; `check` sees that."""
        library.seed(seed)
        rows, photos = len(targets.rows), len(targets.shapes)
        out = torch.full((rows,), torch.nan)
        scratch = Scratch(21 * rows + 3 * photos)
        given = pointers(targets.rows, images.rows, targets.offsets, targets.shapes)
        settings = BilateralSettings(**BILATERAL | changes)
        library.run(*given, rows, photos, *pointers(out, scratch.own), len(scratch.own), ctypes.byref(settings))
        scratch.check()
        check(scratch.own)
        return targets.with_rows(out)

    return run


def photos(seed, shapes):
    """(targets, images): light that varies slowly, noise, some gray; a disc."""
    rng = np.random.default_rng(seed)
    targets, images = [], []
    for h, w in shapes:
        y, x = np.mgrid[:h, :w] / max(h, w, 1)
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
        image = (128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (h, w, 3))).clip(0, 255).astype(np.uint8)
        image[: h // 3] = image[: h // 3, :, :1]
        images.append(torch.from_numpy(image))
        targets.append(torch.from_numpy(((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1).astype(np.float32)))
    return Ragged.pack(targets), Ragged.pack(images)


@pytest.mark.parametrize("seed", SEEDS)
def test_emulated_bilateral_solver_equals_the_reference(solve, seed):
    batch = photos(seed, [(37, 53), (0, 4), (1, 1), (1, 70), (70, 1), (16, 17), (9, 0)])
    for changes in ({}, {"sigma_spatial": 7.3, "sigma_luma": 5.5, "sigma_chroma": 3.25}):
        rows = len(batch[0].rows)
        found = solve(
            *batch, seed, lambda w, n=rows: assert_numbered_as_met(batch[0].offsets, w[7 * n : 8 * n]), **changes
        )
        torch.testing.assert_close(
            found.rows, nk.bilateral_solver(*batch, **changes, backend="reference").rows, atol=2e-5, rtol=0
        )
        alone = [
            solve(Ragged.pack([t]), Ragged.pack([i]), seed + 9, **changes).rows
            for t, i in zip(*(b.grids() for b in batch), strict=True)
        ]
        assert torch.equal(torch.cat(alone), found.rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma_spatial": 1.0, "sigma_luma": 1.0, "sigma_chroma": 1.0},
        {"sigma_spatial": 1e9, "sigma_luma": 16.0, "iterations": 0},
        {"sigma_spatial": 1000.0, "sigma_luma": 1.0, "sigma_chroma": 2.9, "smoothness": 3.5, "confidence": 0.25},
        {"sigma_spatial": 1.1, "sigma_luma": 300.0, "sigma_chroma": 300.0},
        {"smoothness": 0.0},
        {"tolerance": 0.1},
    ],
)
def test_emulated_bilateral_solver_with_other_settings(solve, changes):
    batch = photos(3, [(21, 34), (2, 3)])
    batch[0].rows.mul_(3).sub_(7.5)
    expected = nk.bilateral_solver(*batch, **changes, backend="cpu").rows
    torch.testing.assert_close(solve(*batch, **changes).rows, expected, atol=1e-4, rtol=0)


def test_emulated_bilateral_solver_on_special_batches(solve):
    many = photos(5, [(2, 3)] * 131)  # more photos than a launch takes
    torch.testing.assert_close(solve(*many).rows, nk.bilateral_solver(*many, backend="cpu").rows, atol=1e-5, rtol=0)
    targets, images = photos(6, [(19, 23), (8, 40), (5, 5)])
    for value in (0.0, 1.0, 0.3, -7.0, 1e-42, 3e38):
        constant = targets.with_rows(torch.full_like(targets.rows, value))
        assert torch.equal(solve(constant, images).rows, constant.rows)
    targets.grids()[1][3, 4] = torch.inf
    found, expected = solve(targets, images).grids(), solve(*photos(6, [(19, 23), (8, 40), (5, 5)])).grids()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2]) and found[1].isnan().all()
    empty = Ragged.of_shapes(torch.zeros(0), [])
    assert solve(empty, empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8))).rows.shape == (0,)


def test_emulated_bilateral_solver_equals_the_peer(solve, golden):
    arrays = golden("bilateral")
    target, image = (torch.from_numpy(arrays[f"coffee_{name}"]) for name in ("target", "photo"))
    found = solve(Ragged.pack([target.float()]), Ragged.pack([image])).rows
    torch.testing.assert_close(
        found.double(), torch.from_numpy(arrays["coffee_soft"]).flatten().double(), atol=1e-5, rtol=0
    )


# -- dense_crf -------------------------------------------------------------------------------------------------------


CRF = {
    "iterations": 10, "gaussian_sigma": 3.0, "gaussian_weight": 3.0,
    "bilateral_sigma": 80.0, "bilateral_sigma_rgb": 13.0, "bilateral_weight": 10.0,
}  # fmt: skip


class CrfSettings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64 if name == "iterations" else ctypes.c_double) for name in CRF]


@pytest.fixture(scope="module")
def infer():
    library = emulator.library("dense_crf")
    library.workspace_size.restype = ctypes.c_int64

    def run(probabilities, images, seed=0, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0)):
        """The emulated dense_crf on a Ragged batch, its outputs and scratch memories poisoned."""
        library.seed(seed)
        rows, photos, labels = len(probabilities.rows), len(probabilities.shapes), probabilities.rows.shape[1]
        settings = ctypes.byref(CrfSettings(iterations, *gaussian, *bilateral))
        out = torch.full((rows, labels), torch.nan)
        status = torch.full((2, photos), 77, dtype=torch.int32)
        corners = Scratch(49 * rows + photos)
        batch = pointers(probabilities.offsets, probabilities.shapes)
        given = pointers(probabilities.rows, images.rows)
        results = pointers(out, status, corners.own)
        library.lay_lattice(*given, *batch, rows, photos, labels, *results, settings)
        assert_numbered_as_met(6 * probabilities.offsets, corners.own[24 * rows : 30 * rows])
        counts = status[0].clone()
        size = library.workspace_size(*batch, photos, labels, *pointers(counts), settings)
        scratch = Scratch(size)
        memory = pointers(out, status, counts, corners.own, scratch.own)
        library.infer(*batch, rows, photos, labels, *memory, ctypes.c_int64(size), settings)
        corners.check()
        scratch.check()
        return probabilities.with_rows(out), status

    return run


def scenes(seed, shapes, labels):
    """(probabilities, images): photos with a probability for each label that follows the place loosely."""
    _, images = photos(seed, shapes)
    rng = np.random.default_rng(seed)
    scores = [
        np.add.outer(np.arange(h), np.arange(w))[..., None] / 20 + rng.normal(0, 1, (h, w, labels)) for h, w in shapes
    ]
    waves = [torch.from_numpy(np.sin(s * np.arange(1, labels + 1)) * 2).float().softmax(-1) for s in scores]
    return Ragged.pack(waves), images


@pytest.mark.parametrize(("n", "bits"), [(0, 5), (1, 0), (5000, 3), (5000, 11), (2049, 22)])
def test_emulated_sort_is_stable(n, bits):
    library = emulator.library("dense_crf")
    library.sort_scratch.restype = ctypes.c_int64
    keys = torch.from_numpy(np.random.default_rng(n).integers(0, 1 << bits, n).astype(np.int32))
    rooms = [torch.full((2, n), -77, dtype=torch.int32) for _ in range(2)]
    scratch = torch.full((library.sort_scratch(ctypes.c_int64(n)),), -77, dtype=torch.int32)
    held = library.sort_numbers(*pointers(keys), ctypes.c_int64(n), bits, *pointers(*rooms, scratch))
    order = keys.argsort(stable=True)
    assert torch.equal(rooms[held], torch.stack([keys[order], order.int()]))


CRF_SHAPES = [(21, 27), (0, 4), (1, 1), (1, 40), (40, 1), (9, 0)]


@pytest.mark.parametrize(("labels", "seed"), [(2, 0), (3, 1), (21, 2)])
def test_emulated_dense_crf_equals_the_cpu(infer, labels, seed):
    batch = scenes(seed, CRF_SHAPES, labels)
    found, status = infer(*batch, seed, iterations=3)
    expected = nk.dense_crf(*batch, iterations=3, backend="cpu")
    torch.testing.assert_close(found.rows, expected.rows, atol=1e-4, rtol=0)
    assert not status[1].any()
    for alone, shape, given in zip(
        found.grids(), CRF_SHAPES, zip(*(b.grids() for b in batch), strict=True), strict=True
    ):
        again, _ = infer(*(Ragged.pack([g]) for g in given), seed + 9, iterations=3)
        assert torch.equal(alone.reshape(-1), again.rows.reshape(-1)), shape


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"gaussian": (1e-9, 3.0), "bilateral": (5.0, 3.0, 2.5)},
        {"gaussian": (31.0, 5.0), "bilateral": (50.0, 5.0, 0.0)},
        {"gaussian": (1e9, 5.0), "bilateral": (80.0, 13.0, 0.0)},
        {"gaussian": (7.0, 0.0), "bilateral": (1e6, 1e6, 4.0)},
    ],
)
def test_emulated_dense_crf_with_other_settings(infer, settings):
    batch = scenes(5, [(25, 38), (2, 3)], 5)
    arguments = {"iterations": 2} | settings
    expected = nk.dense_crf(*batch, **arguments, backend="cpu").rows
    torch.testing.assert_close(infer(*batch, **arguments)[0].rows, expected, atol=1e-4, rtol=0)


def test_emulated_dense_crf_on_special_batches(infer):
    many = scenes(5, [(2, 3)] * 67, 2)  # more photos than a launch takes
    expected = nk.dense_crf(*many, iterations=2, backend="cpu").rows
    torch.testing.assert_close(infer(*many, iterations=2)[0].rows, expected, atol=1e-4, rtol=0)
    probabilities, images = scenes(6, [(9, 13), (8, 20), (5, 5)], 40)
    before = infer(probabilities, images, iterations=2)[0].grids()
    probabilities.grids()[1][3, 4, 7] = torch.nan
    found, status = infer(probabilities, images, iterations=2)
    assert status[1].tolist() == [0, 1, 0]
    assert torch.equal(found.grids()[0], before[0]) and torch.equal(found.grids()[2], before[2])
    empty = Ragged.of_shapes(torch.zeros(0, 3), [])
    assert infer(empty, empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8)))[0].rows.shape == (0, 3)


def test_emulated_dense_crf_equals_the_cpu_on_a_photo(infer, golden):
    """A part of the peer's photo, with its parameters and as many updates."""
    image = torch.from_numpy(golden("bilateral")["coffee_photo"])[40:100, 60:130].contiguous()
    foreground = torch.from_numpy(golden("densecrf")["fg_in"]).float()[40:100, 60:130]
    batch = Ragged.pack([torch.stack([1 - foreground, foreground], -1)]), Ragged.pack([image])
    found, expected = infer(*batch)[0].rows, nk.dense_crf(*batch, backend="cpu").rows
    assert (found - expected).abs().mean() < 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.999


# -- normalized_cut --------------------------------------------------------------------------------------------------


def poisoned(n, dtype, *more):
    return torch.full((n, *more), 77, dtype=torch.uint8 if dtype == torch.bool else dtype).view(dtype)


def cut(batch, tau=0.2, eps=1e-5, tolerance=1e-8, max_iterations=128):
    """NormalizedCut without its foreground; the bits are the definition's."""
    bits, doubles = [torch.zeros(0, dtype=torch.int32)], 0
    for features in batch.grids():
        n = len(features.flatten(0, 1))
        tiles, steps = -(-n // 128), min(max_iterations, max(n - 1, 0))
        edges = np.zeros((tiles * 128, tiles * 128), np.uint8)
        edges[:n, :n] = cut_reference.edges(features.flatten(0, 1), tau)
        groups = edges.reshape(tiles * 128, tiles, 128).swapaxes(0, 1)
        bits.append(torch.from_numpy(np.packbits(groups, bitorder="little").view(np.int32)))
        doubles += (steps + 4) * tiles * 128 + 6 * (steps + 1)
    photos, rows = len(batch.shapes), len(batch.rows)
    vector, partition = poisoned(rows, torch.float32), poisoned(rows, torch.bool)
    value, residual = (poisoned(photos, torch.float64) for _ in range(2))
    iterations, seed = (poisoned(photos, torch.int32) for _ in range(2))
    emulator.normalized_cut(
        torch.cat(bits), batch.offsets, batch.shapes, vector, value, residual, iterations, partition, seed,
        poisoned(doubles, torch.float64), eps, tolerance, max_iterations, 0,
    )  # fmt: skip
    return nk.NormalizedCut(
        batch.with_rows(vector), value, residual, iterations, batch.with_rows(partition), seed, None
    )


def halves(h, w, channels, noise, seed=0):
    """float32 [h, w, channels]: a disk before a background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    inside = (y - h / 2) ** 2 + (x - w / 3) ** 2 < (min(h, w) / 3) ** 2
    features = rng.normal(size=(2, channels))[inside.astype(int)] + noise * rng.normal(size=(h, w, channels))
    return torch.from_numpy(features.astype(np.float32))


def photos_to_cut():
    yield Ragged.pack([halves(9, 15, 16, 0.6), halves(0, 3, 16, 1.0), halves(1, 1, 16, 1.0), halves(17, 16, 16, 1.2),
                       halves(1, 2, 16, 1.0), halves(5, 5, 16, 3.0)])  # fmt: skip
    two = torch.zeros(4, 6, 2)  # two equal halves: all entries are of one size
    two[:, :3, 0] = two[:, 3:, 1] = 1
    apart = torch.eye(20)[:, :2].reshape(4, 5, 2)  # two tokens, and rows of zeros, which nothing joins
    yield Ragged.pack([two, torch.ones(4, 5, 2), torch.zeros(4, 5, 2), apart])
    yield Ragged.of_shapes(torch.zeros(0, 4), [])


@pytest.mark.parametrize("batch", list(photos_to_cut()))
@pytest.mark.parametrize("iterations", [3, 128])
def test_emulated_cut_equals_the_cpu(batch, iterations):
    expected = nk.normalized_cut(batch, max_iterations=iterations, backend="cpu")
    found = cut(batch, max_iterations=iterations)
    assert torch.equal(found.iterations, expected.iterations)
    assert torch.equal(found.seed, expected.seed)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(found.vector.rows, expected.vector.rows, rtol=0, atol=2e-7)
    for b, v in enumerate(expected.vector.grids()):
        clear = (v - v.mean()).abs() >= 1e-6
        assert torch.equal(found.partition.grids()[b][clear], expected.partition.grids()[b][clear])


def test_emulated_cut_with_other_settings_and_alone():
    batch = Ragged.pack([halves(6, 11, 16, 1.0), halves(12, 14, 16, 1.5)])
    settings = {"tau": 0.1, "eps": 0.01, "tolerance": 1e-11}
    expected, found = nk.normalized_cut(batch, **settings, backend="cpu"), cut(batch, **settings)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vector.rows, expected.vector.rows, rtol=0, atol=2e-7)
    assert (found.residual <= 1e-11).all()
    alone = cut(Ragged.pack(batch.grids()[1:]), **settings)
    assert torch.equal(alone.vector.rows, found.vector.grids()[1].flatten())
    assert torch.equal(alone.residual, found.residual[1:])
    assert (cut(batch, tau=1.0).seed == -1).all() and (cut(batch, tau=-1.5).value == 1).all()


def test_emulated_cut_of_more_photos_than_a_launch_takes():
    batch = Ragged.pack([halves(*((1, 1) if b < 99 else (2, 3)), 8, 1.0, b) for b in range(103)])
    expected, found = nk.normalized_cut(batch, backend="cpu"), cut(batch)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-12)
    assert torch.equal(found.seed, expected.seed)


def test_emulated_cut_equals_tokencut(golden):
    arrays = golden("ncut")
    features = torch.from_numpy(arrays["a_features"]).unflatten(0, tuple(arrays["a_dims"]))
    found = cut(Ragged.pack([features]), tolerance=1e-10)
    expected = arrays["a_eigvec"]
    assert abs(found.value.item() - arrays["a_lambda0_3"][1]) < 1e-10
    assert np.abs(found.vector.rows.numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert found.seed.item() == arrays["a_seed"] and found.residual.item() < 1e-10
    np.testing.assert_array_equal(found.partition.grids()[0].numpy(), arrays["a_bipartition"])


# -- spectral_clusters -----------------------------------------------------------------------------------------------


def labels_of(batch, counts, seed=0):
    """spectral_clusters with unit vectors and ranges by torch, channels rounded up to a multiple of 4."""
    unit = torch.nn.functional.normalize(batch.rows.double(), dim=1).float()
    unit = torch.nn.functional.pad(unit, (0, -unit.shape[1] % 4))
    ranges = [torch.zeros(0, 2)]
    for grid in batch.with_rows(unit).grids():
        rows = grid.flatten(0, 1)
        products = rows @ rows.T
        ranges.append(torch.stack(products.aminmax())[None] if len(rows) else torch.tensor([[torch.inf, -torch.inf]]))
    wanted, labels = torch.tensor(counts, dtype=torch.int32), poisoned(len(unit), torch.int32, len(counts))
    doubles = emulator.spectral_clusters_workspace(batch.offsets, batch.shapes, wanted, *unit.shape)
    workspace = poisoned(doubles, torch.float64)
    emulator.spectral_clusters(unit, torch.cat(ranges), *batch[1:], wanted, labels, workspace, seed, 0)
    return labels


def groups(h, w, channels, k, noise, seed=0):
    """float32 [h, w, channels]: stripes of k kinds."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(k, channels))[np.arange(w) * k // w]
    return torch.from_numpy((kinds + noise * rng.normal(size=(h, w, channels))).astype(np.float32))


@pytest.mark.parametrize("channels, noise, counts, seed", [(24, 0.8, [2, 3, 4], 0), (30, 1.5, [5, 1], -3)])
def test_emulated_clusters_equal_the_cpu(channels, noise, counts, seed):
    shapes = [(7, 9, 3), (0, 3, 1), (1, 1, 1), (11, 13, 4), (1, 2, 2)]
    batch = Ragged.pack([groups(h, w, channels, k, noise) for h, w, k in shapes])
    labels = labels_of(batch, counts, seed)
    assert torch.equal(labels, nk.spectral_clusters(batch, counts, seed=seed, backend="cpu").rows)
    alone = labels_of(Ragged.pack(batch.grids()[3:4]), counts, seed)
    assert torch.equal(alone, batch.with_rows(labels).grids()[3].flatten(0, 1))


def test_emulated_clusters_of_tokens_that_do_not_differ_enough():
    equal = torch.eye(4)[:3].repeat_interleave(10, 0).reshape(5, 6, 4) + 0.1  # an eigenvalue that occurs twice
    isolated = groups(5, 6, 4, 2, 0.3).abs()
    isolated[2, 3] = 0  # no affinity at all
    batch = Ragged.pack([equal, isolated, torch.ones(4, 5, 4), torch.zeros(2, 2, 4)])
    labels = labels_of(batch, [3, 2])
    assert torch.equal(labels, nk.spectral_clusters(batch, [3, 2], backend="reference").rows)
    assert labels[:30, 0].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert labels_of(Ragged.of_shapes(torch.zeros(0, 4), []), [2]).shape == (0, 1)


def test_emulated_clusters_by_many_vectors():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 10, 40)).astype(np.float32))
    batch = Ragged.pack([features])
    assert torch.equal(labels_of(batch, [12]), nk.spectral_clusters(batch, [12], backend="reference").rows)
