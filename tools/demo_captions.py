# SPDX-License-Identifier: MIT
"""Captions of the demo's photos. The trainings read photos and captions, and nothing else about a scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from namedmask.demo.scenes import Scene

T = TypeVar("T")


class HasRandom(Protocol):
    """Anything with ``random() -> float in [0, 1)``: a Dice, ``random.Random``, ``numpy.random.Generator``."""

    def random(self) -> float: ...


TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.", "a photo of the {}.", "a photo of one {}.", "a photo of my {}.", "a picture of a {}.",
    "there is a {} in the scene.", "there is the {} in the scene.", "this is a {} in the scene.",
    "this is the {} in the scene.", "this is one {} in the scene.", "a small {}.", "the {}.", "a {}.",
    "a close-up photo of a {}.", "a blurry photo of a {}.", "a good photo of the {}.", "a rendering of a {}.",
    "a {} among other things.", "a snapshot of the {}.", "a cropped photo of a {}.", "a {} in the middle of the scene.",
)  # fmt: skip

_GROUND = {
    "planks": ("on wooden planks", "on a wooden floor"),
    "tiles": ("on tiles", "on a tiled floor"),
    "bricks": ("in front of a brick wall", "on bricks"),
    "grass": ("in the grass", "on grass"),
    "pebbles": ("on pebbles", "on cobblestones"),
    "woven": ("on a checked cloth", "on cloth"),
    "stripes": ("on a striped background", "on stripes"),
    "leaves": ("among leaves", "on fallen leaves"),
    "sand": ("on sand", "on the sand"),
    "rock": ("on a rock", "on marble"),
    "water": ("by the water", "on water"),
    "carpet": ("on a carpet", "on a patterned rug"),
}

_NOTHING = ("scene without any object", "background", "bit of clutter", "place where nothing is")


def _pick(rng: HasRandom, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def subject(scene: Scene) -> str:
    """The noun of a plain caption: the kinds joined by "and a", or a phrase for a photo without an object."""
    return " and a ".join(scene.kinds) if scene.kinds else _NOTHING[0]


def describe(scene: Scene, rng: HasRandom) -> str:
    """A noun phrase that also names some of the colors, patterns and the background. It is always true of the scene."""
    if scene.kinds:
        phrases = []
        for kind, color, surface in zip(scene.kinds, scene.colors, scene.surfaces, strict=True):
            words = [color] if rng.random() < 0.6 else []
            if rng.random() < 0.4 and surface != "plain":
                words.append(surface)
            phrases.append(" ".join([*words, kind]))
        phrase = " and a ".join(phrases)
    else:
        phrase = _pick(rng, _NOTHING)
    if rng.random() < 0.4:
        phrase += " " + _pick(rng, _GROUND[scene.background])
    return phrase
