# SPDX-License-Identifier: MIT
"""Small real things for pipeline tests: photos drawn here, embeddings by color."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = {"cat": (200, 60, 40), "dog": (40, 90, 200)}


def draw_photo(seed: int, kind: str, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A blob of the kind's color on a grainy background."""
    rng = np.random.default_rng(seed)
    w, h = size
    grain = Image.fromarray(rng.integers(60, 180, (h // 6, w // 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    x, y = rng.integers(w // 5, w // 2), rng.integers(h // 5, h // 2)
    ImageDraw.Draw(grain).ellipse((x, y, x + w // 3, y + h // 3), fill=KINDS[kind])
    return grain.filter(ImageFilter.GaussianBlur(1))


def draw_photos(folder: Path, count: int, size: tuple[int, int] = (120, 90)) -> list[str]:
    """`count` photos, kinds in turn; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        names.append(f"{kind}{i:04}.jpg")
        draw_photo(i, kind, (size[0] + i % 7, size[1] + i % 5)).save(folder / names[-1], quality=92)
    return names


def write_embeddings(path: Path, names: list[str]) -> Path:
    """Embeddings in which a photo lies near the kind that its name begins with, the later the less."""
    from safetensors.numpy import save_file

    text = np.eye(len(KINDS), 8, dtype=np.float32)
    image = np.zeros((len(names), 8), np.float32)
    for i, name in enumerate(names):
        kind = next(k for k, key in enumerate(KINDS) if name.startswith(key))
        image[i, kind], image[i, 7] = 1, 0.1 + i / len(names)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    save_file({"image": image.astype(np.float16), "text": text.astype(np.float16)}, path)
    path.with_suffix(".json").write_text(json.dumps({"image_files": names, "names": list(KINDS)}))
    return path
