# SPDX-License-Identifier: MIT
"""SelfMask's vote among candidate masks in numpy: the definition, for one image, masks bool [n, h, w]."""

from __future__ import annotations

import numpy as np

EMPTY, FULL_HEIGHT, FULL_WIDTH = 1, 2, 4


def exclusion_reasons(masks: np.ndarray) -> np.ndarray:
    """masks bool [n, h, w] -> uint8 [n]: why a candidate does not vote, 0 for those that do."""
    reasons = np.zeros(len(masks), np.uint8)
    for i, mask in enumerate(masks):
        if not mask.any():
            reasons[i] = EMPTY
            continue
        reasons[i] |= FULL_HEIGHT * (mask[0].any() and mask[-1].any())
        reasons[i] |= FULL_WIDTH * (mask[:, 0].any() and mask[:, -1].any())
    return reasons


def vote_masks(masks: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """masks bool [n, h, w] -> winner, kept bool [n], reasons uint8 [n], scores float64 [n]."""
    reasons = exclusion_reasons(masks)
    kept = reasons == 0
    if not kept.any():
        kept[:] = True
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.int64)
    intersection = flat @ flat.T
    area = intersection.diagonal()
    iou = intersection / (area[:, None] + area - intersection + 1e-7)
    scores = np.where(kept, (iou * kept).sum(1), 0.0)
    winner = int(np.where(kept, scores, -1.0).argmax()) if len(masks) else -1
    return winner, kept, reasons, scores
