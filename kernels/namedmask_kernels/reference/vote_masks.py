# SPDX-License-Identifier: MIT
"""SelfMask's vote among candidate masks in plain numpy, the definition. One photo: masks bool [n, h, w]."""

from __future__ import annotations

import numpy as np

EMPTY, FULL_HEIGHT, FULL_WIDTH = 1, 2, 4


def reasons(masks: np.ndarray) -> np.ndarray:
    """masks bool [n, h, w] -> uint8 [n]: why a candidate should not vote, 0 for those that should."""
    found = np.zeros(len(masks), np.uint8)
    for i, mask in enumerate(masks):
        if not mask.any():
            found[i] = EMPTY
            continue
        found[i] |= FULL_HEIGHT * (mask[0].any() and mask[-1].any())
        found[i] |= FULL_WIDTH * (mask[:, 0].any() and mask[:, -1].any())
    return found


def vote_masks(masks: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """masks bool [n, h, w] -> winner, kept bool [n], reasons uint8 [n], scores float64 [n]."""
    why = reasons(masks)
    kept = why == 0
    if not kept.any():
        kept[:] = True
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.int64)
    both = flat @ flat.T
    area = both.diagonal()
    iou = both / (area[:, None] + area - both + 1e-7)
    scores = np.where(kept, (iou * kept).sum(1), 0.0)
    winner = int(np.where(kept, scores, -1.0).argmax()) if len(masks) else -1
    return winner, kept, why, scores
