# SPDX-License-Identifier: MIT
"""The labeler: batches, and photos that a kernel rejects."""

import numpy as np
import pytest
from PIL import Image

from namedmask import pseudolabel
from namedmask.config import make_config
from namedmask.photos import PhotoError, PhotoSource
from namedmask.pseudolabel import Labeler


@pytest.fixture
def labeler(tmp_path, backbone_weights):
    detector = {"backbone": "vit_tiny_patch16_224", "backbone_weights": str(backbone_weights), "image_size": 32}
    return Labeler(make_config({"photos": str(tmp_path), "detector": detector, "refine": {"name": "crf"}}), "cpu")


def test_photo_that_a_kernel_rejects_is_one_error(labeler, tmp_path):
    sizes = {"a.png": (40, 30), "b.png": (65535, 35), "c.png": (50, 60)}
    rng = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / name, compress_level=0)
    labels = dict(pair for batch in labeler.label(PhotoSource(tmp_path), sizes) for pair in batch)
    assert list(labels) == list(sizes)
    assert isinstance(labels["b.png"], PhotoError) and "sigmas of bilateral are too small" in labels["b.png"].reason
    assert [labels[name].mask.shape[::-1] for name in ("a.png", "c.png")] == [sizes["a.png"], sizes["c.png"]]


def test_batches_are_limited_in_pixels(labeler, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "BATCH_PIXELS", 2500)
    sizes = [1000, 1000, 1000, 9000, 100, 100]
    names = [f"{number}.png" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        Image.new("RGB", (size // 10, 10)).save(tmp_path / name)
    batches = [[name for name, _ in batch] for batch in labeler.label(PhotoSource(tmp_path), names)]
    assert batches == [names[:2], names[2:3], names[3:4], names[4:]]
