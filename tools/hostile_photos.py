# SPDX-License-Identifier: MIT
"""Runs labeling and segmentation on damaged and odd photo files, and counts crashes and losses.

    python tools/hostile_photos.py --count 2000 --seed 0

Small valid files of all formats and modes are mutated: truncated, with flipped bits, erased or repeated ranges,
spliced with another file, with huge sizes in their headers, with a wrong suffix. The files, some of them in a tar, are
listed, labeled (a tiny ViT with random weights, all refiners in turn) and segmented (a tiny network with random
weights) in this process. A photo is lost if it has neither a mask nor a line of errors; a crash is an exception that
ends a stage.
"""

import argparse
import io
import json
import random
import resource
import struct
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, features
from safetensors.torch import save_file

from namedmask.archive import Archive, Retrieved
from namedmask.backbones import untrained_encoder
from namedmask.config import RunConfig, make_config
from namedmask.distributed import Worker
from namedmask.masks import read_errors, read_masks
from namedmask.photos import PhotoSource, note_unlisted
from namedmask.pseudolabel import pseudolabel
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.segmenter.segment import segment_photos

BACKBONE, ENCODER = "vit_tiny_patch16_224", "test_resnet"
REFINERS = ("bilateral", "crf", "pamr", "none")
FOLDER = 100  # files per run
Mutation = Callable[[bytes, random.Random, list[bytes]], bytes]


def valid_files(rng: random.Random) -> dict[str, list[bytes]]:
    """Small photos by suffix, of all modes that the formats have."""
    noise = np.random.default_rng(rng.randrange(1 << 32))
    rgb = Image.fromarray(noise.integers(0, 255, (5, 7, 3), np.uint8)).resize((49, 35), Image.Resampling.BICUBIC)
    gray = np.asarray(rgb.convert("L"))
    wide = {"I;16": gray.astype(np.uint16) * 257, "I": gray.astype(np.int32) * -9999, "F": gray / np.float32(3)}
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    images = {mode: rgb.convert("L").convert(mode) if mode == "LA" else rgb.convert(mode)
              for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")}  # fmt: skip
    images |= {mode: Image.fromarray(values.astype(values.dtype)) for mode, values in wide.items()}
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}
    if features.check("avif"):
        formats[".avif"] = "AVIF"
    files: dict[str, list[bytes]] = {suffix: [] for suffix in formats}
    for suffix, kind in formats.items():
        for image in images.values():
            for options in ({}, {"exif": exif}, {"compression": "tiff_lzw"}, {"progressive": True}):
                out = io.BytesIO()
                try:
                    image.save(out, kind, **options)
                except (OSError, ValueError, TypeError, RuntimeError):  # the format does not have this mode
                    continue
                files[suffix].append(out.getvalue())
    return files


def truncated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_in_header(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return flipped(data[:64], rng, others) + data[64:]


def erased(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data))
    length = rng.randrange(1, 200)
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def repeated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + 100] * rng.randrange(2, 50) + data[start + 100 :]


def spliced(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def huge_size(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Overwrites what may be a side of the photo: 2 or 4 bytes that hold 49 or 35, in either byte order."""
    places = [
        (at, code)
        for side in (35, 49)
        for code in (">I", "<I", ">H", "<H")
        for at in range(min(len(data), 400))
        if data.startswith(struct.pack(code, side), at)
    ]
    if not places:
        return flipped_in_header(data, rng, others)
    at, code = rng.choice(places)
    size = struct.calcsize(code)
    value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 20_000, 0x7FFFFFFF, 0xFFFFFFFF)) % (1 << 8 * size)
    return data[:at] + struct.pack(code, value) + data[at + size :]


def garbage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return rng.choice((b"", b"\0" * 1000, rng.randbytes(500), b"<html>not found</html>", data[:8], data[:8] * 100))


def unchanged(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data


MUTATIONS: tuple[Mutation, ...] = (
    truncated, flipped, flipped_in_header, erased, repeated, spliced, huge_size, garbage, unchanged,
)  # fmt: skip


def write_photos(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """Writes `count` files, a fifth of them into a tar; returns how often each mutation was used."""
    files = valid_files(rng)
    everything = [data for variants in files.values() for data in variants]
    used: Counter[str] = Counter()
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in range(count):
            suffix = rng.choice(list(files))
            mutation = rng.choice(MUTATIONS)
            data = mutation(rng.choice(files[suffix]), rng, everything)
            used[mutation.__name__] += 1
            name = f"{number:04}{rng.choice(list(files)) if rng.random() < 0.1 else suffix}"
            if rng.random() < 0.2:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                (folder / name).write_bytes(data)
    return used


def label(source: PhotoSource, names: list[str], out: Path, config: RunConfig) -> set[str]:
    """The names of the photos that have a mask or an error after labeling."""
    archive = Archive(["thing"], {"thing": [Retrieved(name, None) for name in names]})
    (out / "masks").mkdir(parents=True)
    pseudolabel(source, archive, out / "masks", config, Worker(), "cpu", lambda *_, **__: None)
    errors = [error for path in (out / "masks").glob("*.errors.jsonl") for error in read_errors(path)]
    return {record.photo for record in read_masks(out / "masks")} | {error.photo for error in errors}


def segment(source: PhotoSource, out: Path, weights: Path) -> tuple[set[str], set[str]]:
    """The names of the photos that have a mask, and of those that have an error, after segmentation."""
    segment_photos(weights, Path(source.path), out)
    masks = {line["photo"]: line["mask"] for line in map(json.loads, (out / "photos.jsonl").open())}
    return {n for n, mask in masks.items() if (out / mask).exists()}, {
        e.photo for e in read_errors(out / "errors.jsonl")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    figures: Counter[str] = Counter()
    mutations: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        save_file(timm.create_model(BACKBONE, num_classes=0).state_dict(), root / "vit.safetensors")
        (root / "weights").mkdir()
        save_segmenter(root / "weights", DeepLab(untrained_encoder(ENCODER), 3, 16), ["cat", "dog"])
        for part, first in enumerate(range(0, options.count, FOLDER)):
            photos, out = root / f"photos{part}", root / f"out{part}"
            count = min(FOLDER, options.count - first)
            mutations += write_photos(photos, count, random.Random(f"{options.seed} {part}"))
            detector = {"backbone": BACKBONE, "backbone_weights": str(root / "vit.safetensors"), "image_size": 64}
            config = make_config(
                {"photos": str(photos), "detector": detector, "refine": {"name": REFINERS[part % len(REFINERS)]}}
            )
            source, errors = PhotoSource(photos), []
            names = list(source.names(note_unlisted(errors)))
            figures["files"] += count
            figures["lost in the listing"] += count - len(names) - len(errors)
            try:
                figures["lost in labeling"] += len(set(names) - label(source, names, out / "run", config))
            except Exception:
                figures["crashes in labeling"] += 1
                traceback.print_exc()
            try:
                masks, failed = segment(source, out / "segmented", root / "weights")
                figures["masks"] += len(masks)
                figures["errors"] += len(failed)
                figures["lost in segmentation"] += len(set(names) - masks - failed)
            except Exception:
                figures["crashes in segmentation"] += 1
                traceback.print_exc()
    figures["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    for key in ("crashes in labeling", "crashes in segmentation"):
        figures.setdefault(key, 0)
    print(json.dumps({**figures, "mutations": dict(sorted(mutations.items()))}, indent=1))
    if any(count for key, count in figures.items() if key.startswith(("lost", "crashes"))):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
