# SPDX-License-Identifier: MIT
"""Training of a segmenter: a step of DeepLabv3+ on ResNet-50, and the throughput of the data pipeline.

`pytest bench/bench_segmenter.py --benchmark-only -s` prints the tables. The weights are random, which does not change
the time.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_bilateral_solver import make_image
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from common import matrix_rate, paired_medians, report
from namedmask.backbones import untrained_encoder
from namedmask.config import SegmenterTraining
from namedmask.distributed import Worker
from namedmask.masks import MaskRecord
from namedmask.photos import PhotoSource
from namedmask.progress import Progress
from namedmask.segmenter.augment import IGNORE
from namedmask.segmenter.deeplab import DeepLab, on_device
from namedmask.segmenter.training import Sample, accumulate_gradients, batches
from namedmask.threads import thread_count
from namedmask.training import TrainingPhotos

CLASSES, PHOTOS = 21, 2  # photos per step; its time is proportional to them


def make_network(quick: bool) -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(untrained_encoder("test_resnet" if quick else "resnet50"), CLASSES, 32 if quick else 256).train()


def settings_of(quick: bool, **changed) -> SegmenterTraining:
    return SegmenterTraining(**({"crop_size": 64, "batch_size": 4} if quick else {}) | changed)


def our_step(network: DeepLab, photos, labels, settings: SegmenterTraining):
    optimizer = torch.optim.Adam(network.parameters(), 1e-6, weight_decay=settings.weight_decay, fused=True)

    def step():
        optimizer.zero_grad()
        loss = accumulate_gradients(network, None, photos, labels, settings, Worker())
        optimizer.step()
        return float(loss)

    return step


def plain_step(network: DeepLab, photos, labels):
    """Plain torch: contiguous float32 tensors, Adam with default options, the mean of cross_entropy."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-6, weight_decay=2e-4)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(network(network.normalized(photos)), labels.long(), ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def test_training_step(benchmark, quick):
    settings = settings_of(quick)
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(
        0, 256, (PHOTOS, 3, settings.crop_size, settings.crop_size), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(IGNORE, CLASSES, photos[:, 0].shape, dtype=torch.int32, generator=generator)
    bfloat16 = settings.model_copy(update={"precision": "bfloat16"})
    last = make_network(quick).to(memory_format=torch.channels_last)
    calls = {
        "ours, float32": our_step(on_device(make_network(quick), "cpu"), photos, labels, settings),
        "ours, channels last, float32": our_step(last, photos, labels, settings),
        "ours, bfloat16": our_step(on_device(make_network(quick), "cpu"), photos, labels, bfloat16),
        "plain, float32": plain_step(make_network(quick), photos, labels),
    }
    network = make_network(quick)
    with FlopCounterMode(display=False) as counter:
        # Only the forward pass: the counter takes the backward pass of depthwise convolutions for that of dense ones.
        network(network.normalized(photos))
    losses = {method: call() for method, call in calls.items()}
    assert abs(losses["ours, float32"] - losses["plain, float32"]) < 1e-3 * losses["plain, float32"]
    assert abs(losses["ours, bfloat16"] - losses["plain, float32"]) < 2e-2 * losses["plain, float32"]
    benchmark.pedantic(calls["ours, float32"], rounds=1)
    seconds = paired_medians(calls, rounds=3)
    size = 256 if quick else 2048
    ceiling = {"float32": matrix_rate(torch.float32, size), "bfloat16": matrix_rate(torch.bfloat16, size)}
    flops = 3 * counter.get_total_flops()  # the backward pass takes twice the forward pass
    report(
        f"training step, DeepLabv3+ on {network.encoder}, crop {settings.crop_size}, {PHOTOS} photos, "
        f"{flops / PHOTOS / 1e9:.0f} GFLOP per photo",
        [
            {
                "method": method,
                "s": s,
                "photos/s": PHOTOS / s,
                "GFLOP/s": flops / s / 1e9,
                "share of a matrix product": f"{flops / s / ceiling[method.split()[-1]]:.0%}",
                "plain / this": seconds["plain, float32"] / s,
            }
            for method, s in seconds.items()
        ],
    )


class Plain(Dataset):
    """The same augmentation with torchvision's transforms, including copy-paste."""

    def __init__(self, source: PhotoSource, samples: list[Sample], settings: SegmenterTraining, blur: bool):
        self.source, self.samples, self.settings = source, samples, settings
        self.colors = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(*settings.color_jitter)], settings.color_jitter_prob),
                v2.RandomGrayscale(settings.grayscale_prob),
                *([v2.RandomApply([v2.GaussianBlur(39, settings.blur_sigma)], settings.blur_prob)] if blur else []),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def view(self, number: int):
        sample, size = self.samples[number], self.settings.crop_size
        with Image.open(f"{self.source.path}/{sample.record.photo}") as file:
            photo = file.convert("RGB")
        labels = Image.fromarray(sample.record.mask().astype(np.int32) * sample.label)
        scale = float(torch.empty(()).uniform_(*self.settings.scale))
        shape = [max(1, round(scale * side)) for side in (photo.height, photo.width)]
        photo = v2.functional.resize(photo, shape)
        labels = v2.functional.resize(labels, shape, v2.InterpolationMode.NEAREST)
        down, right = (max(0, size - side) for side in shape)
        left, top = (int(torch.randint(side + 1, ())) for side in (right, down))
        padding = [left, top, right - left, down - top]
        mean = [round(c) for c in np.asarray(photo).mean((0, 1))]
        photo, labels = v2.functional.pad(photo, padding, mean), v2.functional.pad(labels, padding, IGNORE)
        top, left = (int(torch.randint(side - size + 1, ())) for side in (photo.height, photo.width))
        photo, labels = (v2.functional.crop(x, top, left, size, size) for x in (photo, labels))
        if torch.rand(()) < self.settings.flip_prob:
            photo, labels = v2.functional.hflip(photo), v2.functional.hflip(labels)
        return self.colors(photo), torch.from_numpy(np.array(labels))

    def __getitem__(self, number: int):
        photo, labels = self.view(number)
        for _ in range(int(torch.randint(self.settings.paste_objects[0], self.settings.paste_objects[1] + 1, ()))):
            other, other_labels = self.view(int(torch.randint(len(self), ())))
            rows, columns = (other_labels > 0).any(1).nonzero(), (other_labels > 0).any(0).nonzero()
            if not len(rows):
                continue
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            is_object = other_labels[box] > 0
            h, w = is_object.shape
            top, left = (int(torch.randint(self.settings.crop_size - side + 1, ())) for side in (h, w))
            photo[:, top : top + h, left : left + w][:, is_object] = other[:, box[0], box[1]][:, is_object]
            labels[top : top + h, left : left + w][is_object] = other_labels[box][is_object]
        return photo, labels


@pytest.fixture
def world(tmp_path, quick):
    """(source, samples): photos of 480 x 640, with an ellipse as mask."""
    samples = []
    y, x = np.mgrid[:480, :640]
    for i in range(2 if quick else 24):
        Image.fromarray(make_image(i, 480, 640)[1]).save(tmp_path / f"{i:03}.jpg", quality=92)
        mask = ((y - 240) / (60 + 6 * i)) ** 2 + ((x - 320) / 150) ** 2 < 1
        samples.append(Sample(MaskRecord.from_mask(f"{i:03}.jpg", mask, "thing", None, 1.0), 1 + i % 20))
    return PhotoSource(tmp_path), samples


def test_data_pipeline(benchmark, world, quick):
    """Photos per second that are decoded, augmented and batched, compared with those that a training step processes."""
    source, samples = world
    settings = settings_of(quick)
    used = TrainingPhotos(source, [sample.record for sample in samples], Path(source.path), Progress("", Worker()))

    def ours(steps: int) -> float:
        began = time.perf_counter()
        for photos, labels in batches(used, samples, settings, Worker(), range(steps)):
            assert photos.shape[2:] == labels.shape[1:] == (settings.crop_size, settings.crop_size)
        return steps * settings.batch_size / (time.perf_counter() - began)

    def plain(blur: bool, steps: int) -> float:
        loader = DataLoader(Plain(source, samples, settings, blur), settings.batch_size, num_workers=2)
        count, began = 0, 0.0
        while count < steps * settings.batch_size:
            for photos, _ in loader:
                if not began:
                    began = time.perf_counter()  # the first batch includes the start of the processes
                    continue
                count += len(photos)
        return count / (time.perf_counter() - began)

    steps = 2 if quick else 12
    ours(1)
    benchmark.pedantic(lambda: ours(1), rounds=1)
    rates = {f"ours, {thread_count()} threads": ours(steps)}
    rates["DataLoader, 2 processes, torchvision, no blur"] = plain(False, steps)
    rates["DataLoader, 2 processes, torchvision"] = plain(True, 1)
    photos = torch.randint(0, 256, (PHOTOS, 3, settings.crop_size, settings.crop_size), dtype=torch.uint8)
    step = our_step(make_network(quick), photos, torch.zeros(photos[:, 0].shape, dtype=torch.int32), settings)
    step_rate = PHOTOS / paired_medians({"": step}, rounds=3)[""]
    report(
        f"data pipeline, 480 x 640 JPEG to crop {settings.crop_size}, {settings.paste_objects} objects pasted; a "
        f"training step processes {step_rate:.2f} photos/s",
        [{"method": method, "photos/s": rate, "ms per photo": 1e3 / rate, "rate / training step": rate / step_rate}
         for method, rate in rates.items()],
    )  # fmt: skip
