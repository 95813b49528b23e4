# SPDX-License-Identifier: MIT
"""The objects of the demo, drawn as layers of signed-distance shapes.

A kind is a function that draws parts on a `Canvas`. Coordinates are in the frame of the object: ``u`` to the right,
``v`` down, the object in about [-1, 1]. Each call draws another individual, with random proportions, numbers of petals,
arms or sails, and optional parts. Color and surface pattern are drawn elsewhere from one distribution for all kinds, so
they carry no information about the kind. Only + - * / sqrt, comparisons and floor are used on arrays, so the result is
bit-identical on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .dice import Dice, direction


class Part(NamedTuple):
    """One layer of an object: a signed distance, float32 [h, w] in local units, negative inside, and its paint."""

    distance: np.ndarray
    tone: str
    bulge: float


class Canvas:
    """Coordinates float32 [h, w] in the frame of an object, a random number generator, and the parts drawn so far."""

    def __init__(self, u: np.ndarray, v: np.ndarray, dice: Dice) -> None:
        self.u, self.v, self.dice = u, v, dice
        self.parts: list[Part] = []

    def jitter(self, low: float, high: float) -> float:
        """A random proportion for this individual."""
        return self.dice.uniform(low, high)

    def add(self, distance: np.ndarray, tone: str = "main", bulge: float = 0.3) -> None:
        """Adds a shape on top. ``tone``: main, second, light or dark; ``bulge``: depth of the rounding."""
        self.parts.append(Part(distance, tone, bulge))

    # Primitives: arrays of signed distances (exact or close near the edge), float32 [h, w].

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, turns: float = 0.0, mirror: bool = False
    ) -> np.ndarray:
        """An ellipse; ``turns`` rotates it; ``mirror`` draws it on both sides of the v axis."""
        du = (np.abs(self.u) if mirror else self.u) - cx
        dv = self.v - cy
        if turns:
            cos, sin = direction(turns)
            du, dv = cos * du + sin * dv, cos * dv - sin * du
        du, dv = du * (1.0 / rx), dv * (1.0 / ry)
        return (np.sqrt(du * du + dv * dv) - 1.0) * min(rx, ry)

    def capsule(
        self, x0: float, y0: float, x1: float, y1: float, r0: float, r1: float | None = None, mirror: bool = False
    ) -> np.ndarray:
        """A thick line from (x0, y0) to (x1, y1) whose radius changes from r0 to r1."""
        r1 = r0 if r1 is None else r1
        dx, dy = x1 - x0, y1 - y0
        pu = (np.abs(self.u) if mirror else self.u) - x0
        pv = self.v - y0
        along = np.minimum(np.maximum((pu * dx + pv * dy) * (1.0 / (dx * dx + dy * dy + 1e-9)), 0.0), 1.0)
        pu, pv = pu - along * dx, pv - along * dy
        return np.sqrt(pu * pu + pv * pv) - (along * (r1 - r0) + r0)

    def path(self, points: list[tuple[float, float]], r0: float, r1: float) -> np.ndarray:
        """A thick quadratic Bezier curve through three control points, as four tapering capsules."""
        (ax, ay), (bx, by), (cx, cy) = points
        curve = []
        for step in range(5):
            t = step * 0.25
            a, b, c = (1 - t) * (1 - t), 2 * t * (1 - t), t * t
            curve.append((a * ax + b * bx + c * cx, a * ay + b * by + c * cy, r0 + (r1 - r0) * t))
        pieces = [self.capsule(x0, y0, x1, y1, ra, rb) for (x0, y0, ra), (x1, y1, rb) in pairwise(curve)]
        return functools.reduce(np.minimum, pieces)

    def convex(self, points: list[tuple[float, float]]) -> np.ndarray:
        """A convex polygon; the corners may be in either order."""
        turns = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True))
        points = points if turns > 0.0 else points[::-1]
        sides = []
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            dx, dy = x1 - x0, y1 - y0
            length = math.sqrt(dx * dx + dy * dy)
            nx, ny = dy / length, -dx / length
            sides.append(self.u * nx + (self.v * ny - (x0 * nx + y0 * ny)))
        return functools.reduce(np.maximum, sides)

    def box(self, cx: float, cy: float, hx: float, hy: float, corner: float = 0.03) -> np.ndarray:
        """A rectangle with half sides hx, hy and rounded corners."""
        du = np.maximum(np.abs(self.u - cx) - (hx - corner), 0.0)
        dv = np.maximum(np.abs(self.v - cy) - (hy - corner), 0.0)
        return np.sqrt(du * du + dv * dv) - corner

    def ring(self, cx: float, cy: float, rx: float, ry: float, width: float) -> np.ndarray:
        """An elliptic ring with half thickness ``width``."""
        return np.abs(self.ellipse(cx, cy, rx, ry)) - width


def fish(c: Canvas) -> None:
    j = c.jitter
    height, length = j(0.28, 0.46), j(0.6, 0.72)
    spread, notch = j(0.26, 0.45), j(0.0, 0.14)
    tail = np.minimum(
        c.convex([(-0.48, -0.02), (-1.0, -spread), (-1.0 + notch, 0.08)]),
        c.convex([(-0.48, 0.02), (-1.0, spread * j(0.8, 1.1)), (-1.0 + notch, -0.08)]),
    )
    c.add(tail, "second", 0.1)
    fin = j(0.12, 0.3)
    c.add(c.convex([(-0.3, -height * 0.5), (j(-0.3, -0.05), -height - fin), (0.35, -height * 0.6)]), "second", 0.1)
    if c.dice.chance(0.7):
        c.add(
            c.convex([(0.2, height * 0.6), (j(-0.25, 0.0), height + fin * 0.7), (-0.15, height * 0.6)]), "second", 0.1
        )
    point = j(0.0, 0.12)
    body = np.maximum(
        c.ellipse(0.08, height * point * 2, length, height * (1 + point)),
        c.ellipse(0.08, -height * point * 2, length, height * (1 + point)),
    )
    c.add(body, "main", 0.35)
    if c.dice.chance(0.6):
        c.add(c.ellipse(0.02, 0.08, 0.16, 0.08, j(-0.1, 0.1)), "second", 0.08)
    size = j(0.05, 0.09)
    c.add(c.ellipse(0.5, -height * 0.2, size, size), "light", 0.05)
    c.add(c.ellipse(0.51, -height * 0.2, size * 0.55, size * 0.55), "dark", 0.05)


def mushroom(c: Canvas) -> None:
    j = c.jitter
    thick, lean, rim = j(0.13, 0.27), j(-0.15, 0.15), j(-0.05, 0.15)
    c.add(c.capsule(lean, 0.75, 0.0, -0.1, thick * j(1.0, 1.4), thick), "light", thick)
    if c.dice.chance(0.4):
        c.add(c.ellipse(lean * 0.4, 0.28, thick * 1.5, 0.08), "light", 0.08)
    wide, high = j(0.62, 0.92), j(0.5, 0.95)
    cap = np.maximum(
        c.ellipse(0.0, rim, wide, high), c.ellipse(0.0, rim - high * 0.75, wide * 1.25, high * j(0.85, 1.05))
    )
    c.add(cap, "main", 0.45)
    if c.dice.chance(0.55):
        for _ in range(c.dice.integer(3, 8)):
            size = j(0.05, 0.12)
            spot = c.ellipse(j(-0.55, 0.55) * wide, rim - high * j(0.2, 0.75), size * 1.2, size)
            c.add(np.maximum(spot, cap + 0.02), "light", 0.06)


def teapot(c: Canvas) -> None:
    j = c.jitter
    wide, high, low = j(0.46, 0.6), j(0.4, 0.54), j(0.1, 0.22)
    c.add(c.ring(-wide, low - 0.05, j(0.24, 0.34), j(0.24, 0.34), j(0.05, 0.085)), "second", 0.08)
    reach, lift = j(0.88, 1.0), j(-0.45, -0.12)
    c.add(
        c.path([(wide * 0.7, low + 0.18), (wide + 0.2, low + 0.12), (reach, lift)], j(0.15, 0.2), j(0.05, 0.08)),
        "main",
        0.1,
    )
    c.add(c.ellipse(0.0, low, wide, high), "main", 0.45)
    top = low - high
    c.add(c.ellipse(0.0, top + 0.08, wide * j(0.5, 0.65), j(0.1, 0.17)), "second", 0.12)
    c.add(c.ellipse(0.0, top - 0.1, 0.09, j(0.07, 0.12)), "second", 0.08)
    if c.dice.chance(0.5):
        c.add(c.box(0.0, low + high * 0.93, wide * 0.6, 0.06, 0.05), "second", 0.06)


def butterfly(c: Canvas) -> None:
    j = c.jitter
    long, broad, angle = j(0.46, 0.58), j(0.27, 0.38), j(-0.14, -0.05)
    low_long, low_broad, low_angle = j(0.3, 0.44), j(0.22, 0.32), j(0.08, 0.17)
    low = c.ellipse(0.36, 0.36, low_long, low_broad, low_angle, mirror=True)
    c.add(low, "second" if c.dice.chance(0.5) else "main", 0.12)
    up = c.ellipse(0.46, -0.24, long, broad, angle, mirror=True)
    c.add(up, "main", 0.12)
    if c.dice.chance(0.7):
        size = j(0.06, 0.13)
        c.add(c.ellipse(0.6, -0.3, size, size, mirror=True), "light" if c.dice.chance(0.5) else "dark", 0.05)
    if c.dice.chance(0.5):
        size = j(0.06, 0.1)
        c.add(c.ellipse(0.4, 0.4, size, size, mirror=True), "light" if c.dice.chance(0.5) else "dark", 0.05)
    c.add(c.capsule(0.02, -0.35, j(0.15, 0.3), -0.78, 0.028, mirror=True), "dark", 0.03)
    c.add(c.capsule(0.0, -0.34, 0.0, j(0.45, 0.62), j(0.07, 0.11), 0.05), "dark", 0.09)


def cactus(c: Canvas) -> None:
    j = c.jitter
    thick, top = j(0.2, 0.29), j(-0.75, -0.5)
    foot = 0.55
    for side in (-1.0, 1.0):
        if c.dice.chance(0.85):
            reach, low, high = side * j(0.5, 0.72), j(-0.1, 0.3), j(-0.5, -0.15)
            arm = thick * j(0.5, 0.75)
            c.add(
                np.minimum(c.capsule(0.0, low, reach, low, arm * 0.9, arm), c.capsule(reach, low, reach, high, arm)),
                "main",
                arm,
            )
    c.add(c.capsule(0.0, foot, 0.0, top, thick * j(0.9, 1.1), thick), "main", thick)
    rib = (c.u + 10.0) * j(9.0, 13.0)
    rib = np.abs(rib - np.floor(rib) - 0.5) * 0.12
    c.add(np.maximum(rib - 0.012, c.parts[-1].distance + 0.05), "dark", 0.02)
    if c.dice.chance(0.4):
        c.add(c.ellipse(j(-0.1, 0.1), top - thick * 0.9, 0.12, 0.1), "second", 0.08)
    if c.dice.chance(0.6):
        c.add(c.convex([(-0.4, 0.45), (0.4, 0.45), (0.3, 0.98), (-0.3, 0.98)]), "second", 0.2)
        c.add(c.box(0.0, 0.48, 0.45, 0.08), "second", 0.06)


def boat(c: Canvas) -> None:
    j = c.jitter
    mast, deck = j(-0.15, 0.15), j(0.3, 0.42)
    c.add(c.capsule(mast, deck, mast, -0.95, 0.04), "dark", 0.04)
    c.add(
        c.convex([(mast + 0.06, j(-0.95, -0.8)), (mast + j(0.55, 0.78), deck - 0.12), (mast + 0.06, deck - 0.1)]),
        "light" if c.dice.chance(0.4) else "main",
        0.25,
    )
    if c.dice.chance(0.75):
        c.add(
            c.convex([(mast - 0.06, j(-0.85, -0.5)), (mast - 0.06, deck - 0.1), (mast - j(0.4, 0.65), deck - 0.12)]),
            "second",
            0.25,
        )
    else:
        c.add(c.box(mast - 0.38, deck - 0.1, 0.22, 0.18), "second", 0.1)
    left, right = j(0.72, 0.95), j(0.78, 1.0)
    hull = c.convex(
        [
            (-left, deck),
            (right, deck),
            (right - j(0.2, 0.4), deck + j(0.34, 0.5)),
            (-left + j(0.1, 0.3), deck + j(0.34, 0.5)),
        ]
    )
    c.add(hull, "main", 0.25)
    c.add(np.maximum(hull, np.abs(c.v - (deck + 0.06)) - 0.05), "second", 0.06)


def turtle(c: Canvas) -> None:
    j = c.jitter
    wide, high = j(0.48, 0.62), j(0.42, 0.55)
    for end in (-1.0, 1.0):
        leg = j(0.1, 0.16)
        spread = j(0.72, 0.86)
        c.add(
            c.capsule(end * wide * 0.6, -high * 0.6, end * spread * wide * 1.35, -high * 1.3, leg, leg * 0.7),
            "second",
            0.1,
        )
        c.add(
            c.capsule(end * wide * 0.6, high * 0.6, end * spread * wide * 1.25, high * 1.25, leg, leg * 0.7),
            "second",
            0.1,
        )
    c.add(
        c.capsule(wide * 0.8, 0.0, wide + j(0.22, 0.36), j(-0.06, 0.06), j(0.11, 0.15), j(0.12, 0.17)), "second", 0.14
    )
    c.add(c.capsule(-wide * 0.9, 0.0, -wide - 0.2, j(-0.06, 0.06), 0.07, 0.02), "second", 0.05)
    shell = c.ellipse(0.0, 0.0, wide, high)
    c.add(shell, "main", 0.45)
    # Plates: a row of large hexagonal cells along the ridge, drawn as dark seams.
    u, v = (c.u + 8.0) * j(3.0, 4.2), (c.v + 8.0) * j(3.0, 4.2)
    row = np.floor(v)
    u = u + 0.5 * (row - 2.0 * np.floor(row * 0.5))
    seam = np.minimum(0.5 - np.abs(u - np.floor(u) - 0.5), 0.5 - np.abs(v - row - 0.5))
    c.add(np.maximum(seam * 0.25 - 0.018, shell + 0.04), "dark", 0.02)
    c.add(c.ellipse(wide + 0.26, 0.0, 0.03, 0.03), "dark", 0.02)


def lamp(c: Canvas) -> None:
    j = c.jitter
    top, bottom, low = j(0.22, 0.4), j(0.55, 0.78), j(-0.15, 0.12)
    c.add(c.capsule(0.0, low, 0.0, 0.85, j(0.05, 0.1)), "second", 0.06)
    if c.dice.chance(0.5):
        c.add(c.ellipse(0.0, j(0.4, 0.6), j(0.16, 0.3), j(0.2, 0.3)), "second", 0.2)
    foot = j(0.3, 0.45)
    c.add(np.maximum(c.ellipse(0.0, 0.95, foot, 0.22), c.v - 0.97), "second", 0.12)
    c.add(c.convex([(-top, -0.95), (top, -0.95), (bottom, low), (-bottom, low)]), "main", 0.5)
    if c.dice.chance(0.5):
        c.add(c.convex([(-bottom, low - 0.08), (bottom, low - 0.08), (bottom, low), (-bottom, low)]), "light", 0.05)
    if c.dice.chance(0.4):
        c.add(c.ellipse(0.0, -0.98, 0.06, 0.06), "second", 0.05)


def guitar(c: Canvas) -> None:
    j = c.jitter
    lower, upper, waist = j(0.4, 0.5), j(0.29, 0.37), j(-0.02, 0.06)
    c.add(c.box(0.0, -0.5, 0.07, 0.4), "dark" if c.dice.chance(0.5) else "second", 0.05)
    c.add(c.convex([(-0.1, -1.0), (0.1, -1.0), (0.13, -0.76), (-0.13, -0.76)]), "second", 0.06)
    body = np.minimum(c.ellipse(0.0, 0.56, lower, j(0.36, 0.42)), c.ellipse(0.0, 0.1 + waist, upper, 0.3))
    body = np.minimum(body, c.box(0.0, 0.3, upper * 0.85, 0.2, 0.1))
    c.add(body, "main", 0.14)
    if c.dice.chance(0.4):
        c.add(np.abs(body + 0.05) - 0.02, "second", 0.02)
    c.add(c.ellipse(0.0, 0.24, j(0.1, 0.15), 0.12), "dark", 0.03)
    c.add(c.box(0.0, 0.68, j(0.13, 0.2), 0.045), "dark", 0.03)
    c.add(np.maximum(np.abs(np.abs(c.u) - 0.03) - 0.012, np.abs(c.v + 0.12) - 0.78), "light", 0.01)


def snail(c: Canvas) -> None:
    j = c.jitter
    size = j(0.46, 0.6)
    c.add(c.capsule(-0.85, 0.62, 0.5, 0.62, j(0.06, 0.1), 0.15), "second", 0.14)
    head = j(-0.25, 0.1)
    c.add(c.path([(0.45, 0.62), (0.8, 0.6), (0.8, head)], 0.16, j(0.12, 0.16)), "second", 0.14)
    for side in (0.72, 0.88):
        c.add(c.capsule(side, head, side + j(-0.1, 0.12), head - j(0.22, 0.36), 0.03, 0.045), "second", 0.03)
    cx, cy = j(-0.25, -0.1), 0.62 - size * j(0.85, 1.0)
    shell = c.ellipse(cx, cy, size, size * j(0.88, 1.0))
    c.add(shell, "main", 0.4)
    # The coil: circles whose centers move toward the opening of the shell.
    shift = j(0.1, 0.2)
    turns = [
        c.ring(cx + (1 - scale) * shift, cy + (1 - scale) * shift, size * scale, size * scale, 0.028)
        for scale in (0.74, 0.5, 0.28)
    ]
    c.add(np.maximum(functools.reduce(np.minimum, turns), shell), "dark", 0.03)


def flower(c: Canvas) -> None:
    j = c.jitter
    petals, start = c.dice.integer(5, 10), c.dice.random()
    reach, cy = j(0.36, 0.46), -0.22
    broad = j(0.75, 1.0) * 1.3 / petals + 0.05
    if c.dice.chance(0.8):
        bend = j(-0.25, 0.25)
        c.add(
            c.path([(0.0, cy), (bend * 0.3, 0.4), (bend, 1.0)], j(0.05, 0.075), 0.06),
            "dark" if c.dice.chance(0.3) else "second",
            0.05,
        )
        for side in (-1.0, 1.0):
            if c.dice.chance(0.65):
                c.add(
                    c.ellipse(bend * 0.4 + side * 0.28, j(0.45, 0.75), 0.28, j(0.09, 0.14), side * -0.08), "second", 0.1
                )
    for index in range(petals):
        cos, sin = direction(start + index / petals)
        turns = start + index / petals
        c.add(c.ellipse(cos * reach, cy + sin * reach, j(0.28, 0.33), broad, turns), "main", 0.12)
    size = j(0.13, 0.24)
    c.add(c.ellipse(0.0, cy, size, size), "light" if c.dice.chance(0.5) else "dark", 0.15)


def umbrella(c: Canvas) -> None:
    j = c.jitter
    wide, high, edge = j(0.82, 1.0), j(0.62, 0.85), j(-0.1, 0.05)
    side = c.dice.sign()
    c.add(c.capsule(0.0, edge - high, 0.0, 0.78, 0.045), "dark", 0.04)
    hook = np.maximum(c.ring(side * 0.14, 0.78, 0.14, 0.14, 0.05), 0.78 - c.v)
    c.add(hook, "dark", 0.04)
    dome = np.maximum(c.ellipse(0.0, edge, wide, high), c.v - edge)
    count = c.dice.integer(3, 6)
    for index in range(count):  # scallops along the rim
        cx = (index + 0.5) * 2 * wide / count - wide
        dome = np.maximum(dome, -c.ellipse(cx, edge + 0.02, wide / count * 0.92, j(0.09, 0.13)))
    c.add(dome, "main", 0.4)
    seams = []
    for index in range(1, count):
        bend = index * 2.0 / count - 1.0
        seam = np.abs(c.ellipse(0.0, edge, max(abs(bend) * wide, 0.02), high)) - 0.014
        seams.append(np.maximum(seam, c.u * (-1.0 if bend > 0 else 1.0)))
    c.add(np.maximum(functools.reduce(np.minimum, seams), dome), "second", 0.02)
    c.add(c.capsule(0.0, edge - high, 0.0, edge - high - 0.08, 0.03), "dark", 0.03)


DRAW: dict[str, Callable[[Canvas], None]] = {
    function.__name__: function
    for function in (fish, mushroom, teapot, butterfly, cactus, boat, turtle, lamp, guitar, snail, flower, umbrella)
}
UPRIGHT = frozenset({"mushroom", "teapot", "cactus", "boat", "lamp", "snail", "flower", "umbrella"})
"""Kinds that usually stand upright: they are tilted a little, the others are rotated by any angle."""


def lump(c: Canvas) -> None:
    """A distractor without a kind (stone, box, stick, beads, scrap, rod), rounded and lit like the objects."""
    j = c.jitter
    form = c.dice.integer(0, 6)
    if form == 0:  # stone: an ellipse with flat cuts
        stone = c.ellipse(0.0, 0.0, 0.9, j(0.5, 0.85))
        for _ in range(4):
            cos, sin = direction(c.dice.random())
            stone = np.maximum(stone, c.u * cos + c.v * sin - j(0.45, 0.8))
        c.add(stone, "main", 0.4)
    elif form == 1:  # box with a label
        c.add(c.box(0.0, 0.0, 0.8, j(0.35, 0.7), 0.05), "main", 0.1)
        c.add(c.box(j(-0.3, 0.3), 0.0, 0.1, 0.3, 0.02), "second", 0.05)
    elif form == 2:  # stick
        c.add(c.capsule(-0.95, j(-0.1, 0.1), 0.95, j(-0.1, 0.1), j(0.06, 0.14), j(0.05, 0.12)), "main", 0.1)
    elif form == 3:  # two or three beads
        for _ in range(c.dice.integer(2, 4)):
            size = j(0.2, 0.4)
            c.add(c.ellipse(j(-0.6, 0.6), j(-0.6, 0.6), size, size), c.dice.pick(("main", "second")), size)
    elif form == 4:  # flat scrap with corners
        points = [direction(turns / 5.0 + j(0.0, 0.12)) for turns in range(5)]
        c.add(c.convex([(x * 0.9, y * 0.7) for x, y in points]), "main", 0.06)
    else:  # bent rod
        c.add(
            c.path([(-0.9, j(-0.3, 0.3)), (0.0, j(-1.0, 1.0)), (0.9, j(-0.3, 0.3))], j(0.08, 0.18), j(0.08, 0.18)),
            "main",
            0.15,
        )
