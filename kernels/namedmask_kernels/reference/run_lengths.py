# SPDX-License-Identifier: MIT
"""COCO's run lengths in numpy and plain Python: the definition, for one image, mask bool [h, w]."""

from __future__ import annotations

import numpy as np


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """mask bool [h, w] -> lengths int32 [n] in column-major order, of false and true pixels in turn, false first."""
    pixels = mask.ravel(order="F")
    begins = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(begins, prepend=0, append=len(pixels)).astype(np.int32)


def compress_runs(lengths: np.ndarray) -> bytes:
    """lengths int32 [n] -> COCO's string: from the fourth on, the differences to the lengths two before."""
    text = bytearray()
    for i, length in enumerate(lengths.tolist()):
        value = length - int(lengths[i - 2]) if i > 2 else length
        while True:
            group, value = value & 31, value >> 5
            if value == (-1 if group & 16 else 0):
                text.append(48 + group)
                break
            text.append(48 + group + 32)
    return bytes(text)
