# SPDX-License-Identifier: MIT
"""Keys and CLS attention of a ViT-S/8's last block, beside what people do today: timm's forward with hooks that compute
them once more, photos one at a time or padded to the largest with a mask.

`pytest bench/bench_backbones.py --benchmark-only -s` prints the tables. The weights are random: they cost the same.
"""

import itertools

import pytest
import timm
import torch

from common import paired_medians, report, threads
from namedmask import backbones

TAPS = ["keys", "cls_attention"]


def backbone(dtype, quick):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch8_224.dino", num_classes=0, dynamic_img_size=True, depth=2 if quick else 12
    )
    return backbones.Backbone(model, torch.device("cpu"), dtype)


class Hooked:
    """timm's model whose last block's q and k are computed once more from what a hook sees go in."""

    def __init__(self, model):
        self.model, self.seen = model, None
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


def padded(hooked, runner, photos):
    """All photos at once, padded to the largest; attention masks the padding."""
    with torch.inference_mode():
        batch = runner._embed(photos)
        tokens = torch.nn.utils.rnn.pad_sequence(batch.tokens.split(batch.lengths), batch_first=True)
    return hooked(tokens, batch.lengths)


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
def test_one_photo(benchmark, dtype, quick):
    runner, side = backbone(dtype, quick), 160 if quick else 480
    photo, hooked = torch.randn(3, side, side).to(dtype), Hooked(runner.model)
    check(runner.extract([photo], TAPS), hooked(photo[None]), dtype)
    calls = {"extract": lambda: runner.extract([photo], TAPS), "timm and hooks": lambda: hooked(photo[None])}
    table(f"keys and CLS attention, {side} x {side}, {str(dtype)[6:]}", runner, calls, benchmark)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sixteen_shapes(benchmark, dtype, quick):
    runner = backbone(dtype, quick)
    sides = (10, 13) if quick else (19, 25, 31, 37)
    photos = [torch.randn(3, 8 * h, 8 * w).to(dtype) for h, w in itertools.product(sides, [s + 3 for s in sides])]
    hooked = Hooked(runner.model)

    def one_at_a_time():
        return [hooked(photo[None])[0] for photo in photos]

    some = photos[::5]
    found = runner.extract(some, TAPS)
    check(found, [hooked(photo[None])[0] for photo in some], dtype)
    check(found, padded(hooked, runner, some), dtype)
    calls = {
        "extract": lambda: runner.extract(photos, TAPS),
        "timm and hooks, one at a time": one_at_a_time,
        "timm and hooks, padded": lambda: padded(hooked, runner, photos),
    }
    table(
        f"keys and CLS attention, {len(photos)} photos of {len(photos)} shapes, {str(dtype)[6:]}",
        runner,
        calls,
        benchmark,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_libraries(benchmark, dtype, quick):
    """The table that `namedmask.backbones.FASTEST` holds: attention of a block that needs only the plain output."""
    lengths = [401, 1601] if quick else [785, 1601, 3601]
    qkv = torch.randn(sum(lengths), 3, 6, 64).to(dtype)
    batch = backbones._Batch(qkv, lengths, [0, *itertools.accumulate(lengths)], [], [])
    calls = {
        name: lambda attend=attend: attend(*qkv.unbind(1), batch, 0.125)
        for name, attend in backbones.ATTENTIONS.items()
    }
    found = [call() for call in calls.values()]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    with threads(2):
        seconds = paired_medians(calls, rounds=9, seconds=10)
        benchmark.pedantic(calls["attention_features"], rounds=1)
    chosen = backbones.FASTEST.get(("cpu", dtype), "torch SDPA")
    report(
        f"attention alone, sequences of {lengths} tokens, {str(dtype)[6:]}, 2 threads",
        [{"who": who, "ms": 1e3 * s, "chosen": "yes" if who == chosen else ""} for who, s in seconds.items()],
    )
