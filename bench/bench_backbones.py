# SPDX-License-Identifier: MIT
"""Keys and CLS attention of the last block of a ViT-S/8, compared with timm's forward and hooks that recompute them.

The peers process photos one at a time, or padded to the largest with a mask. A further bench compares the attention of
each library. `pytest bench/bench_backbones.py --benchmark-only -s` prints the tables. The weights are random, which
does not change the time.
"""

import copy
import itertools

import pytest
import timm
import torch

from common import paired_medians, report, threads
from namedmask import attention, backbones
from namedmask_kernels import Ragged

TAPS = ["keys", "cls_attention"]


def runners(dtype, quick):
    """The backbone, and timm's model with hooks and the same weights, by dtype."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch8_224.dino", num_classes=0, dynamic_img_size=True, depth=2 if quick else 12
    )
    peers = {t: Hooked(copy.deepcopy(model).to(t)) for t in dict.fromkeys((dtype, torch.float32))}
    return backbones.Backbone(model, torch.device("cpu"), dtype), peers


class Hooked:
    """timm's model with a hook on the attention of the last block, from whose input q and k are recomputed."""

    def __init__(self, model):
        self.model, self.inputs = model.eval(), None
        model.blocks[-1].attn.register_forward_hook(lambda attn, args, out: setattr(self, "inputs", args[0]))

    @torch.inference_mode()
    def __call__(self, photos, counts=None):
        """photos [B, 3, h, w], or padded tokens [B, n, C] and their numbers `counts` -> [(keys, CLS attention)]."""
        attn = self.model.blocks[-1].attn
        if counts is None:
            self.model.forward_features(photos)
            counts = [self.inputs.shape[1]] * len(photos)
        else:
            longest = max(counts)
            mask = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
            for block in self.model.blocks:
                photos = block(photos, attn_mask=mask[:, None, None])
        results = []
        for x, n in zip(self.inputs, counts, strict=True):
            q, k, _ = attn.qkv(x[:n]).unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            weights = (attn.scale * q[:, :1] @ k.mT).softmax(-1)[:, 0]
            results.append((k.transpose(0, 1).flatten(1)[1:], weights.T[1:]))
        return results


@torch.inference_mode()
def padded(hooked, photos):
    """All photos in one batch, padded to the largest; attention masks the padding."""
    model = hooked.model
    tokens = [model.norm_pre(model._pos_embed(model.patch_embed(photo[None])))[0] for photo in photos]
    return hooked(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), [len(t) for t in tokens])


def patches_of(photos):
    """The patches of normalized photos [3, h, w], as `Backbone.prepare` packs them."""
    rows = [torch.nn.functional.unfold(photo[None], 8, stride=8)[0].T for photo in photos]
    return Ragged.of_shapes(torch.cat(rows), [(photo.shape[1] // 8, photo.shape[2] // 8) for photo in photos])


def check(features, expected_features, dtype):
    """Asserts that keys and weights are equal up to the rounding of a network in this dtype."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for tap, expected in zip(TAPS, zip(*expected_features, strict=True), strict=True):
        for grid, rows in zip(features[tap].grids(), expected, strict=True):
            error = (grid.flatten(0, 1) - rows).norm() / rows.norm()
            assert error < tolerance, f"{tap}: {error:.2g}"


def table(title, runner, calls, benchmark):
    with threads(2):
        seconds = paired_medians(calls, rounds=5, seconds=20)
        benchmark.pedantic(calls["extract"], rounds=1)
    report(
        f"{title}, ViT-S/8 with {len(runner.model.blocks)} blocks, 2 threads",
        [{"method": method, "s": s, "time / ours": s / seconds["extract"]} for method, s in seconds.items()],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sides", [(480, 480), (512, 680)], ids=str)
def test_one_photo(benchmark, sides, dtype, quick):
    if quick and sides != (480, 480):
        pytest.skip("large size")
    (runner, peers), (h, w) = runners(dtype, quick), (160, 160) if quick else sides
    photo = torch.randn(3, h, w)
    check(runner.extract(patches_of([photo]), TAPS), peers[dtype](photo[None].to(dtype)), dtype)
    patches = patches_of([photo])
    calls = {"extract": lambda: runner.extract(patches, TAPS)}
    for t, hooked in peers.items():
        calls[f"timm {str(t)[6:]} and hooks"] = lambda t=t, hooked=hooked: hooked(photo[None].to(t))
    table(f"keys and CLS attention, {h} x {w}, {str(dtype)[6:]}", runner, calls, benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sixteen_shapes(benchmark, dtype, quick):
    runner, peers = runners(dtype, quick)
    sides = (10, 13) if quick else (19, 25, 31, 37)
    photos = [torch.randn(3, 8 * h, 8 * w) for h, w in itertools.product(sides, [s + 3 for s in sides])]
    some = [photo.to(dtype) for photo in photos[::5]]
    features = runner.extract(patches_of(some), TAPS)
    check(features, [peers[dtype](photo[None])[0] for photo in some], dtype)
    check(features, padded(peers[dtype], some), dtype)
    patches = patches_of(photos)
    calls = {"extract": lambda: runner.extract(patches, TAPS)}
    for t, hooked in peers.items():
        inputs, method = [photo.to(t) for photo in photos], f"timm {str(t)[6:]} and hooks"
        calls[f"{method}, one at a time"] = lambda hooked=hooked, inputs=inputs: [
            hooked(photo[None]) for photo in inputs
        ]
        calls[f"{method}, padded"] = lambda hooked=hooked, inputs=inputs: padded(hooked, inputs)
    title = f"keys and CLS attention, {len(photos)} photos of {len(photos)} shapes, {str(dtype)[6:]}"
    table(title, runner, calls, benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_libraries(benchmark, dtype, quick):
    """Measures `namedmask.attention.TABLE`: attention of a block of which only the plain output is needed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    absent = {name: attention.obstacle(name, device, dtype) for name in attention.LIBRARIES}
    present = {name: attend for name, attend in attention.LIBRARIES.items() if absent[name] is None}
    rows = []
    for dim, lengths in itertools.product((32, 64, 128), ((197,) * 4, (785,) * 2, (1601,), (3601,), (300, 800, 1500))):
        if quick and sum(lengths) > 1600:
            continue
        qkv = torch.randn(sum(lengths), 3, 384 // dim, dim, device=device).to(dtype)
        ends = [0, *itertools.accumulate(lengths)]
        calls = {
            name: lambda attend=attend, qkv=qkv, ends=ends, dim=dim: (attend(qkv, ends, dim**-0.5), finish())[0]
            for name, attend in present.items()
        }
        for call in calls.values():
            torch.testing.assert_close(
                call(), calls["torch SDPA"](), rtol=0, atol=1e-5 if dtype.itemsize == 4 else 2e-2
            )
        with threads(2):
            seconds = paired_medians(calls, rounds=7, seconds=3)
        tokens = ", ".join(f"{lengths.count(n)} x {n}" for n in dict.fromkeys(lengths))
        rows.append(
            {"head dim": dim, "tokens": tokens}
            | {f"{name}, ms": 1e3 * s for name, s in seconds.items()}
            | {"fastest": (fastest := min(seconds, key=seconds.get))}
            | {"SDPA / fastest": seconds["torch SDPA"] / seconds[fastest]}
        )
    benchmark.pedantic(calls["attention_features"], rounds=1)
    kind, missing = attention.device_class(device), "; ".join(f"{n} is absent: {r}" for n, r in absent.items() if r)
    title = f"attention alone, {str(dtype)[6:]}, {kind}, 2 threads, torch's {torch.backends.cpu.get_cpu_capability()}"
    report(f"{title}; chosen: {attention.choose(device, dtype)}; {missing}", rows)
