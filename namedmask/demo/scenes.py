# SPDX-License-Identifier: MIT
"""Renders the photos of the demo with exact masks. The same seed gives the same bytes on every machine.

A scene is layered from back to front: a textured and slightly defocused background, clutter, one to three objects of a
kind with soft shadows, distractors that hide a part of them, then camera effects: uneven light, a color cast, blur and
noise. All colors come from one distribution; in a third of the scenes an object has the color of the background. The
trainings see photos and captions only; the masks are for evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .dice import Dice, direction
from .objects import DRAW, UPRIGHT, Canvas, Part, lump
from .patterns import BACKGROUNDS, SURFACES, cloud, smooth_noise

KINDS: tuple[str, ...] = tuple(DRAW)

# A block of 53 photos shows each of the 12 kinds 4 times and no object 5 times, shuffled: 1,060 photos show each kind
# 80 times.
_BLOCK, _EMPTY_IN_BLOCK = 53, 5

Color = tuple[float, float, float]


class Scene(NamedTuple):
    """One photo with its ground truth."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    masks: np.ndarray
    """bool [n, H, W]: the visible pixels of each object; they are disjoint."""
    kinds: tuple[str, ...]
    """The kind of each object; empty for a photo without objects."""
    colors: tuple[str, ...]
    """A color word for each object."""
    surfaces: tuple[str, ...]
    """A pattern word for each object (a key of patterns.SURFACES)."""
    background: str
    """A key of patterns.BACKGROUNDS."""


def index_photo(seed: int, number: int, size: tuple[int, int] | None = None) -> Scene:
    """Renders a photo for the index: one main object among clutter, or none in 5 of 53 photos.

    Every block of 53 consecutive numbers that starts at a multiple of 53 shows each kind four times.

    Args:
        seed: Seed of the set.
        number: Number of the photo in the set.
        size: (height, width) in pixels; by default each side is drawn from 128 to 192.
    """
    block = Dice(seed, 1, number // _BLOCK).shuffled(list(KINDS) * 4 + [""] * _EMPTY_IN_BLOCK)
    kind = block[number % _BLOCK]
    return _render(Dice(seed, 2, number), [kind] if kind else [], size, largest=0.56)


def evaluation_scene(seed: int, number: int) -> Scene:
    """Renders a scene for evaluation: one to three objects of different kinds. Arguments: see `index_photo`."""
    dice = Dice(seed, 3, number)
    return _render(dice, dice.shuffled(KINDS)[: dice.integer(1, 4)], None, largest=0.42)


# Colors ------------------------------------------------------------------------------------------------------------


def _hsv(hue: float, saturation: float, value: float) -> Color:
    hue = (hue - math.floor(hue)) * 6.0
    ramp = [abs(hue - 3.0) - 1.0, 2.0 - abs(hue - 2.0), 2.0 - abs(hue - 4.0)]
    r, g, b = (255.0 * value * (1.0 - saturation + saturation * min(max(x, 0.0), 1.0)) for x in ramp)
    return r, g, b


def _mix(a: Color, b: Color, weight: float) -> Color:
    return (a[0] + (b[0] - a[0]) * weight, a[1] + (b[1] - a[1]) * weight, a[2] + (b[2] - a[2]) * weight)


def _any_color(dice: Dice) -> Color:
    return _hsv(dice.random(), 0.05 + 0.75 * dice.random() * dice.random(), dice.uniform(0.28, 0.95))


def _similar_color(dice: Dice, color: Color, strength: float) -> Color:
    """A color that is lighter or darker and slightly shifted."""
    target = (250.0, 245.0, 235.0) if dice.chance(0.5) else (18.0, 16.0, 22.0)
    return _mix(_mix(color, target, dice.uniform(0.3, 1.0) * strength), _any_color(dice), 0.2)


def _color_word(color: Color) -> str:
    r, g, b = color
    high, low = max(color), min(color)
    if high < 60.0:
        return "black"
    if high - low < 0.16 * high:
        return "white" if high > 200.0 else "grey"
    if high == r:
        if g - b > 0.62 * (high - low):
            return "yellow" if high > 130.0 else "brown"
        if g - b > 0.25 * (high - low):
            return "orange" if high > 170.0 else "brown"
        return "pink" if (b - g > 0.35 * (high - low) or low > 150.0) else "red"
    if high == g:
        return "green"
    return "purple" if r - g > 0.4 * (high - low) else "blue"


# Painting -----------------------------------------------------------------------------------------------------------


class _Thing(NamedTuple):
    """What to draw and where: center and half size in pixels, rotation, flip, stretch and shear."""

    draw: Callable[[Canvas], None]
    cx: float
    cy: float
    scale: float
    turns: float
    flip: float
    stretch: float
    shear: float
    color: Color
    surface: str
    blur: float


def _paint(
    image: np.ndarray, thing: _Thing, dice: Dice, light: tuple[float, float, float], shadow: float
) -> np.ndarray:
    """Draws a thing into ``image``, float32 [3, H, W], and returns its pixels, bool [H, W]."""
    _, height, width = image.shape
    reach = thing.scale * 1.35 * max(thing.stretch, 1.0 / thing.stretch) + 10.0
    top, bottom = max(int(thing.cy - reach), 0), min(int(thing.cy + reach) + 1, height)
    left, right = max(int(thing.cx - reach), 0), min(int(thing.cx + reach) + 1, width)
    mask = np.zeros((height, width), dtype=bool)
    if bottom - top < 4 or right - left < 4:
        return mask
    cos, sin = direction(thing.turns)
    dx = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - thing.cx)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - thing.cy)
    u = (dx * cos + dy * sin) * (thing.flip * thing.stretch / thing.scale)
    v = (dy * cos - dx * sin) * (1.0 / (thing.stretch * thing.scale))
    u = u + v * thing.shear
    canvas = Canvas(u, v, dice)
    thing.draw(canvas)

    outline = canvas.parts[0].distance
    for part in canvas.parts[1:]:
        outline = np.minimum(outline, part.distance)
    window = image[:, top:bottom, left:right]
    if shadow > 0.0:
        # The distance to the outline, softened over many pixels and shifted away from the light, gives a soft shadow.
        softness = dice.uniform(5.0, 12.0)
        dark = np.minimum(np.maximum(0.6 - outline * (thing.scale / softness), 0.0), 1.0) * shadow
        shift_x, shift_y = int(-light[0] * 7.0), int(-light[1] * 7.0)
        h, w = dark.shape
        to = window[:, max(shift_y, 0) : h + min(shift_y, 0), max(shift_x, 0) : w + min(shift_x, 0)]
        to *= 1.0 - dark[max(-shift_y, 0) : h + min(-shift_y, 0), max(-shift_x, 0) : w + min(-shift_x, 0)]

    tones = _tones(dice, thing)
    field = SURFACES[thing.surface](dice, u, v)
    gloss = dice.uniform(0.0, 90.0) if dice.chance(0.5) else 0.0
    sharpness = thing.scale / thing.blur
    for part in canvas.parts:
        _paint_part(window, part, tones, field, light, gloss, thing.scale, sharpness)
    mask[top:bottom, left:right] = outline < 0.0
    return mask


def _tones(dice: Dice, thing: _Thing) -> dict[str, tuple[Color, Color]]:
    main = thing.color
    mate = _any_color(dice) if dice.chance(0.35) else _similar_color(dice, main, 0.5)
    second = _any_color(dice) if dice.chance(0.35) else _similar_color(dice, main, 0.45)
    light, dark = _mix(main, (245.0, 240.0, 230.0), 0.65), _mix(main, (12.0, 12.0, 16.0), 0.72)
    return {
        "main": (main, mate),
        "second": (second, _mix(second, mate, 0.5)),
        "light": (light, _mix(light, main, 0.2)),
        "dark": (dark, _mix(dark, main, 0.2)),
    }


def _paint_part(
    window: np.ndarray,
    part: Part,
    tones: dict[str, tuple[Color, Color]],
    field: np.ndarray,
    light: tuple[float, float, float],
    gloss: float,
    scale: float,
    sharpness: float,
) -> None:
    alpha = np.minimum(np.maximum(0.5 - part.distance * sharpness, 0.0), 1.0)
    # Most parts are small: restrict the work to the rows and columns that they touch.
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if not len(rows):
        return
    inside = (slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2))
    alpha, distance, field = alpha[inside], part.distance[inside], field[inside]
    depth = np.minimum(np.maximum(distance * (-1.0 / part.bulge), 0.0), 1.0)
    relief = np.sqrt(depth * (2.0 - depth)) * (part.bulge * 0.8 * scale)
    slope_x, slope_y = np.zeros_like(relief), np.zeros_like(relief)
    slope_x[:, 1:-1] = (relief[:, :-2] - relief[:, 2:]) * 0.5
    slope_y[1:-1] = (relief[:-2] - relief[2:]) * 0.5
    slant = (slope_x * light[0] + slope_y * light[1] + light[2]) / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
    shade = np.maximum(slant, 0.0) * 0.75 + 0.42
    shine = None
    if gloss:
        shine = np.maximum(slant, 0.0)
        shine = shine * shine
        shine = shine * shine
        shine = shine * shine
        shine = shine * shine * gloss
    first, other = tones[part.tone]
    target = window[(slice(None),) + inside]  # noqa: RUF005  # a star in a subscript needs Python 3.11
    for channel in range(3):
        paint = (field * (other[channel] - first[channel]) + first[channel]) * shade
        if shine is not None:
            paint = paint + shine
        target[channel] += (paint - target[channel]) * alpha


def _soften(image: np.ndarray) -> np.ndarray:
    """One pass of the binomial filter 1-2-1 over both axes of float32 [..., H, W], with replicated borders."""
    quarter = image * 0.25
    image = quarter + quarter
    image[..., 1:, :] += quarter[..., :-1, :]
    image[..., :1, :] += quarter[..., :1, :]
    image[..., :-1, :] += quarter[..., 1:, :]
    image[..., -1:, :] += quarter[..., -1:, :]
    quarter = image * 0.25
    image = quarter + quarter
    image[..., 1:] += quarter[..., :-1]
    image[..., :1] += quarter[..., :1]
    image[..., :-1] += quarter[..., 1:]
    image[..., -1:] += quarter[..., -1:]
    return image


def _background(dice: Dice, height: int, width: int) -> tuple[np.ndarray, str, Color]:
    name = dice.pick(tuple(BACKGROUNDS))
    first = _any_color(dice)
    other = _any_color(dice) if dice.chance(0.4) else _similar_color(dice, first, 0.75)
    field = BACKGROUNDS[name](dice, height, width)
    stain = smooth_noise(dice, height, width, dice.uniform(1.0, 4.0), dice.uniform(1.0, 4.0)) * dice.uniform(0.0, 0.35)
    third = _any_color(dice)
    image = np.empty((3, height, width), dtype=np.float32)
    for channel in range(3):
        paint = field * (other[channel] - first[channel]) + first[channel]
        image[channel] = paint + (third[channel] - paint) * stain
    if dice.chance(0.1):  # sometimes a wall and a floor
        line = int(height * dice.uniform(0.25, 0.6))
        below = _any_color(dice)
        again = BACKGROUNDS[dice.pick(tuple(BACKGROUNDS))](dice, height, width)[line:]
        for channel in range(3):
            image[channel, line:] = again * (other[channel] - below[channel]) + below[channel]
    for _ in range(dice.integer(0, 4)):
        image = _soften(image)
    return image, name, _mix(first, other, 0.5)


def _angle(dice: Dice, kind: str) -> float:
    """An angle in turns: at most 50 degrees for upright kinds, any angle for the others."""
    return (dice.random() + dice.random() - 1.0) * 0.14 if kind in UPRIGHT else dice.random()


def _render(dice: Dice, kinds: list[str], size: tuple[int, int] | None, largest: float) -> Scene:
    height, width = size if size is not None else (dice.integer(16, 25) * 8, dice.integer(16, 25) * 8)
    short = min(height, width)
    image, background, ground = _background(dice, height, width)
    turn = direction(dice.random())
    steep = dice.uniform(0.45, 0.8)
    light = (turn[0] * steep, turn[1] * steep, math.sqrt(1.0 - steep * steep))
    shadow = dice.uniform(0.1, 0.6)

    def distractor(scale: float, blur: float) -> _Thing:
        color = _mix(ground, _any_color(dice), dice.uniform(0.2, 1.0))
        return _Thing(
            lump, dice.uniform(0.0, width), dice.uniform(0.0, height), scale, dice.random(), 1.0,
            dice.uniform(0.8, 1.25), 0.0, color, dice.pick(tuple(SURFACES)), blur,
        )  # fmt: skip

    for _ in range(dice.integer(1, 6) if kinds else dice.integer(4, 9)):
        _paint(image, distractor(short * dice.uniform(0.05, 0.13), dice.uniform(1.0, 2.0)), dice, light, shadow)

    masks: list[np.ndarray] = []
    drawn: list[tuple[str, str, str]] = []
    centers = _centers(dice, len(kinds), height, width)
    for kind, (cx, cy) in zip(kinds, centers, strict=True):
        scale = short * (dice.uniform(0.28, largest) if len(kinds) == 1 else dice.uniform(0.2, largest) * 0.85)
        camouflage = dice.chance(0.33)
        color = _mix(ground, _any_color(dice), dice.uniform(0.0, 0.3)) if camouflage else _any_color(dice)
        surface = dice.pick(tuple(SURFACES)) if dice.chance(0.7) else "plain"
        thing = _Thing(
            DRAW[kind], cx, cy, scale, _angle(dice, kind), dice.sign(), dice.uniform(0.86, 1.16),
            dice.uniform(-0.15, 0.15), color, surface, dice.uniform(0.8, 1.3),
        )  # fmt: skip
        mask = _paint(image, thing, dice, light, shadow)
        masks = [earlier & ~mask for earlier in masks]
        masks.append(mask)
        drawn.append((kind, _color_word(color), surface))

    if kinds and dice.chance(0.4):
        masks = _cover(image, dice, masks, distractor, light)
    image = _camera(image, dice)
    kept = [index for index, mask in enumerate(masks) if mask.sum() >= 60]
    stack = np.stack([masks[i] for i in kept]) if kept else np.zeros((0, height, width), dtype=bool)
    names, colors, surfaces = (tuple(drawn[i][column] for i in kept) for column in range(3))
    return Scene(image, stack, names, colors, surfaces, background)


def _centers(dice: Dice, count: int, height: int, width: int) -> list[tuple[float, float]]:
    """Centers of the objects: not too close to the border, and apart from each other."""
    if count == 1:
        return [(width * dice.uniform(0.32, 0.68), height * dice.uniform(0.32, 0.68))]
    start, step = dice.random(), 1.0 / max(count, 1)
    reach = dice.uniform(0.25, 0.32)
    result = []
    for index in range(count):
        cos, sin = direction(start + step * index + dice.uniform(-0.06, 0.06))
        result.append((width * (0.5 + cos * reach), height * (0.5 + sin * reach)))
    return result


def _cover(
    image: np.ndarray,
    dice: Dice,
    masks: list[np.ndarray],
    distractor: Callable[[float, float], _Thing],
    light: tuple[float, float, float],
) -> list[np.ndarray]:
    """Puts a distractor in front of an object, unless it would hide more than a third of any object."""
    _, height, width = image.shape
    target = dice.pick(masks)
    rows, columns = np.nonzero(target)
    if not len(rows):
        return masks
    at = dice.integer(0, len(rows))
    thing = distractor(min(height, width) * dice.uniform(0.08, 0.2), dice.uniform(1.0, 1.8))
    thing = thing._replace(cx=float(columns[at]), cy=float(rows[at]))
    before = image.copy()
    mask = _paint(image, thing, dice, light, 0.3)
    if any((m & mask).sum() * 3 > m.sum() for m in masks):
        image[...] = before
        return masks
    return [m & ~mask for m in masks]


def _camera(image: np.ndarray, dice: Dice) -> np.ndarray:
    """Uneven light, color cast, blur, noise, rounding: float32 [3, H, W] -> uint8 [H, W, 3]."""
    _, height, width = image.shape
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(1.0 / width) - 0.5
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(1.0 / height) - 0.5
    fall = x * dice.uniform(-0.5, 0.5) + y * dice.uniform(-0.5, 0.5) + dice.uniform(0.85, 1.12)
    fall = fall - (x * x + y * y) * dice.uniform(0.0, 0.6)
    if dice.chance(0.3):  # dappled light
        fall = fall * (cloud(dice, height, width, dice.uniform(40.0, 80.0), 2) * 0.6 + 0.7)
    for channel in range(3):
        image[channel] *= fall * dice.uniform(0.92, 1.08)
    if dice.chance(0.6):
        weight = dice.uniform(0.2, 1.0)
        image += (_soften(image) - image) * weight
    grain = dice.bytes_field(2, 3, height, width)
    strength = dice.uniform(0.01, 0.07)
    image += (grain[0].astype(np.float32) - grain[1].astype(np.float32)) * strength
    image = np.minimum(np.maximum(image + 0.5, 0.0), 255.0).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0))
