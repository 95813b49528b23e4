# SPDX-License-Identifier: MIT
"""Synthetic photos, embeddings and small runs for tests of the pipeline."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

ENCODER = "test_resnet"  # timm's, for tests
SIZE = 90, 120  # height and width of the photos of `reviewable_run`
COLORS = {"cat": (200, 60, 40), "dog": (40, 90, 200)}


def draw_photo(seed: int, category: str, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """An ellipse in the color of a category on a grainy background."""
    rng = np.random.default_rng(seed)
    w, h = size
    grain = Image.fromarray(rng.integers(60, 180, (h // 6, w // 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    x, y = rng.integers(w // 5, w // 2), rng.integers(h // 5, h // 2)
    ImageDraw.Draw(grain).ellipse((x, y, x + w // 3, y + h // 3), fill=COLORS[category])
    return grain.filter(ImageFilter.GaussianBlur(1))


def draw_photos(folder: Path, count: int, size: tuple[int, int] = (120, 90)) -> list[str]:
    """Draws `count` photos, of the categories in turn; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        category = list(COLORS)[i % len(COLORS)]
        names.append(f"{category}{i:04}.jpg")
        draw_photo(i, category, (size[0] + i % 7, size[1] + i % 5)).save(folder / names[-1], quality=92)
    return names


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded_png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG file of rows as PNG stores them, in forms that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def write_embeddings(path: Path, names: list[str]) -> Path:
    """Writes embeddings: a photo is similar to the category that its name begins with, later photos less so."""
    from safetensors.numpy import save_file

    text = np.eye(len(COLORS), 8, dtype=np.float32)
    image = np.zeros((len(names), 8), np.float32)
    for i, name in enumerate(names):
        category = next(k for k, key in enumerate(COLORS) if name.startswith(key))
        image[i, category], image[i, 7] = 1, 0.1 + i / len(names)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    save_file({"image": image.astype(np.float16), "text": text.astype(np.float16)}, path)
    path.with_suffix(".json").write_text(json.dumps({"image_files": names, "names": list(COLORS)}))
    return path


def command(*words):
    """Runs `namedmask WORDS...` in this process; returns the result of typer's CliRunner."""
    from typer.testing import CliRunner

    from namedmask import cli

    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder, but for the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def small_run(root: Path, photos: int, detector_options: list[str]) -> tuple[list, list]:
    """Draws photos below `root`, half of them of each category, and writes embeddings and weights of an encoder.

    Returns:
        The words of `run` without --out, and options of `experts` and `train`; each takes a second.
    """
    import torch
    from safetensors.torch import save_file

    from namedmask.backbones import untrained_encoder
    from namedmask.segmenter.deeplab import DeepLab

    embeddings = write_embeddings(root / "embeddings.safetensors", draw_photos(root / "photos", photos))
    torch.manual_seed(0)
    save_file(DeepLab(untrained_encoder(ENCODER), 2, 16).backbone.state_dict(), root / "encoder.safetensors")
    words = ["run", root / "photos", "--categories", "cat,dog", "--embeddings", embeddings, *detector_options]
    training = ["--crop-size", 32, "--batch-size", 2, "--steps", 8, "--lr", 1e-2, "--encoder", ENCODER]
    training += ["--encoder-weights", root / "encoder.safetensors", "--head-channels", 16]
    return [*words, "--photos-per-category", photos // 2], training


@contextlib.contextmanager
def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupts a training of a segmenter or an expert after this many steps; each is saved."""
    from namedmask import training
    from namedmask.segmenter import training as segmenter_training

    accumulate_gradients, steps = segmenter_training.accumulate_gradients, iter(range(count))

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return accumulate_gradients(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "SAVE_EVERY", 0)
        patch.setattr(segmenter_training, "accumulate_gradients", interrupted)
        yield


def disc(x: int) -> np.ndarray:
    """The mask of a disc around the column x, bool of SIZE."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows - SIZE[0] // 2) ** 2 + (columns - x) ** 2 < 400


def reviewable_run(out: Path, names: dict[str, list[str]], refined: bool = True) -> Path:
    """Writes a run with photos of a disc, and masks that detector and experts have placed differently.

    Args:
        out: The run folder; the photos are beside it.
        names: The photos of each category. The scores fall from 1 to 0.
        refined: Whether there are masks of experts, and those before refinement.
    """
    from namedmask.masks import MaskRecord, write_errors, write_shard
    from namedmask.record import RunRecord, StageRecord

    photos = out.parent / "photos"
    photos.mkdir()
    picture = np.where(disc(60)[..., None], (200, 60, 20), (30, 90, 160)).astype(np.uint8)
    Image.fromarray(picture).save(out.parent / "disc.png")
    for name in {name for members in names.values() for name in members}:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).hardlink_to(out.parent / "disc.png")
    for folder, x in {"masks": 50, "refined": 60, "detected": 45}.items() if refined else [("masks", 50)]:
        mask = MaskRecord.from_mask("", disc(x), "", 0.25, 0)
        records = [
            replace(mask, photo=name, category=category, score=round(1 - number / len(members), 4))
            for category, members in names.items()
            for number, name in enumerate(members)
        ]
        (out / folder).mkdir(parents=True)
        for shard, part in enumerate((records[: len(records) // 2], records[len(records) // 2 :])):
            write_errors(out / folder / f"{shard:05}.errors.jsonl", [])
            write_shard(out / folder / f"{shard:05}.jsonl", part)
    archive = {category: [{"photo": name, "score": 0.25} for name in members] for category, members in names.items()}
    (out / "archive.json").write_text(json.dumps({"categories": list(names), "photos": archive}))
    stages = ["archive", "pseudolabel", *["experts"] * refined]
    RunRecord(str(photos), {stage: StageRecord() for stage in stages}).write(out)
    return out
