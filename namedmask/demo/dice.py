# SPDX-License-Identifier: MIT
"""Random numbers that are bit-identical on every machine.

NumPy guarantees the raw stream of a bit generator (here PCG64) across versions, but not the methods of ``Generator``,
and methods such as ``normal`` call the libm of the machine. Therefore `Dice` draws raw 64-bit words and converts them
to numbers with correctly rounded arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """A random number generator, seeded by any number of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._block: list[int] = []

    def random(self) -> float:
        """A float in [0, 1) with 53 random bits."""
        if not self._block:  # 128 words per call: the call costs more than the words
            self._block = self._bits.random_raw(128).tolist()
        return (self._block.pop() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high)."""
        return low + int(self.random() * (high - low))

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, with equal probability."""
        return items[int(self.random() * len(items))]

    def sign(self) -> float:
        """-1.0 or 1.0, with equal probability."""
        return -1.0 if self.random() < 0.5 else 1.0

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list with the items in random order (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = int(self.random() * (last + 1))
            result[last], result[other] = result[other], result[last]
        return result

    def field(self, *shape: int) -> np.ndarray:
        """A float32 array, uniform in [0, 1) in steps of 2**-24 (exact in float32)."""
        count = 1
        for side in shape:
            count *= side
        words = self._bits.random_raw(count)
        return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def bytes_field(self, *shape: int) -> np.ndarray:
        """A uint8 array; eight values from each raw word, little-endian on every machine."""
        count = 1
        for side in shape:
            count *= side
        words = self._bits.random_raw((count + 7) // 8)
        return words.astype("<u8").view(np.uint8)[:count].reshape(shape)


def _unit_circle() -> tuple[tuple[float, float], ...]:
    # cos and sin of 2 pi / 128 as literals, then complex products with correctly rounded arithmetic: no call to libm.
    cos_step, sin_step = 0.9987954562051724, 0.049067674327418015
    x, y, table = 1.0, 0.0, []
    for _ in range(128):
        table.append((x, y))
        x, y = x * cos_step - y * sin_step, x * sin_step + y * cos_step
    return tuple(table)


CIRCLE = _unit_circle()
"""128 unit vectors (cos, sin) at equal angles. Every rotation in a scene is one of them."""


def direction(turns: float) -> tuple[float, float]:
    """The vector (cos, sin) of `CIRCLE` nearest to an angle in turns (1.0 is a full circle)."""
    return CIRCLE[int(turns * 128.0 + 128000.5) % 128]
