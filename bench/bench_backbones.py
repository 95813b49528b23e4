# SPDX-License-Identifier: MIT
"""Keys and CLS attention of a ViT-S/8's last block, beside what people do today: timm's forward with hooks that compute
them once more, photos one at a time or padded to the largest with a mask. And attention alone, by each library.

`pytest bench/bench_backbones.py --benchmark-only -s` prints the tables. The weights are random: they cost the same.
"""

import copy
import itertools

import pytest
import timm
import torch

from common import paired_medians, report, threads
from namedmask import attention, backbones

TAPS = ["keys", "cls_attention"]


def runners(dtype, quick):
    """The backbone, and timm's model with the same weights and hooks in each dtype of peers."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch8_224.dino", num_classes=0, dynamic_img_size=True, depth=2 if quick else 12
    )
    peers = {t: Hooked(copy.deepcopy(model).to(t)) for t in dict.fromkeys((dtype, torch.float32))}
    return backbones.Backbone(model, torch.device("cpu"), dtype), peers


class Hooked:
    """timm's model whose last block's q and k are computed once more from what a hook sees go in."""

    def __init__(self, model):
        self.model, self.seen = model.eval(), None
        model.blocks[-1].attn.register_forward_hook(lambda attn, given, out: setattr(self, "seen", given[0]))

    @torch.inference_mode()
    def __call__(self, photos, counts=None):
        """photos [B, 3, h, w], or tokens [B, n, C] with `counts` that are no padding -> [(keys, CLS attention)]."""
        attn = self.model.blocks[-1].attn
        if counts is None:
            self.model.forward_features(photos)
            counts = [self.seen.shape[1]] * len(photos)
        else:
            longest = max(counts)
            mask = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
            for block in self.model.blocks:
                photos = block(photos, attn_mask=mask[:, None, None])
        found = []
        for x, n in zip(self.seen, counts, strict=True):
            q, k, _ = attn.qkv(x[:n]).unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            weights = (attn.scale * q[:, :1] @ k.mT).softmax(-1)[:, 0]
            found.append((k.transpose(0, 1).flatten(1)[1:], weights.T[1:]))
        return found


@torch.inference_mode()
def padded(hooked, photos):
    """All photos at once, padded to the largest; attention masks the padding."""
    model = hooked.model
    tokens = [model.norm_pre(model._pos_embed(model.patch_embed(photo[None])))[0] for photo in photos]
    return hooked(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), [len(t) for t in tokens])


def check(found, theirs, dtype):
    """The same keys and weights, to what a network in this dtype rounds."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for tap, expected in zip(TAPS, zip(*theirs, strict=True), strict=True):
        for grid, rows in zip(found[tap].grids(), expected, strict=True):
            error = (grid.flatten(0, 1) - rows).norm() / rows.norm()
            assert error < tolerance, f"{tap}: {error:.2g}"


def table(title, runner, calls, benchmark):
    with threads(2):
        seconds = paired_medians(calls, rounds=5, seconds=20)
        benchmark.pedantic(calls["extract"], rounds=1)
    report(
        f"{title}, ViT-S/8 with {len(runner.model.blocks)} blocks, 2 threads",
        [{"who": who, "s": s, "times ours": s / seconds["extract"]} for who, s in seconds.items()],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sides", [(480, 480), (512, 680)], ids=str)
def test_one_photo(benchmark, sides, dtype, quick):
    if quick and sides != (480, 480):
        pytest.skip("the large size")
    (runner, peers), (h, w) = runners(dtype, quick), (160, 160) if quick else sides
    photo = torch.randn(3, h, w)
    check(runner.extract([photo], TAPS), peers[dtype](photo[None].to(dtype)), dtype)
    calls = {"extract": lambda: runner.extract([photo], TAPS)}
    for t, hooked in peers.items():
        calls[f"timm {str(t)[6:]} and hooks"] = lambda t=t, hooked=hooked: hooked(photo[None].to(t))
    table(f"keys and CLS attention, {h} x {w}, {str(dtype)[6:]}", runner, calls, benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sixteen_shapes(benchmark, dtype, quick):
    runner, peers = runners(dtype, quick)
    sides = (10, 13) if quick else (19, 25, 31, 37)
    photos = [torch.randn(3, 8 * h, 8 * w) for h, w in itertools.product(sides, [s + 3 for s in sides])]
    some = [photo.to(dtype) for photo in photos[::5]]
    found = runner.extract(some, TAPS)
    check(found, [peers[dtype](photo[None])[0] for photo in some], dtype)
    check(found, padded(peers[dtype], some), dtype)
    calls = {"extract": lambda: runner.extract(photos, TAPS)}
    for t, hooked in peers.items():
        given, who = [photo.to(t) for photo in photos], f"timm {str(t)[6:]} and hooks"
        calls[f"{who}, one at a time"] = lambda hooked=hooked, given=given: [hooked(photo[None]) for photo in given]
        calls[f"{who}, padded"] = lambda hooked=hooked, given=given: padded(hooked, given)
    title = f"keys and CLS attention, {len(photos)} photos of {len(photos)} shapes, {str(dtype)[6:]}"
    table(title, runner, calls, benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_libraries(benchmark, dtype, quick):
    """What `namedmask.attention.TABLE` is made from: attention of a block that needs only the plain output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    absent = {name: attention.obstacle(name, device) for name in attention.LIBRARIES}
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
            | {"SDPA's time / fastest": seconds["torch SDPA"] / seconds[fastest]}
        )
    benchmark.pedantic(calls["attention_features"], rounds=1)
    kind, missing = attention.device_class(device), "; ".join(f"{n} is absent: {r}" for n, r in absent.items() if r)
    title = f"attention alone, {str(dtype)[6:]}, {kind}, 2 threads, torch's {torch.backends.cpu.get_cpu_capability()}"
    report(f"{title}; chosen: {attention.choose(device, dtype)}; {missing}", rows)
