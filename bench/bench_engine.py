# SPDX-License-Identifier: MIT
"""Photos per second of the labeling engine and of the CLIP index, on a GPU if there is one.

On a CPU, the engine is compared with the authors' way of doing the same work: TokenCut and SelfMask with the bilateral
solver, written plainly in torch, scipy and pycocotools, one photo at a time in float32. On a GPU, `extract` is compared
with timm's forward, torch SDPA and a hook. Weights are random, which takes as long as the published ones.

`pytest bench/bench_engine.py --benchmark-only -s` prints the tables. The figures are in the `extra_info` of
pytest-benchmark's JSON as well.
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from bench_backbones import TAPS, Hooked, padded, patches_of
from bench_bilateral_solver import make_image, published_solver
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import save_file
from scipy import ndimage

from common import device_median, paired_medians, report, require_gpu
from namedmask.archive import Archive, Retrieved
from namedmask.backbones import Backbone, untrained
from namedmask.config import DetectorConfig, IndexConfig, RunConfig
from namedmask.distributed import Worker
from namedmask.index import Clip
from namedmask.masks import read_masks
from namedmask.photos import PhotoSource
from namedmask.pseudolabel import Labeler, pseudolabel
from namedmask.refine import SHORT_SIDE
from namedmask.saliency.selfmask import SelfMask

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
SIZES = ((512, 680), (480, 640), (512, 768), (512, 512))
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


class Work(NamedTuple):
    """What the engine is measured on: a detector, a ViT, the short side of its input, and what limits the time."""

    detector: str
    backbone: str
    side: int
    precision: str = "float32" if DEVICE == "cpu" else "bfloat16"
    photos: int = 16 if DEVICE == "cpu" else 768  # as many as fill a GPU for a second, or all cores with batches


SMALL_8, SMALL_16, SMALL_14 = (f"vit_small_patch{p}" for p in ("8_224.dino", "16_224.dino", "14_dinov2.lvd142m"))
ON_GPU = [Work("spectral", SMALL_8, 512), Work("selfmask", SMALL_8, 512), Work("spectral", SMALL_14, 448)]
ON_CPU = [Work(name, SMALL_16, side) for name in ("spectral", "selfmask") for side in (448, 512)]
ON_CPU += [Work("selfmask", SMALL_8, 512, precision, photos=2) for precision in ("float32", "bfloat16")]
ROWS = ON_CPU if DEVICE == "cpu" else ON_GPU
QUICK = [Work(name, "deit_tiny_patch16_224.fb_in1k", 96, photos=4) for name in ("spectral", "selfmask")]


@pytest.fixture(scope="module")
def source(tmp_path_factory, quick):
    """Photos of four sizes, as many as any work takes."""
    folder = tmp_path_factory.mktemp("photos")
    count = max(work.photos for work in (QUICK if quick else ROWS))
    images = [make_image(seed, *(side // 4 for side in size) if quick else size)[1] for seed, size in enumerate(SIZES)]
    for i in range(count):
        Image.fromarray(images[i % len(images)]).save(folder / f"{i:04}.jpg", quality=92)
    return PhotoSource(folder)


def config_of(work: Work, folder: Path) -> DetectorConfig:
    """Settings of the detector, with random weights in `folder`."""
    file = folder / f"{work.detector}.safetensors"
    torch.manual_seed(0)
    settings = {"name": work.detector, "backbone": work.backbone, "image_size": work.side}
    settings["precision"] = work.precision
    settings["select"] = "none"  # as the authors
    if work.detector == "selfmask":
        save_file(SelfMask(untrained(work.backbone)).state_dict(), file)
        return DetectorConfig(**settings, weights=str(file))
    save_file(timm.create_model(work.backbone, num_classes=0).state_dict(), file)
    return DetectorConfig(**settings, backbone_weights=str(file))


@pytest.mark.parametrize("number", range(len(ON_CPU)))
def test_labeling(benchmark, source, tmp_path, quick, number):
    rows = QUICK if quick else ROWS
    if number >= len(rows):
        pytest.skip("fewer rows here")
    work = rows[number]
    config = config_of(work, tmp_path)
    labeler, names = Labeler(RunConfig(photos=str(source.path), detector=config), DEVICE), list(source)[: work.photos]
    units = [(name, None) for name in names]

    def label():
        return sum(len(batch) for batch in labeler.label(source, units))

    assert label() == len(names)  # compiles kernels too
    labeler = Labeler(RunConfig(photos=str(source.path), detector=config), DEVICE)
    label() if DEVICE == "cpu" else list(labeler.label(source, units[:16]))
    labeler.times = type(labeler.times)(DEVICE)
    began = time.perf_counter()
    benchmark.pedantic(label, rounds=1)
    seconds, busy = time.perf_counter() - began, labeler.times.busy()
    row = {"photos": len(names), "photos/s": len(names) / seconds, "device busy": busy}
    row |= {f"{step}, ms per photo": 1e3 * total / len(names) for step, total in labeler.times.seconds.items()}
    title = f"labeling, {work.detector} and bilateral, {work.backbone}, short side {work.side}, {config.precision}"
    report_row(f"{title}, {DEVICE}", row, benchmark)
    if DEVICE == "cpu":
        compare_with_authors(title, work, config, labeler, source, names, tmp_path, benchmark)


def report_row(title, row, benchmark):
    report(title, [row])
    benchmark.extra_info |= {"title": title, **row}


def compare_with_authors(title, work, config, labeler, source, names, folder, benchmark):
    """Checks the masks of the engine against the authors' steps, and times both."""
    network = torch_network(work, config)

    def authors():
        return [authors_mask(work, network, labeler, Path(source.path) / name) for name in names]

    run = RunConfig(photos=str(source.path), detector=config)
    archive = Archive(["thing"], {"thing": [Retrieved(name, None) for name in names]})
    pseudolabel(source, archive, folder, run, Worker(), DEVICE, lambda *_, **__: None)
    ours = {record.photo: record.mask() for record in read_masks(folder)}
    equal = [(ours[name] == coco.decode(rle)).mean() for name, rle in zip(names, authors(), strict=True)]
    # The photo that the engine resizes is rounded to 8 bits; masks of random weights change much with a network in 16.
    assert config.precision == "bfloat16" or np.mean(equal) > 0.95, equal
    engine = lambda: list(labeler.label(source, [(name, None) for name in names]))  # noqa: E731
    seconds = paired_medians({"engine": engine, "the authors' steps": authors}, rounds=3, seconds=30)
    ratio = seconds["the authors' steps"] / seconds["engine"]
    benchmark.extra_info |= {"times the authors' photos/s": ratio, "pixels equal to the authors'": np.mean(equal)}
    rows = [
        {"method": m, "photos/s": len(names) / s, "time / engine's": s / seconds["engine"]} for m, s in seconds.items()
    ]
    report(f"{title}, CPU, {torch.get_num_threads()} threads: {np.mean(equal):.1%} of the pixels equal", rows)


def torch_network(work, config):
    """The network of the detector in plain torch: timm's ViT with a hook, or SelfMask."""
    from safetensors.torch import load_file

    if work.detector == "selfmask":
        network = SelfMask(untrained(work.backbone))
        network.load_state_dict(load_file(config.weights))
        return network.eval()
    model = timm.create_model(work.backbone, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(load_file(config.backbone_weights))
    return Hooked(model)


@torch.inference_mode()
def authors_mask(work, network, labeler, path):
    """The object of one photo as COCO run lengths."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    photo = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255
    size = labeler.detector.fit(pixels.shape[:2]).size
    photo = (F.interpolate(photo, size, mode="bicubic", antialias=True).clamp(0, 1) - MEAN) / STD
    patch = int(work.backbone.partition("patch")[2].split("_")[0])
    photo = F.pad(photo, (0, -size[1] % patch, 0, -size[0] % patch))
    grid = photo.shape[2] // patch, photo.shape[3] // patch
    if work.detector == "selfmask":
        logits, objectness = network(photo)
        logits = logits[-1, 0, objectness[-1, 0].flatten().argmax()][None, None]
        mask = logits.sigmoid()
    else:
        mask = torch.from_numpy(token_cut(network(photo)[0][0].numpy(), grid)).float()[None, None]
    target = (
        (F.interpolate(mask, pixels.shape[:2], mode="bilinear")[0, 0] > 0.5).double().numpy()
    )  # binary, as published
    if target.any():
        target = published_solver(target, pixels, min(pixels.shape[:2]) / SHORT_SIDE)
    return coco.encode(np.asfortranarray(target > 0.5, np.uint8))


def token_cut(keys, grid, tau=0.2, eps=1e-5):
    """TokenCut: keys [n, C] of a grid -> its foreground, bool [h, w]."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    affinity = np.where(unit @ unit.T > tau, 1.0, eps)
    degrees = np.diag(affinity.sum(1))
    _, vectors = scipy.linalg.eigh(degrees - affinity, degrees, subset_by_index=[1, 1])
    vector = vectors[:, 0]
    seed = np.abs(vector).argmax()
    inside = vector > vector.mean() if vector[seed] > 0 else vector < vector.mean()
    labels, _ = ndimage.label(inside.reshape(grid))
    return labels == labels.flat[seed]


def test_command(benchmark, source, tmp_path, quick):
    """`namedmask run` in a process of its own: all of its time is counted, also before the first mask."""
    work = QUICK[0] if quick else ON_GPU[2] if DEVICE != "cpu" else ON_CPU[0]
    config = config_of(work, tmp_path)
    seconds = {}
    for count in (2,) if quick else (2, len(list(source))):
        folder = tmp_path / f"photos-{count}" / "thing"
        folder.mkdir(parents=True)
        for name in list(source)[:count]:
            (folder / name).symlink_to(Path(source.path) / name)
        command = [sys.executable, "-m", "namedmask", "run", folder.parent, "--out", tmp_path / f"out-{count}"]
        options = ["--backbone", config.backbone, "--backbone-weights", config.backbone_weights]
        options += ["--image-size", config.image_size, "--precision", config.precision]
        began = time.perf_counter()
        subprocess.run([*map(str, command), *map(str, options)], check=True)
        seconds[count] = time.perf_counter() - began
    benchmark.pedantic(lambda: None, rounds=1)
    row = {f"{count} photos, s": s for count, s in seconds.items()}
    report_row(f"namedmask run, {work.backbone} at {work.side}, start-up included, {DEVICE}", row, benchmark)


def test_index(benchmark, source, tmp_path, quick):
    names = list(source)
    config = IndexConfig(clip_model="namedmask-demo")
    if not quick and DEVICE != "cpu":
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-L-14-336-quickgelu", device=DEVICE)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
        config = IndexConfig(clip_model="ViT-L-14-336-quickgelu", clip_weights=str(tmp_path / "clip.safetensors"))
        del model
    clip = Clip(config, DEVICE)
    assert len(list(clip.images(source, [names[:256]]))) == min(256, len(names))
    began = time.perf_counter()
    benchmark.pedantic(lambda: list(clip.images(source, [names])), rounds=1)
    row = {"photos": len(names), "photos/s": len(names) / (time.perf_counter() - began)}
    report_row(f"CLIP index, {config.clip_model}, {DEVICE}", row, benchmark)


@pytest.mark.parametrize("kind", ["64 photos of 512 x 680", "16 photos of 16 shapes"])
def test_extract_on_gpu(benchmark, kind, quick):
    """`extract` compared with timm in one dense batch, or with the better of padded and one photo at a time."""
    require_gpu(f"extract, keys and CLS attention, {kind}")
    torch.manual_seed(0)
    model = timm.create_model(SMALL_8, num_classes=0, dynamic_img_size=True, depth=2 if quick else 12)
    model = model.to(DEVICE, torch.bfloat16).eval()
    hooked, backbone = Hooked(model), Backbone(model, torch.device(DEVICE), torch.bfloat16)
    sides = [(64, 85)] * 64 if kind.startswith("64") else list(itertools.product((41, 52, 63, 74), (44, 55, 66, 77)))
    photos = [torch.randn(3, 8 * h, 8 * w, device=DEVICE, dtype=torch.bfloat16) for h, w in sides]
    patches, batch = patches_of(photos), torch.stack(photos) if len(set(sides)) == 1 else None
    calls = {"extract": lambda: backbone.extract(patches, TAPS)}
    if batch is not None:
        calls["timm, SDPA and a hook, one dense batch"] = lambda: hooked(batch)
    else:
        calls["timm, SDPA and a hook, one at a time"] = lambda: [hooked(photo[None]) for photo in photos]
        calls["timm, SDPA and a hook, padded"] = lambda: padded(hooked, photos)
    seconds = {method: device_median(call, rounds=10) for method, call in calls.items()}
    benchmark.pedantic(calls["extract"], rounds=1)
    best = min(s for method, s in seconds.items() if method != "extract")
    benchmark.extra_info |= {"title": f"extract, {kind}", "times the best peer": best / seconds["extract"]}
    rows = [
        {"method": m, "photos/s": len(photos) / s, "time / ours": s / seconds["extract"]} for m, s in seconds.items()
    ]
    report(f"extract, keys and CLS attention, {SMALL_8} in bfloat16, {kind}", rows)
