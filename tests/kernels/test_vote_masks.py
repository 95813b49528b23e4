# SPDX-License-Identifier: MIT

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

import namedmask_kernels as nk
from namedmask_kernels import Ragged

BACKENDS = ["cpu", "cuda", "reference"]
CASES = ["clusters", "clusters_b", "mixed", "all_filtered", "all_filtered_with_empty", "single", "small_large", "tie"]


def blobs(n, h, w, seed=0):
    """bool [n, h, w]: rectangles of all sizes, some of which touch the borders."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, h, w), bool)
    for mask in masks:
        (top, bottom), (left, right) = np.sort(rng.integers(0, h + 1, 2)), np.sort(rng.integers(0, w + 1, 2))
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.9
    return torch.from_numpy(masks)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_equals_selfmask(golden, run, case):
    arrays = golden("voting")
    n, h, w = arrays[f"{case}_shape"]
    masks = np.unpackbits(arrays[f"{case}_masks"], axis=-1, count=w).astype(bool).reshape(n, h, w)
    vote = run(nk.vote_masks, torch.from_numpy(masks))
    kept = arrays[f"{case}_long1_area0_kept"]
    np.testing.assert_array_equal(np.flatnonzero(vote.kept), kept)
    np.testing.assert_allclose(vote.scores[kept], arrays[f"{case}_long1_area0_score"], atol=1e-5)
    # SelfMask breaks ties by an unstable sort, vote_masks by order
    assert vote.winner == (0 if case == "tie" else arrays[f"{case}_long1_area0_best"])


def test_reasons(run):
    masks = torch.zeros(6, 5, 7, dtype=torch.bool)
    masks[1, :, 3] = True
    masks[2, 2, :] = True
    masks[3] = True
    masks[4, 1:3, 1:3] = True
    masks[5, 0, 1] = masks[5, 4, 6] = masks[5, 2, 0] = True  # touches all four borders, with separate components
    vote = run(nk.vote_masks, masks)
    assert vote.reasons.tolist() == [1, 2, 4, 6, 0, 6] and vote.kept.tolist() == [False] * 4 + [True, False]
    assert vote.winner.item() == 4 and vote.scores.tolist()[:4] == [0] * 4


def test_ties_go_to_the_first(run):
    masks = torch.zeros(4, 6, 6, dtype=torch.bool)
    masks[1:3, 2:4, 2:4] = True
    masks[3, 1:3, 1:3] = True
    vote = run(nk.vote_masks, masks)
    assert vote.winner.item() == 1 and vote.scores[1] == vote.scores[2] > vote.scores[3]


@settings(max_examples=80)
@given(masks=hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=24)))
def test_equals_the_reference(masks):
    check_against_reference(torch.from_numpy(masks))


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 1, 63), (5, 64, 1), (6, 8, 8), (7, 5, 13), (4, 16, 32), (5, 57, 9)])
def test_sizes_around_the_words(shape):
    check_against_reference(blobs(*shape))
    check_against_reference(torch.ones(shape, dtype=torch.bool))


def check_against_reference(masks):
    result, expected = nk.vote_masks(masks), nk.vote_masks(masks, backend="reference")
    assert torch.equal(result.kept, expected.kept) and torch.equal(result.reasons, expected.reasons)
    torch.testing.assert_close(result.scores, expected.scores, rtol=0, atol=1e-12)
    best = expected.scores.topk(min(2, len(masks))).values
    if len(best) < 2 or best[0] - best[1] > 1e-9:
        assert result.winner == expected.winner


def test_bytes_other_than_one_are_true(run):
    """A bool tensor may view bytes other than 0 and 1."""
    masks = blobs(5, 12, 17)
    odd = (masks.to(torch.uint8) * 2).view(torch.bool)
    assert same(run(nk.vote_masks, odd), run(nk.vote_masks, masks))


def test_results_do_not_depend_on_batch_composition(run):
    shapes = [(5, 7), (1, 1), (33, 65), (0, 4), (64, 64), (9, 0)]
    images = [blobs(6, h, w, seed=b) for b, (h, w) in enumerate(shapes)]
    batch = run(nk.vote_masks, Ragged.pack([p.permute(1, 2, 0) for p in images]))
    assert batch.winner.shape == (6,) and batch.scores.shape == (6, 6)
    for b, image in enumerate(images):
        assert same([x[b] for x in batch], run(nk.vote_masks, image))


@pytest.mark.parametrize("n", [1, 27, 28, 29, 70])
def test_any_number_of_candidates(run, backend, n):
    """The CUDA version counts in groups of 32 masks, the four borders included, and in parts of 4,096 pixels."""
    images = [blobs(n, h, w, seed=b) for b, (h, w) in enumerate([(1, 1), (0, 3), (2, 31), (33, 3), (64, 65)])]
    images[2][:] = False
    images[3][:, 0, 1] = images[3][:, -1, 2] = True  # all span the full height
    votes = run(nk.vote_masks, Ragged.pack([p.permute(1, 2, 0) for p in images]))
    for b, image in enumerate(images):
        expected = nk.vote_masks(image)
        assert same([votes.winner[b], votes.kept[b], votes.reasons[b]], [expected[0], expected[1], expected[3]])
        atol = 1e-12 if backend == "reference" else 0  # which adds the IoUs in another order
        torch.testing.assert_close(votes.scores[b], expected.scores, rtol=0, atol=atol)


def test_arrangements(run):
    images = torch.stack([blobs(5, 12, 9, seed=b) for b in range(3)])
    batch = run(nk.vote_masks, images)
    assert batch.winner.shape == (3,) and batch.kept.shape == (3, 5) and batch.winner.dtype == torch.int32
    ragged = Ragged.pack([p.permute(1, 2, 0) for p in images])
    assert same(run(nk.vote_masks, ragged), batch)
    assert same(run(nk.vote_masks, ragged.with_rows(ragged.rows.T.contiguous().T)), batch)
    assert same(run(nk.vote_masks, ragged.with_rows(ragged.rows.byte() * 255)), batch)
    view = images.permute(0, 1, 3, 2)[:, :, ::2, 1:]
    assert same(run(nk.vote_masks, view), run(nk.vote_masks, view.contiguous()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_calls_do_not_wait_for_the_gpu():
    """Not run on a GPU yet."""
    images = torch.stack([blobs(5, 12, 9, seed=b) for b in range(3)]).cuda()
    ragged = Ragged.pack([p.permute(1, 2, 0) for p in images])
    try:
        torch.cuda.set_sync_debug_mode("error")
        votes = nk.vote_masks(images), nk.vote_masks(ragged)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(*votes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numpy_arrays(backend):
    masks = blobs(5, 12, 9)
    vote = nk.vote_masks(masks.numpy(), backend=backend)
    assert all(isinstance(x, (np.ndarray, np.generic)) for x in vote)
    assert same(map(torch.as_tensor, vote), nk.vote_masks(masks, backend=backend))


def test_no_valid_candidates(run):
    none = run(nk.vote_masks, torch.zeros(0, 4, 5, dtype=torch.bool))
    assert none.winner.item() == -1 and none.kept.shape == (0,)
    none = run(nk.vote_masks, Ragged.of_shapes(torch.zeros(20, 0, dtype=torch.bool), [(4, 5)]))
    assert none.winner.tolist() == [-1] and none.scores.shape == (1, 0)
    empty = run(nk.vote_masks, torch.zeros(3, 4, 5, dtype=torch.bool))
    assert empty.winner.item() == 0 and empty.kept.all() and not empty.scores.any() and (empty.reasons == 1).all()
    no_images = run(nk.vote_masks, Ragged.of_shapes(torch.zeros(0, 3, dtype=torch.bool), []))
    assert no_images.winner.shape == (0,) and no_images.scores.shape == (0, 3)


def test_every_output_is_written(fill_memory):
    images = Ragged.pack([p.permute(1, 2, 0) for p in (blobs(5, 9, 11), blobs(5, 3, 4, 1), blobs(5, 1, 1))])
    expected = nk.vote_masks(images)
    with fill_memory():
        assert same(nk.vote_masks(images), expected)


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    masks = blobs(27, 900, 801)  # enough work for several threads
    first, *others = on_threads(lambda: nk.vote_masks(masks))
    assert all(same(other, first) for other in others)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_instruction_levels(level, tmp_path, run_at_level):
    masks = blobs(11, 37, 53)
    np.save(tmp_path / "masks.npy", masks.numpy())
    code = (
        "import sys, numpy as np, namedmask_kernels as nk\n"
        "vote = nk.vote_masks(np.load(sys.argv[1] + '/masks.npy'))\n"
        "np.savez(sys.argv[1] + '/result.npz', *vote)\n"
    )
    run_at_level(level, code)
    result = np.load(tmp_path / "result.npz")
    for expected, field in zip(nk.vote_masks(masks), result.values(), strict=True):
        np.testing.assert_array_equal(expected, field)


def test_invalid_arguments_raise():
    masks = blobs(3, 4, 5)
    with pytest.raises(TypeError, match="vote_masks: masks must be bool or uint8, but is float32"):
        nk.vote_masks(masks.float())
    with pytest.raises(TypeError, match=r"vote_masks: masks must be a numpy array, .* but is list"):
        nk.vote_masks([masks])
    with pytest.raises(ValueError, match=r"vote_masks: masks must have 3 or 4 dimensions, but has shape \[4, 5\]"):
        nk.vote_masks(masks[0])
    with pytest.raises(ValueError, match="vote_masks: the rows of masks must have 2 dimensions"):
        nk.vote_masks(Ragged.pack([masks[0]]))
    with pytest.raises(ValueError, match="vote_masks: backend 'triton' cannot run"):
        nk.vote_masks(masks, backend="triton")


def test_malformed_batches_raise(run):
    batch = Ragged.pack([blobs(3, 4, 5).permute(1, 2, 0)])
    with pytest.raises(ValueError, match="vote_masks: image 0 has shape 5 x 6 but owns rows 0 to 20"):
        run(nk.vote_masks, batch._replace(shapes=batch.shapes + 1))


def test_opcheck():
    masks = blobs(3, 4, 5)
    offsets, shapes = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([[4, 5]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.namedmask_kernels.vote_masks, (masks.flatten(), offsets, shapes, 3, "cpu"))
