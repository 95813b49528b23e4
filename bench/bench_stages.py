# SPDX-License-Identifier: MIT
"""Photos per second of each stage and of the whole command, and the time of each step.

Photos are synthetic 480 x 640 JPEGs; the backbone is a ViT-S/16 with random weights, which takes as long as DINO's.
The index is computed with the demo's CLIP on the demo's photos; both are small, to show the overhead.
"""

import time

import numpy as np
import pytest
import timm
import torch
from bench_bilateral_solver import make_image
from PIL import Image
from safetensors.torch import save_file

from common import report
from namedmask.config import DetectorConfig, IndexConfig, RefineConfig, RunConfig
from namedmask.demo.run import render
from namedmask.index import CLIP_BATCH, Clip
from namedmask.photos import PhotoSource, decode_ahead
from namedmask.pseudolabel import Labeler
from namedmask.refine import Refiner
from namedmask.run import start
from namedmask.saliency.spectral import SpectralDetector
from namedmask.threads import thread_count
from namedmask_kernels import Ragged

BACKBONE = "vit_small_patch16_224.dino"
QUICK_BACKBONE = "deit_tiny_patch16_224.fb_in1k"


@pytest.fixture(scope="module")
def world(tmp_path_factory, quick):
    """(photos of one class, their names, settings of the detector)."""
    root = tmp_path_factory.mktemp("stages")
    folder = root / "photos" / "thing"
    folder.mkdir(parents=True)
    backbone, count = (QUICK_BACKBONE, 2) if quick else (BACKBONE, 24)
    for i in range(count):
        Image.fromarray(make_image(i, 480, 640)[1]).save(folder / f"{i:03}.jpg", quality=92)
    torch.manual_seed(0)
    save_file(timm.create_model(backbone, num_classes=0).state_dict(), root / "vit.safetensors")
    source = PhotoSource(root / "photos")
    config = DetectorConfig(backbone=backbone, backbone_weights=str(root / "vit.safetensors"))
    return source, list(source), config.model_copy(update={"image_size": 96} if quick else {})


def rate(title, benchmark, call, photos, **facts):
    """Runs the stage once to warm up and once to time it."""
    call()
    began = time.perf_counter()
    benchmark.pedantic(call, rounds=1)
    seconds = time.perf_counter() - began
    report(title, [{"photos": photos, "photos/s": photos / seconds, "s": seconds, **facts}])


def test_decode(benchmark, world):
    source, names, _ = world
    rate("decode, 480 x 640 JPEG", benchmark, lambda: list(decode_ahead(source, names, source.decode)), len(names))


def test_index(benchmark, tmp_path, quick):
    render(tmp_path, 5, 53 if quick else 1060, False)
    source, clip = PhotoSource(tmp_path), Clip(IndexConfig(clip_model="namedmask-demo"), "cpu")
    names = list(source)

    def single_thread():
        """The same work in this thread: (embeddings of the photos, seconds to decode, seconds of the network)."""
        began = time.perf_counter()
        photos = [source.decode(name).pixels for name in names]
        decoded = time.perf_counter()
        size = CLIP_BATCH["cpu"]
        with torch.inference_mode():
            batches = [clip.prepare(photos[i : i + size]) for i in range(0, len(photos), size)]
            rows = torch.cat([clip.model.encode_image(batch, normalize=True) for batch in batches])
        return rows.numpy(), decoded - began, time.perf_counter() - decoded

    single_thread()
    rows, decode, network = single_thread()
    np.testing.assert_allclose(np.stack([row for _, row in clip.images(source, [names])]), rows, atol=1e-5)
    rate(
        f"index: the demo's CLIP, photos of 128 to 192 pixels, {thread_count()} threads",
        benchmark,
        lambda: list(clip.images(source, [names])),
        len(names),
        **{"decode, ms per photo": 1e3 * decode / len(names), "network, ms per photo": 1e3 * network / len(names)},
        **{"share of decode": f"{decode / (decode + network):.0%}"},
    )


def test_detect(benchmark, world):
    source, names, config = world
    detector = SpectralDetector(config, "cpu")
    photos = [Ragged.pack([source.decode(name).pixels]) for name in names]
    tokens = detector.tokens((480, 640))

    def call():
        return [detector.detect(photo) for photo in photos]

    assert all(len(d.masks.rows) == 480 * 640 and 0 <= d.confidence < 1 for d in call())
    title = f"detect: spectral, {config.backbone}, short side {config.image_size}"
    rate(title, benchmark, call, len(photos), tokens=tokens)


def test_refine(benchmark, world):
    source, names, _ = world
    refiner = Refiner(RefineConfig())
    photos = Ragged.pack([source.decode(name).pixels for name in names])
    rng = np.random.default_rng(0)
    targets = [torch.from_numpy(rng.random(8 * 8) < 0.4).view(1, 1, 8, 8).float() for _ in names]
    masks = Ragged.pack([torch.nn.functional.interpolate(t, (480, 640))[0, 0] for t in targets])

    def call():
        return refiner.refine(photos, masks)

    assert call().rows.isfinite().all()
    rate("refine: bilateral solver, 480 x 640, one batch", benchmark, call, len(names))


def test_pseudolabel(benchmark, world):
    source, names, config = world
    labeler = Labeler(RunConfig(photos=str(source.path), detector=config), "cpu")

    def call():
        labeler.times.seconds.clear()
        return [item for batch in labeler.label(source, [(name, None) for name in names]) for item in batch]

    assert len(call()) == len(names)
    rate("pseudolabel: decode, detect, refine", benchmark, call, len(names))
    print(", ".join(f"{step} {1e3 * s / len(names):.1f} ms per photo" for step, s in labeler.times.seconds.items()))


def test_whole_command(benchmark, world, tmp_path):
    """From class folders to masks and report, in this process, including the loading of models."""
    source, names, config = world
    runs = iter(range(100))

    def call():
        out = tmp_path / str(next(runs))
        given = {"photos": str(source.path), "detector": config.model_dump(exclude_none=True)}
        assert start(out, given, ["archive", "pseudolabel", "report"], 1, 0, False)

    rate("namedmask-pseudolabel, end to end", benchmark, call, len(names))
