# SPDX-License-Identifier: MIT
"""Relabeling of an archive by category experts, compared with a plain loop in torch: masks per second.

Experts with a ResNet-50 (random weights), and 480 x 640 JPEGs that are in the archives of two categories; `--quick`
takes a small encoder and small photos. The accuracy of experts is measured on the demo's photos (ABLATIONS.md).
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
    encoder, head_channels = ("test_resnet", 32) if quick else ("resnet50", 256)
    shared = SharedExperts(untrained_encoder(encoder), 80, head_channels).eval().requires_grad_(False)
    all_experts = Segmenter(shared, ["object"] * 80)

    def separate():
        results = [relabel(source, by_category[c], expert, lambda logits, _: logits[1] - logits[0]) for c in CATEGORIES]
        return [record for result in results for _, records in result for record in records]

    def together():
        indices = {c: torch.tensor([k]) for k, c in enumerate(CATEGORIES)}
        logits = lambda features, c: shared.layers.logits(features[None], indices[c])[0]  # noqa: E731
        return [record for _, records in relabel(source, by_photo, all_experts, logits) for record in records]

    @torch.inference_mode()
    def plain():
        masks = []
        for category in CATEGORIES:
            for name in names:
                pixels = torch.from_numpy(source.decode(name).pixels).permute(2, 0, 1)[None]
                mask = net(net.normalized(pixels))[0].argmax(0).numpy() == 1
                masks.append(MaskRecord.from_mask(name, mask, category, 0.3, 0.5))
        return masks

    for ours, expected in zip(separate(), plain(), strict=True):
        assert (ours.photo, ours.category) == (expected.photo, expected.category)
        assert (ours.mask() == expected.mask()).mean() > 0.99
    assert len(together()) == len(records)
    calls = {"ours, separate": separate, "ours, shared, 80 categories": together, "torch, one photo at a time": plain}
    seconds = paired_medians(calls, rounds=3, seconds=60)
    benchmark.pedantic(separate, rounds=1)
    title = f"relabel: photos in two archives, {'small' if quick else '480 x 640'}, {thread_count()} threads"
    report(
        title,
        [
            {"method": method, "masks/s": len(records) / s, "time / ours": s / seconds["ours, separate"]}
            for method, s in seconds.items()
        ],
    )
