# SPDX-License-Identifier: MIT
"""Photos as batches for detectors, and detections as pairs per photo."""

import torch

from namedmask.batches import upload


def packed(*photos):
    return upload([photo.pixels for photo in photos], torch.device("cpu"))


def detect(detector, *photos):
    """The mask and the confidence of each photo."""
    masks, confidence = detector.detect(packed(*photos))
    return list(zip(masks.grids(), confidence.tolist(), strict=True))
