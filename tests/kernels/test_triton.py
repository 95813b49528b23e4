# SPDX-License-Identifier: MIT
"""The Triton kernels against the definition: on the GPU, or in Triton's interpreter on the CPU where there is none."""

import ast
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_rounding
import numpy as np
import pytest
import torch

from namedmask_kernels import Ragged
from namedmask_kernels.reference import attention_features as reference
from namedmask_kernels.reference import normalized_cut as cut_reference
from namedmask_kernels.reference import pamr as pamr_reference
from namedmask_kernels.reference import random_walk as walk_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's tl.dot gives garbage for bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
ALL = ("output", "rows", "lse", "key_norms")


def random_qkv(lengths, heads, dim, dtype):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + dim)
    return 1.5 * torch.randn(sum(lengths), 3, heads, dim, generator=generator).to(dtype), offsets


def run(qkv, offsets, scale, taps, want=ALL):
    """Fills the outputs with NaN first, so that elements that a kernel does not write fail the test."""
    from namedmask_kernels.triton import attention_features as kernels

    tokens, _, heads, dim = qkv.shape
    outputs = {
        "output": qkv.new_empty(tokens, heads, dim),
        "rows": torch.empty(tokens, heads, len(taps)),
        "lse": torch.empty(tokens, heads),
        "key_norms": torch.empty(tokens),
    }
    result = {name: outputs[name].fill_(torch.nan).to(DEVICE) for name in want}
    kernels.attention_features(qkv.to(DEVICE), offsets, taps, scale, *(result.get(name) for name in ALL))
    return {name: value.cpu() for name, value in result.items()}


def torch_form(qkv, scale, taps):
    """The torch expression, entirely in the dtype of qkv [n, 3, H, D]; results like the reference."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    scores = scale * q @ k.mT
    weights = scores.softmax(-1)
    rows = weights[:, taps].permute(2, 0, 1)
    return (weights @ v).transpose(0, 1), rows, scores.logsumexp(-1).T, k.square().sum((0, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, dim, taps",
    [
        (2, 64, [0]),
        (1, 32, [0, 33, 2]),
        (1, 128, [1]),
        (3, 40, [0, 1]),
        (1, 48, [0]),
        (1, 96, list(range(13))),
        (1, 112, [0]),
    ],
)
def test_attention_features(dtype, heads, dim, taps):
    lengths = [n for n in (130, 0, 1, 64, 2, 34) if n == 0 or n > max(taps)]
    qkv, offsets = random_qkv(lengths, heads, dim, dtype)
    result = run(qkv, offsets, dim**-0.5, taps)
    for begin, end in itertools.pairwise(offsets.tolist()):
        if begin == end:
            continue
        exact = reference.attention_features(qkv[begin:end].double(), dim**-0.5, taps)
        rounded = torch_form(qkv[begin:end], dim**-0.5, taps)
        q, k, _ = qkv[begin:end].double().abs().permute(1, 2, 0, 3)
        products = dim**-0.5 * float((q @ k.mT).max())
        for name, truth, torch_result in zip(ALL, exact, rounded, strict=True):
            error = (result[name][begin:end].double() - truth).abs().max()
            allowed = 2 * (torch_result.double() - truth).abs().max() + 1e-6 * truth.abs().max()
            if name == "rows":
                allowed += truth.abs().max() * gpu_rounding.attention_weight(
                    dim, products, float(exact.lse.abs().max())
                )
            assert error <= allowed, f"{name}: {error:.2g} > {allowed:.2g}"
        sums = result["rows"][begin:end].sum(0)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_attention_features_do_not_depend_on_batch_composition():
    qkv, offsets = random_qkv([70, 150, 5], 2, 64, torch.float32)
    together = run(qkv, offsets, 0.125, [0])
    for begin, end in itertools.pairwise(offsets.tolist()):
        alone = run(qkv[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), 0.125, [0])
        assert all(torch.equal(alone[name], together[name][begin:end]) for name in ALL)


@pytest.mark.parametrize("scale", [3.0, 0.0, -0.5])
def test_attention_features_with_any_scale(scale):
    """Lengths with and without a last block of keys that extends past the end; a score of -Inf is a weight of 0."""
    qkv, offsets = random_qkv([128, 130, 64], 2, 32, torch.float32)
    if scale:
        qkv[:64, 0], qkv[5, 1] = qkv[:64, 0].abs(), -torch.inf * scale
    result = run(qkv, offsets, scale, [1])
    for begin, end in itertools.pairwise(offsets.tolist()):
        exact = reference.attention_features(qkv[begin:end].double(), scale, [1])
        tolerance = 2e-6 * max(1.0, float(exact.lse.abs().nan_to_num(posinf=0.0).max()))
        for name, truth in zip(("output", "rows", "lse"), exact, strict=False):
            torch.testing.assert_close(
                result[name][begin:end].double(), truth, rtol=10 * tolerance, atol=tolerance, equal_nan=True
            )


@pytest.mark.parametrize("want", [(), *((name,) for name in ALL)], ids=str)
def test_attention_features_computes_only_the_requested_fields(want):
    qkv, offsets = random_qkv([150, 71], 2, 32, torch.float32)
    everything = run(qkv, offsets, 0.2, [0, 70])
    result = run(qkv, offsets, 0.2, [0, 70], want)
    assert set(result) == set(want)
    assert all(torch.equal(result[name], everything[name]) for name in want)


@pytest.mark.parametrize("lengths, taps", [([], [0]), ([0, 0], [0]), ([3], [])], ids=str)
def test_attention_features_of_empty_input(lengths, taps):
    qkv, offsets = random_qkv(lengths, 2, 32, torch.float32)
    assert not any(value.isnan().any() for value in run(qkv, offsets, 1.0, taps).values())


def test_block_table_covers_every_token_once():
    from namedmask_kernels.triton import attention_features as kernels

    offsets = np.array([0, 5, 5, 12, 13], np.int32)
    table = kernels.block_table(offsets, 4)
    assert table.tolist() == [[5, 7, 0], [5, 7, 4], [0, 5, 0], [0, 5, 4], [12, 1, 0]]  # long sequences first
    assert kernels.block_table(offsets, 4, taps=(0, 6, 5)).tolist()[:2] == [[5, 7, 0], [5, 7, 4]]
    assert kernels.block_table(offsets, 4, taps=(0,)).tolist() == [[5, 7, 0], [0, 5, 0], [12, 1, 0]]


def test_tables_are_built_once_for_equal_arguments():
    from namedmask_kernels.triton import tables

    like, offsets = torch.empty(0, device=DEVICE), torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32)
    table = tables.table_on_device(tables.block_table, like, offsets, 4)
    assert table.device.type == DEVICE and table.tolist() == tables.block_table(offsets.numpy(), 4).tolist()
    assert tables.table_on_device(tables.block_table, like, offsets.clone(), 4) is table
    offsets[1] = 4  # in place: the key has the values
    others = [tables.table_on_device(tables.block_table, like, offsets, *more) for more in ((4,), (5,), (4, (0,)))]
    assert [other.tolist() for other in others] == [
        tables.block_table(offsets.numpy(), *more).tolist() for more in ((4,), (5,), (4, (0,)))
    ]


@pytest.mark.skipif(DEVICE == "cpu", reason="requires CUDA streams")
def test_every_stream_has_tables_of_its_own():
    from namedmask_kernels.triton import tables

    like, offsets = torch.empty(0, device=DEVICE), torch.tensor([0, 7], dtype=torch.int32)
    table = tables.table_on_device(tables.block_table, like, offsets, 2)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = tables.table_on_device(tables.block_table, like, offsets, 2)
        assert other is not table and other.tolist() == table.tolist()


def test_threads_launch_kernels_one_after_another():
    from namedmask_kernels.triton.launch import launch

    launches, running = [], threading.Lock()

    class Kernel:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                assert running.acquire(blocking=False), "two launches at once"
                time.sleep(0.001)
                running.release()
                launches.append((grid, arguments, options))

            return run

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(launch, Kernel(), (2, 3), i, TILE=4) for i in range(20)]:
            done.result()
    assert sorted(launches, key=str) == sorted([((2, 3), (i,), {"TILE": 4}) for i in range(20)], key=str)


def test_all_kernels_are_launched_by_launch():
    import namedmask_kernels.triton as package

    for path in Path(package.__path__[0]).glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        direct = [ast.unparse(call) for call in calls if isinstance(call, ast.Subscript)]
        assert direct == (["kernel[grid]"] if path.stem == "launch" else []), path.name


@pytest.mark.parametrize("scaled", [None, False, True], ids=["norm", "add", "add scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, channels", [(9, 384), (5, 50), (0, 64), (2, 2100)])
def test_residual_norm(rows, channels, dtype, scaled):
    from namedmask_kernels.triton.block_layers import residual_norm

    generator = torch.Generator().manual_seed(channels)
    x, y = (torch.randn(rows, channels, generator=generator).to(DEVICE, dtype) for _ in range(2))
    gamma, weight, bias = (torch.randn(channels, generator=generator).to(DEVICE, dtype) for _ in range(3))
    total = x.double() + (0 if scaled is None else y.double() * (gamma.double() if scaled else 1))
    normed = residual_norm(x, None if scaled is None else y, gamma if scaled else None, weight, bias, 1e-6)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(x.double(), total, **tolerance)
    exact = torch.nn.functional.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(normed.double(), exact, rtol=tolerance["rtol"], atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(dtype):
    from namedmask_kernels.triton.block_layers import gelu

    x = torch.linspace(-7, 7, 5000).reshape(100, 50).to(DEVICE, dtype)
    exact = torch.nn.functional.gelu(x.double())
    assert gelu(x) is x and len(gelu(x[:0])) == 0
    torch.testing.assert_close(x.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_backbone_with_and_without_fused_layers(name):
    """The ViT of the pipeline, with LayerScale and without."""
    timm, backbones = pytest.importorskip("timm"), pytest.importorskip("namedmask.backbones")
    torch.manual_seed(0)
    narrow = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
    model = timm.create_model(name, **narrow)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    backbone = backbones.Backbone(model, torch.device(DEVICE), torch.float32)
    patches = Ragged.of_shapes(torch.randn(5, 3 * backbone.patch**2).to(DEVICE), [(1, 3), (2, 1)])
    taps = ["tokens", "keys", "tokens.0"]
    results = []
    for backbone.fused in (False, True):
        results.append(backbone.extract(patches, taps))
    for tap in taps:
        torch.testing.assert_close(results[0][tap].rows, results[1][tap].rows, rtol=1e-4, atol=1e-5)


def pamr_batch(labels):
    """(masks, image) of odd sizes, Ragged; noisy masks, smooth colors with a strong edge."""
    generator = torch.Generator().manual_seed(labels)
    masks, images = [], []
    for h, w in [(5, 9), (0, 3), (1, 1), (1, 30)]:
        light = torch.linspace(0, 120, h * w).reshape(h, w, 1) + 20 * torch.rand(h, w, 3, generator=generator)
        images.append((light + 90 * (torch.arange(w) > w // 2)[None, :, None]).to(torch.uint8))
        masks.append(torch.rand(h, w, labels, generator=generator))
    return Ragged.pack(masks), Ragged.pack(images)


def run_pamr(masks, image, dilations, iterations):
    """Fills the output with NaN first, as above. `dilations`: one list, or one for each image."""
    from namedmask_kernels.triton import pamr as kernels

    lists = dilations if isinstance(dilations[0], list) else [dilations]
    numbers, counts = [d for own in lists for d in own], [len(own) for own in lists]
    out = torch.full_like(masks.rows, torch.nan).to(DEVICE)
    kernels.pamr(
        masks.rows.to(DEVICE), image.rows.to(DEVICE), masks.offsets, masks.shapes, out, numbers, counts, iterations
    )
    return masks.with_rows(out.cpu())


@pytest.mark.parametrize(
    "labels, dilations, iterations",
    [(1, [1, 4, 24], 2), (2, [2**40, 1], 1), (3, [3], 2), (6, [2], 3), (35, [1], 1)],
)
def test_pamr(labels, dilations, iterations):
    masks, image = pamr_batch(labels)
    result = run_pamr(masks, image, dilations, iterations)
    near = [min(d, 50) for d in dilations]
    for mask, pixels, refined in zip(masks.grids(), image.grids(), result.grids(), strict=True):
        exact = pamr_reference.pamr(mask.double(), pixels, near, iterations)
        torch.testing.assert_close(refined.double(), exact, rtol=0, atol=5e-5)
    alone = run_pamr(Ragged.pack(masks.grids()[:1]), Ragged.pack(image.grids()[:1]), dilations, iterations)
    assert torch.equal(alone.grids()[0], result.grids()[0])


def test_pamr_with_dilations_of_each_image():
    masks, image = pamr_batch(2)
    lists = [[1, 3, 24], [2, 2**40], [1], [5]]
    result = run_pamr(masks, image, lists, 2)
    for mask, pixels, dilations, refined in zip(masks.grids(), image.grids(), lists, result.grids(), strict=True):
        assert torch.equal(run_pamr(Ragged.pack([mask]), Ragged.pack([pixels]), dilations, 2).grids()[0], refined)


def test_pamr_of_empty_input_and_without_iterations():
    masks, image = pamr_batch(2)
    assert torch.equal(run_pamr(masks, image, [1], 0).rows, masks.rows)
    assert run_pamr(masks.with_rows(masks.rows[:, :0]), image, [1], 2).rows.shape == (len(masks.rows), 0)
    empty = Ragged.of_shapes(torch.zeros(0, 4), [])
    assert run_pamr(empty, empty.with_rows(torch.zeros(0, 3, dtype=torch.uint8)), [1], 2).rows.shape == (0, 4)


def test_pixel_table_covers_every_pixel_once():
    from namedmask_kernels.triton import pamr as kernels

    masks = Ragged.of_shapes(torch.zeros(6 + 0 + 9), [(2, 3), (0, 4), (3, 3)])
    arrays = masks.offsets.numpy(), masks.shapes.numpy()
    blocks = [[0, 2, 3, 0], [0, 2, 3, 4], [6, 3, 3, 0], [6, 3, 3, 4], [6, 3, 3, 8]]
    assert kernels.pixel_table(*arrays, (7,), 4).tolist() == [[*block, 0, 7] for block in blocks]
    table = kernels.pixel_table(*arrays, (2, 1, 3), 4)
    assert table.tolist() == [[*block, *own] for block, own in zip(blocks, [(0, 2)] * 2 + [(3, 3)] * 3, strict=True)]


def tokens(shapes, channels, noise=0.7):
    """float32 features [T, channels], Ragged: two directions and noise; image 0 has a zero, a tiny and a huge row."""
    generator = torch.Generator().manual_seed(channels)
    grids = []
    for h, w in shapes:
        directions = torch.randn(2, channels, generator=generator)[(torch.arange(w) > w // 2).int()]
        grids.append(directions + noise * torch.randn(h, w, channels, generator=generator))
    batch = Ragged.pack(grids)
    for row, factor in zip(range(3), (0, 1e-9, 1e25), strict=False):
        batch.rows[row] *= factor
    return batch


@pytest.mark.parametrize("channels", [1, 64, 100])
def test_normalized_rows(channels):
    from namedmask_kernels.triton.normalized_rows import normalized_rows

    features = tokens([(5, 7)], channels).rows
    high, low, finite = normalized_rows(features.to(DEVICE))
    exact = features.double() / features.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    result = (high.cpu().double() + low.cpu().double()) / 256
    torch.testing.assert_close(result[:, :channels], exact, rtol=2**-22, atol=2**-33)
    assert not result[:, channels:].any() and finite.all()
    features[3, -1], features[4, 0] = torch.nan, torch.inf
    assert normalized_rows(features.to(DEVICE)).finite.logical_not().nonzero().flatten().tolist() == [3, 4]


def run_walk(masks, features, *settings):
    from namedmask_kernels.triton import random_walk as kernels

    out = torch.full_like(masks.rows, torch.nan).to(DEVICE)
    kernels.random_walk(masks.rows.to(DEVICE), features.rows.to(DEVICE), masks.offsets, out, *settings)
    return masks.with_rows(out.cpu())


@pytest.mark.parametrize(
    "masks, channels, steps, sharpness", [(1, 5, 1, 10.0), (20, 64, 3, 10.0), (70, 100, 2, 60.0), (3, 16, 2, 0.0)]
)
@pytest.mark.parametrize("kept", [0, 1, 5, 2**14], ids="{} tiles kept".format)
def test_random_walk(masks, channels, steps, sharpness, kept, monkeypatch):
    from namedmask_kernels.triton import random_walk as kernels

    monkeypatch.setattr(kernels, "MOST_KEPT", kept * kernels.TILE**2)  # the images require 4, 0, 1 and 1 tiles
    features = tokens([(9, 17), (0, 4), (1, 1), (8, 8)], channels)
    soft = features.with_rows(torch.rand(len(features.rows), masks, generator=torch.Generator().manual_seed(0)))
    result = run_walk(soft, features, steps, sharpness)
    for mask, image, walked in zip(soft.grids(), features.grids(), result.grids(), strict=True):
        rows = mask.flatten(0, 1), image.flatten(0, 1)
        exact = walk_reference.random_walk(*(x.double() for x in rows), steps, sharpness)
        allowed = 1e-6 + gpu_rounding.random_walk(len(exact), steps, sharpness)
        torch.testing.assert_close(walked.flatten(0, 1).double(), exact, rtol=0, atol=allowed)
    last = [Ragged.pack(batch.grids()[-1:]) for batch in (soft, features)]
    assert torch.equal(run_walk(*last, steps, sharpness).rows, result.grids()[-1].flatten(0, 1))


def test_random_walk_writes_all_weights_that_it_reads(fill_memory):
    features = tokens([(9, 17), (8, 8)], 16)
    soft = features.with_rows(torch.rand(len(features.rows), 3))
    expected = run_walk(soft, features, 2, 10.0)
    with fill_memory():
        assert torch.equal(run_walk(soft, features, 2, 10.0).rows, expected.rows)


@pytest.mark.parametrize("most, allocated", [(0, 0), (3, 2), (5, 5), (9, 6)])
def test_random_walk_allocates_weights_once_for_all_images(most, allocated, monkeypatch):
    from namedmask_kernels.triton import random_walk as kernels

    features = tokens([(9, 17), (8, 8), (0, 4), (8, 8)], 5)  # of 4, 1, 0 and 1 tiles
    monkeypatch.setattr(kernels, "MOST_KEPT", most * kernels.TILE**2)
    plain, sizes = torch.Tensor.new_empty, []

    def noted(tensor, size, **options):
        sizes.append(size)
        return plain(tensor, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    run_walk(features, features, 1, 10.0)
    assert sum(sizes) == allocated * kernels.TILE**2


def test_random_walk_of_more_images_than_a_grid_takes(monkeypatch):
    """Images without tokens count, too: they are the only ones of which MOST_KEPT allows that many."""
    from namedmask_kernels.triton import random_walk as kernels

    features = tokens([(0, 4), (2, 3), (0, 1), (0, 0), (5, 1), (4, 4), (0, 2), (0, 2), (0, 2), (1, 1)], 8)
    expected = run_walk(features, features, 2, 10.0)
    grids = []

    class Launcher:
        def __getitem__(self, grid, kernel=kernels._keep):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "MOST_BLOCKS", 3)
    monkeypatch.setattr(kernels, "_keep", Launcher())
    assert torch.equal(run_walk(features, features, 2, 10.0).rows, expected.rows)
    assert [images for _, images in grids] == [3, 3, 1]


def test_dimensions_beyond_the_limits_of_a_grid_are_rejected(monkeypatch):
    from namedmask_kernels.triton import pamr, tables

    monkeypatch.setattr(tables, "MOST_BLOCKS", 2)
    with pytest.raises(ValueError, match="attention_features: heads must be at most 2 on a GPU, but are 3"):
        run(*random_qkv([4], 3, 8, torch.float32), 1.0, [0])
    features = tokens([(3, 4)], 65)
    with pytest.raises(ValueError, match="random_walk: masks must be at most 64 on a GPU, but are 65"):
        run_walk(features, features, 1, 10.0)
    most = 2 * pamr.MAX_VECTOR
    masks, image = torch.rand(12, most + 1), torch.zeros(12, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"pamr: labels must be at most {most} on a GPU, but are {most + 1}"):
        pamr.pamr(masks, image, features.offsets, features.shapes, masks.clone(), [1], [1], 1)
    run_walk(features.with_rows(features.rows[:, :64]), features, 1, 10.0)


def test_random_walk_of_empty_input_without_steps_and_of_features_that_are_not_finite():
    features = tokens([(3, 4), (2, 2)], 8)
    soft = features.with_rows(torch.rand(16, 2))
    assert torch.equal(run_walk(soft, features, 0, 10.0).rows, soft.rows)
    assert run_walk(soft.with_rows(soft.rows[:, :0]), features, 2, 10.0).rows.shape == (16, 0)
    empty = Ragged.of_shapes(torch.zeros(0, 2), [])
    assert run_walk(empty, empty, 2, 10.0).rows.shape == (0, 2)
    features.rows[13, 3] = torch.nan
    with pytest.raises(ValueError, match="random_walk: features must be finite, but image 1 holds NaN or Inf"):
        run_walk(soft, features, 2, 10.0)


@pytest.mark.parametrize("channels, tau", [(2, 0.5), (64, 0.2), (100, -0.1), (16, -1.5), (16, 1.0)])
def test_affinity_bits(channels, tau):
    from namedmask_kernels.triton.normalized_cut import affinity_bits
    from namedmask_kernels.triton.normalized_rows import normalized_rows

    batch = tokens([(12, 25), (0, 4), (1, 1), (8, 16), (1, 129)], channels)
    features = batch.rows
    bits = affinity_bits(normalized_rows(features.to(DEVICE)), batch.offsets, tau).cpu()
    for begin, end in itertools.pairwise(batch.offsets.tolist()):
        tiles = -(-(end - begin) // 128)
        mine, bits = bits[: tiles**2 * 512], bits[tiles**2 * 512 :]
        result = np.unpackbits(mine.numpy().view(np.uint8), bitorder="little").reshape(tiles, tiles * 128, 128)
        result = result.swapaxes(0, 1).reshape(tiles * 128, tiles * 128)
        inside = result[: end - begin, : end - begin]
        assert result.sum() == inside.sum() and np.array_equal(inside, inside.T)
        unit = torch.nn.functional.normalize(features[begin:end].double(), dim=1)
        clear = ((unit @ unit.T).clamp(max=1) - tau).abs().numpy() > (0 if tau == 1 else 1e-6)
        expected = cut_reference.edges(features[begin:end], tau)
        assert np.array_equal(inside[clear], expected[clear]) and clear.sum() >= 0.99 * clear.size
    assert len(bits) == 0


@pytest.mark.parametrize("channels", [2, 64])
def test_cosine_ranges(channels):
    from namedmask_kernels.triton.normalized_rows import normalized_rows
    from namedmask_kernels.triton.spectral_clusters import cosine_ranges

    batch = tokens([(12, 25), (0, 4), (1, 1), (1, 129)], channels)
    result = cosine_ranges(normalized_rows(batch.rows.to(DEVICE)), batch.offsets).cpu()
    for range_, grid in zip(result, batch.grids(), strict=True):
        unit = torch.nn.functional.normalize(grid.flatten(0, 1).double(), dim=1)
        smallest, largest = (unit @ unit.T).aminmax() if len(unit) else (torch.inf, -torch.inf)
        torch.testing.assert_close(range_, torch.tensor([smallest, largest], dtype=torch.float32), rtol=0, atol=1e-6)
