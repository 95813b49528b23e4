# SPDX-License-Identifier: MIT
"""`namedmask segment` compared with the network in torch, one photo at a time: photos per second, including decoding.

A ResNet-50 with 21 classes and random weights on 480 x 640 JPEGs; `--quick` takes a small encoder and small photos.
"""

import torch
from bench_bilateral_solver import make_image
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import matrix_rate, paired_medians, report
from namedmask.backbones import untrained_encoder
from namedmask.photos import PhotoSource
from namedmask.segmenter.deeplab import DeepLab
from namedmask.segmenter.predict import Segmenter
from namedmask.threads import thread_count

CLASSES = 21


def network(quick: bool, classes: int = CLASSES) -> DeepLab:
    torch.manual_seed(0)
    encoder, head_channels = ("test_resnet", 32) if quick else ("resnet50", 256)
    return DeepLab(untrained_encoder(encoder), classes, head_channels).eval().requires_grad_(False)


def photos(folder, quick: bool) -> PhotoSource:
    height, width = (96, 128) if quick else (480, 640)
    for i in range(2):
        Image.fromarray(make_image(i, height, width)[1]).save(folder / f"{i}.jpg", quality=92)
    return PhotoSource(folder)


@torch.inference_mode()
def plain(net: DeepLab, source: PhotoSource, name: str, dtype=torch.float32, memory=torch.contiguous_format):
    """Labels of a photo in plain torch: decode, normalize, forward, resize all logits, argmax."""
    pixels = torch.from_numpy(source.decode(name).pixels).permute(2, 0, 1)[None]
    return net(net.normalized(pixels).to(dtype, memory_format=memory))[0].argmax(0)


def test_segment(benchmark, tmp_path, quick):
    source = photos(tmp_path, quick)
    names, net = list(source), network(quick)
    segmenter = Segmenter(network(quick), [f"class {n}" for n in range(1, CLASSES)])

    def ours():
        return [mask for batch in segmenter.segment(source, names) for _, _, mask in batch]

    for name, mask in zip(names, ours(), strict=True):
        assert (plain(net, source, name).numpy() == mask).mean() > 0.99
    last = network(quick).to(memory_format=torch.channels_last)
    half = network(quick).to(torch.bfloat16, memory_format=torch.channels_last)
    seconds = paired_medians(
        {
            "ours": ours,
            "torch, one photo at a time": lambda: [plain(net, source, name) for name in names],
            "torch, channels last": lambda: [plain(last, source, name, memory=torch.channels_last) for name in names],
            "torch, channels last, bfloat16": lambda: [
                plain(half, source, name, torch.bfloat16, torch.channels_last) for name in names
            ],
        },
        rounds=3,
        seconds=60,
    )
    benchmark.pedantic(ours, rounds=1)
    with FlopCounterMode(display=False) as counter:
        plain(net, source, names[0])
    flops, ceiling = counter.get_total_flops(), matrix_rate()
    title = f"segment: {CLASSES} classes, {'small' if quick else '480 x 640'}, {thread_count()} threads"
    report(
        title,
        [
            {
                "method": method,
                "photos/s": len(names) / s,
                "GFLOP/s": flops * len(names) / s / 1e9,
                "share of sgemm": f"{flops * len(names) / s / ceiling:.0%}",
                "time / ours": s / seconds["ours"],
            }
            for method, s in seconds.items()
        ],
    )
