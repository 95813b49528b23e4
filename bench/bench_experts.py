# SPDX-License-Identifier: MIT
"""Relabeling an archive with category experts: photos per second beside the plain way of writing it down.

An expert on a ResNet-50 (random weights) and 480 x 640 JPEGs that stand in the archives of two categories; `--quick`: a
small encoder, small photos. What the masks are worth is measured on the demo's photos, not here.
"""

import numpy as np
import torch
from bench_segment import network, photos

from common import paired_medians, report
from namedmask.backbones import untrained_encoder
from namedmask.experts import SharedExperts, relabel
from namedmask.masks import MaskRecord
from namedmask.segmenter.predict import Segmenter
from namedmask.threads import thread_count

CATEGORIES = ("cat", "dog")


def test_relabel(benchmark, tmp_path, quick):
    source = photos(tmp_path, quick)
    names = list(source)
    size = source.decode(names[0]).pixels.shape[:2]
    records = [MaskRecord.from_mask(n, np.ones(size, bool), c, 0.3, 0.5) for n in names for c in CATEGORIES]
    by_category = {c: {r.photo: [r] for r in records if r.category == c} for c in CATEGORIES}
    by_photo = {n: [r for r in records if r.photo == n] for n in names}
    net = network(quick, 2)
    expert = Segmenter(network(quick, 2), ["object"])
    torch.manual_seed(0)
    encoder, width = ("test_resnet", 32) if quick else ("resnet50", 256)
    shared = SharedExperts(untrained_encoder(encoder), 80, width).eval().requires_grad_(False)
    all_experts = Segmenter(shared, ["object"] * 80)

    def separate():
        found = [relabel(source, by_category[c], expert, lambda logits, _: logits[1] - logits[0]) for c in CATEGORIES]
        return [r for one in found for _, new in one for r in new]

    def at_once():
        place = {c: torch.tensor([k]) for k, c in enumerate(CATEGORIES)}
        logits = lambda features, c: shared.layers.logits(features[None], place[c])[0]  # noqa: E731
        return [r for _, new in relabel(source, by_photo, all_experts, logits) for r in new]

    @torch.inference_mode()
    def plain():
        made = []
        for category in CATEGORIES:
            for name in names:
                pixels = torch.from_numpy(source.decode(name).pixels).permute(2, 0, 1)[None]
                mask = net(net.normalized(pixels))[0].argmax(0).numpy() == 1
                made.append(MaskRecord.from_mask(name, mask, category, 0.3, 0.5))
        return made

    for ours, theirs in zip(separate(), plain(), strict=True):
        assert (ours.photo, ours.category) == (theirs.photo, theirs.category)
        assert (ours.mask() == theirs.mask()).mean() > 0.99
    assert len(at_once()) == len(records)
    calls = {"ours, separate": separate, "ours, shared, 80 categories": at_once, "torch, a photo at a time": plain}
    seconds = paired_medians(calls, rounds=3, seconds=60)
    benchmark.pedantic(separate, rounds=1)
    title = f"relabel: photos in two archives, {'small' if quick else '480 x 640'}, {thread_count()} threads"
    report(
        title,
        [
            {"who": who, "masks/s": len(records) / s, "time / ours": s / seconds["ours, separate"]}
            for who, s in seconds.items()
        ],
    )
