# SPDX-License-Identifier: MIT
"""Surface patterns and backgrounds: scalar fields in [0, 1] that mix two colors, in correctly rounded arithmetic."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np

from .dice import Dice, direction


def triangle(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 in [0, 1]. Replaces a sine, which libm rounds differently on different machines."""
    return np.abs(x - np.floor(x) - 0.5) * 2.0


def smooth_noise(dice: Dice, height: int, width: int, rows: float, columns: float) -> np.ndarray:
    """Value noise, float32 [height, width] in [0, 1], with about rows x columns smooth bumps."""
    rows, columns = max(rows, 0.5), max(columns, 0.5)
    lattice = dice.field(int(rows) + 2, int(columns) + 2)

    def steps(count: int, cells: float) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(count, dtype=np.float32) * np.float32(cells / count)
        low = at.astype(np.int32)
        part = at - low.astype(np.float32)
        return low, part * part * (3.0 - 2.0 * part)

    low, part = steps(height, rows)
    part = part[:, None]
    lattice = lattice[low] * (1.0 - part) + lattice[low + 1] * part
    low, part = steps(width, columns)
    return lattice[:, low] * (1.0 - part) + lattice[:, low + 1] * part


def cloud(dice: Dice, height: int, width: int, size: float, octaves: int = 3) -> np.ndarray:
    """Several octaves of value noise, float32 [height, width] in [0, 1]; ``size`` is the largest bump in pixels."""
    layers, weight, sum_of_weights = [], 1.0, 0.0
    for octave in range(octaves):
        noise = smooth_noise(dice, height, width, height / size * 2**octave, width / size * 2**octave)
        layers.append(noise * weight)
        sum_of_weights += weight
        weight *= 0.6
    return functools.reduce(operator.add, layers) * (1.0 / sum_of_weights)


def cell_values(dice: Dice, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A random value for each integer cell (float32 arrays of whole numbers), from a wrapped 16 x 16 table."""
    table = dice.field(256)
    return table[(row.astype(np.int32) & 15) * 16 + (column.astype(np.int32) & 15)]


def contrast(t: np.ndarray, gain: float) -> np.ndarray:
    """Stretches a field around 0.5 and clips it to [0, 1]."""
    return np.minimum(np.maximum((t - 0.5) * gain + 0.5, 0.0), 1.0)


# Surface patterns: (dice, u, v) -> field, where u and v are float32 [h, w] in the object's frame, about [-1, 1].


def plain(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * 0.15 + v * 0.15 + 0.3


def striped(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    cos, sin = direction(dice.random())
    return contrast(triangle((u * cos + v * sin) * dice.uniform(2.5, 6.0) + 8.0), dice.uniform(2.0, 6.0))


def spotted(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    count = dice.uniform(3.0, 6.0)
    x, y = (u + 8.0) * count, (v + 8.0) * count
    row = np.floor(y)
    x = x + 0.5 * row
    x, y = x - np.floor(x) - 0.5, y - row - 0.5
    return contrast(0.5 + (dice.uniform(0.05, 0.1) - x * x - y * y) * 10.0, 2.0)


def checked(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    cos, sin = direction(dice.random())
    count = dice.uniform(2.0, 4.5)
    x, y = np.floor((u * cos + v * sin) * count + 64.0), np.floor((v * cos - u * sin) * count + 64.0)
    total = x + y
    return total - 2.0 * np.floor(total * 0.5)


def scaly(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    count = dice.uniform(4.0, 7.0)
    x, y = (u + 8.0) * count, (v + 8.0) * count
    column = np.floor(x)
    y = y + 0.5 * column
    x, y = x - column, y - np.floor(y) - 0.5
    return np.minimum(np.maximum(x - 1.6 * y * y, 0.0), 1.0)


def marbled(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height, width = u.shape
    return contrast(cloud(dice, height, width, max(height, width) * dice.uniform(0.12, 0.3), 2), 2.2)


def speckled(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height, width = u.shape
    return contrast(smooth_noise(dice, height, width, height / 2.5, width / 2.5), 2.0)


def plaid(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    count = dice.uniform(2.0, 5.0)
    return (contrast(triangle(u * count + 8.0), 4.0) + contrast(triangle(v * count + 8.0), 4.0)) * 0.5


SURFACES: dict[str, Callable[[Dice, np.ndarray, np.ndarray], np.ndarray]] = {
    function.__name__: function for function in (plain, striped, spotted, checked, scaly, marbled, speckled, plaid)
}


# Backgrounds: (dice, height, width) -> field float32 [height, width].


def _turned(dice: Dice, height: int, width: int, turns: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = direction(turns)
    x = np.arange(width, dtype=np.float32)[None, :] + dice.uniform(0.0, 64.0)
    y = np.arange(height, dtype=np.float32)[:, None] + dice.uniform(0.0, 64.0)
    return x * cos + y * sin + 512.0, y * cos - x * sin + 512.0


def planks(dice: Dice, height: int, width: int) -> np.ndarray:
    x, y = _turned(dice, height, width, dice.pick((0.0, 0.25, dice.uniform(-0.06, 0.06), dice.random())))
    board = dice.uniform(16.0, 34.0)
    row = np.floor(y * (1.0 / board))
    tone = cell_values(dice, row, row)
    grain = triangle(
        y * dice.uniform(0.08, 0.2) + x * 0.01 + cloud(dice, height, width, 40.0, 2) * dice.uniform(2.0, 5.0)
    )
    edge = np.abs(y * (1.0 / board) - row - 0.5)
    t = tone * 0.45 + grain * 0.4 + 0.1
    return np.where(edge > 0.5 - 1.1 / board, 0.0, t).astype(np.float32)


def tiles(dice: Dice, height: int, width: int) -> np.ndarray:
    x, y = _turned(dice, height, width, dice.pick((0.0, 0.125, dice.uniform(-0.05, 0.05))))
    side = dice.uniform(14.0, 30.0)
    x, y = x * (1.0 / side), y * (1.0 / (side * dice.uniform(0.7, 1.0)))
    column, row = np.floor(x), np.floor(y)
    t = cell_values(dice, column, row) * dice.uniform(0.3, 0.9) + cloud(dice, height, width, 10.0, 2) * 0.25
    edge = np.maximum(np.abs(x - column - 0.5), np.abs(y - row - 0.5))
    return np.where(edge > 0.5 - 1.2 / side, dice.pick((0.0, 1.0)), t).astype(np.float32)


def bricks(dice: Dice, height: int, width: int) -> np.ndarray:
    x, y = _turned(dice, height, width, dice.uniform(-0.03, 0.03))
    side = dice.uniform(8.0, 15.0)
    y = y * (1.0 / side)
    row = np.floor(y)
    x = x * (1.0 / (side * 2.2)) + 0.5 * row
    column = np.floor(x)
    t = cell_values(dice, column, row) * 0.55 + cloud(dice, height, width, 6.0, 2) * 0.45
    edge = np.maximum(np.abs(x - column - 0.5) * 2.2 - 0.6, np.abs(y - row - 0.5))
    return np.where(edge > 0.5 - 1.1 / side, dice.pick((0.05, 0.95)), t).astype(np.float32)


def grass(dice: Dice, height: int, width: int) -> np.ndarray:
    fine = smooth_noise(dice, height, width, height / dice.uniform(8.0, 16.0), width / dice.uniform(1.6, 2.4))
    other = smooth_noise(dice, height, width * 2, height / 10.0, width / 1.1)
    lean = np.arange(height, dtype=np.int32)[:, None] // 3 + np.arange(width, dtype=np.int32)[None, :]
    other = np.take_along_axis(other, lean % (2 * width), axis=1)
    return contrast(fine * 0.5 + other * 0.5, 2.2)


def pebbles(dice: Dice, height: int, width: int) -> np.ndarray:
    size = dice.uniform(9.0, 20.0)
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(1.0 / size) + 2.0
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(1.0 / (size * dice.uniform(0.7, 1.0))) + 2.0
    column, row = np.floor(x), np.floor(y)
    rows, columns = int(height / size * 1.5) + 6, int(width / size) + 6
    points = dice.field(3, rows, columns) * 0.8 + 0.1
    nearest, second, tone = (np.full((height, width), value, np.float32) for value in (np.inf, 9.0, 0.0))
    dx, dy = x - column, y - row
    i, j = row.astype(np.int32), column.astype(np.int32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            px, py, shade = (
                points[0][i + down, j + right],
                points[1][i + down, j + right],
                points[2][i + down, j + right],
            )
            px, py = px + (right - dx), py + (down - dy)
            d = px * px + py * py
            second = np.minimum(second, np.maximum(nearest, d))
            tone = np.where(d < nearest, shade, tone)
            nearest = np.minimum(nearest, d)
    gap = np.minimum((second - nearest) * 3.0, 1.0)
    return gap * (tone * 0.6 + 0.4 - nearest * 0.4)


def woven(dice: Dice, height: int, width: int) -> np.ndarray:
    x, y = _turned(dice, height, width, dice.uniform(-0.1, 0.1))
    wide = dice.uniform(0.04, 0.1)
    bands = contrast(triangle(x * wide), 3.0) + contrast(triangle(y * wide * dice.uniform(0.7, 1.3)), 3.0)
    thread = triangle(x * 0.29) + triangle(y * 0.27)
    return bands * 0.35 + thread * 0.12 + 0.03


def stripes(dice: Dice, height: int, width: int) -> np.ndarray:
    x, _ = _turned(dice, height, width, dice.random())
    wave = triangle(x * dice.uniform(0.03, 0.08)) * 0.6 + triangle(x * dice.uniform(0.05, 0.12)) * 0.4
    return contrast(wave + cloud(dice, height, width, 24.0, 2) * 0.2 - 0.1, dice.uniform(2.0, 5.0))


def leaves(dice: Dice, height: int, width: int) -> np.ndarray:
    field = cloud(dice, height, width, 12.0, 2) * 0.4
    for _ in range(int(height * width / 420)):
        size = dice.uniform(6.0, 13.0)
        reach = int(size) + 1
        cx, cy = dice.integer(0, width), dice.integer(0, height)
        top, left = max(cy - reach, 0), max(cx - reach, 0)
        window = field[top : cy + reach + 1, left : cx + reach + 1]
        cos, sin = direction(dice.random())
        x = np.arange(left - cx, left - cx + window.shape[1], dtype=np.float32)[None, :]
        y = np.arange(top - cy, top - cy + window.shape[0], dtype=np.float32)[:, None]
        along, across = (x * cos + y * sin) * (1.0 / size), np.abs(y * cos - x * sin) * (2.6 / size)
        leaf = across + along * along < 1.0
        shade = (0.25 + 0.75 * dice.random()) * (0.7 + 0.3 * np.minimum(across * 3.0, 1.0))
        np.copyto(window, shade.astype(np.float32), where=leaf)
    return field


def sand(dice: Dice, height: int, width: int) -> np.ndarray:
    ripple = smooth_noise(dice, height, width, height / dice.uniform(6.0, 12.0), width / dice.uniform(20.0, 50.0))
    grain = smooth_noise(dice, height, width, height / 1.5, width / 1.5)
    return contrast(ripple * 0.55 + grain * 0.45, 1.5)


def rock(dice: Dice, height: int, width: int) -> np.ndarray:
    base = cloud(dice, height, width, dice.uniform(20.0, 40.0), 4)
    vein = triangle(base * dice.uniform(3.0, 7.0))
    return contrast(base * 0.5 + vein * 0.5, 1.4)


def water(dice: Dice, height: int, width: int) -> np.ndarray:
    warp = smooth_noise(dice, height, width, height / 14.0, width / 30.0) * 2.5
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(dice.uniform(0.06, 0.14))
    return contrast(triangle(y + warp) * 0.7 + smooth_noise(dice, height, width, height / 5.0, width / 14.0) * 0.3, 1.3)


def carpet(dice: Dice, height: int, width: int) -> np.ndarray:
    x, y = _turned(dice, height, width, dice.random())
    side = dice.uniform(0.045, 0.09)
    x, y = triangle(x * side) - 0.5, triangle(y * side) - 0.5
    bloom = contrast(0.5 + (0.16 - x * x - y * y) * 4.0, 2.0)
    return bloom * 0.6 + smooth_noise(dice, height, width, height / 2.0, width / 2.0) * 0.4


BACKGROUNDS: dict[str, Callable[[Dice, int, int], np.ndarray]] = {
    function.__name__: function
    for function in (planks, tiles, bricks, grass, pebbles, woven, stripes, leaves, sand, rock, water, carpet)
}
