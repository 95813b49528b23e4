# SPDX-License-Identifier: MIT
"""The demo's scenes: bit-identical everywhere, exact masks, one main object per index photo, true captions."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from namedmask.demo.dice import CIRCLE, Dice
from namedmask.demo.scenes import KINDS, Scene, evaluation_scene, index_photo

PINNED = {
    "index_photo": [
        "64e84a2744ca3990",
        "b0039fd5577671b4",
        "845bb6e25caa58f7",
        "598cb57de7545104",
        "8a074b175c3fb3c2",
        "e2c0fc0e16fbe984",
    ],
    "evaluation_scene": [
        "232a1b2c7ac60aff",
        "0ae97db9e32b27ec",
        "700a0e25343c6a36",
        "7036ff9074b42ce9",
        "e19a5e201589aa3b",
        "bb062373729ebe9c",
    ],
}


def digest(scene: Scene) -> str:
    """A hash of pixels, masks and words."""
    parts = (scene.image.tobytes(), np.packbits(scene.masks).tobytes(), repr((scene.image.shape, *scene[2:])).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("make", [index_photo, evaluation_scene])
def test_scenes_are_bit_identical_everywhere(make):
    assert [digest(make(11, number))[:16] for number in range(6)] == PINNED[make.__name__]


def test_scenes_are_independent_of_each_other():
    assert digest(index_photo(3, 5)) == digest(index_photo(3, 5))
    assert digest(index_photo(3, 5)) != digest(index_photo(4, 5)) != digest(index_photo(4, 6))


@pytest.mark.parametrize("make", [index_photo, evaluation_scene])
def test_masks_are_exact_disjoint_and_not_empty(make):
    for number in range(60):
        scene = make(12, number)
        assert scene.image.dtype == np.uint8 and scene.masks.dtype == bool
        assert scene.masks.shape == (len(scene.kinds), *scene.image.shape[:2])
        assert all(128 <= side <= 192 for side in scene.image.shape[:2])
        assert (scene.masks.sum(0) <= 1).all()
        assert all(mask.sum() >= 60 for mask in scene.masks)
        assert len(set(scene.kinds)) == len(scene.kinds) <= 3 and set(scene.kinds) <= set(KINDS)


def test_sizes_are_random_or_given():
    assert len({index_photo(12, number).image.shape for number in range(12)}) > 6
    assert index_photo(12, 0, size=(70, 90)).image.shape == (70, 90, 3)


def test_block_of_the_index_shows_each_kind_four_times():
    assert len(KINDS) >= 12
    kinds = [index_photo(13, number, size=(32, 40)).kinds for number in range(53)]
    assert all(len(k) <= 1 for k in kinds)
    # A block of 53 shows each kind four times and no object five times; an object of a thumbnail may be too small.
    counts = Counter(k[0] if k else "" for k in kinds)
    assert counts[""] >= 5 and all(counts[kind] <= 4 for kind in KINDS)
    full = Counter(k[0] if k else "" for k in (index_photo(13, number).kinds for number in range(53)))
    assert full[""] == 5 and all(full[kind] == 4 for kind in KINDS)


def test_captions_name_the_kinds_in_the_scene(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    from demo_captions import TEMPLATES, describe, subject

    for number in range(40):
        scene, rng = evaluation_scene(14, number), Dice(number)
        for text in (describe(scene, rng), subject(scene)):
            assert all(kind in text for kind in scene.kinds)
    empty = next(s for s in (index_photo(14, n) for n in range(53)) if not s.kinds)
    assert not any(kind in describe(empty, Dice(1)).split() for kind in KINDS)
    assert all(template.count("{}") == 1 for template in TEMPLATES)


def test_kinds_have_many_colors():
    words = {kind: set() for kind in KINDS}
    for number in range(265):
        scene = index_photo(15, number, size=(48, 48))
        for kind, color in zip(scene.kinds, scene.colors, strict=True):
            words[kind].add(color)
    assert all(len(colors) >= 4 for colors in words.values())


def test_dice_are_uniform_and_circle_has_unit_vectors():
    dice = Dice(1)
    values = [dice.random() for _ in range(4000)]
    assert min(values) >= 0.0 and max(values) < 1.0 and abs(sum(values) / 4000 - 0.5) < 0.02
    assert sorted(dice.shuffled(range(9))) == list(range(9))
    assert dice.field(3, 4).shape == (3, 4) and dice.field(2).dtype == np.float32
    assert dice.bytes_field(5, 7).shape == (5, 7)
    assert max(abs(x * x + y * y - 1.0) for x, y in CIRCLE) < 1e-12 and len(CIRCLE) == 128
