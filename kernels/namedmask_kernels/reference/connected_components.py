# SPDX-License-Identifier: MIT
"""Connected components in numpy and plain Python: the definition, for one image, mask bool [h, w]."""

from __future__ import annotations

from collections import deque

import numpy as np

SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # steps in y and x
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def connected_components(mask: np.ndarray, connectivity: int = 4) -> np.ndarray:
    """mask bool [h, w] -> labels int32 [h, w]: 1, 2, ... in raster order of the first pixel."""
    h, w = mask.shape
    steps = SIDES if connectivity == 4 else SIDES + CORNERS
    labels = np.zeros((h, w), np.int32)
    count = 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start] = count
        queue = deque([start])
        while queue:
            y, x = queue.popleft()
            for v, u in ((y + dy, x + dx) for dy, dx in steps):
                if 0 <= v < h and 0 <= u < w and mask[v, u] and not labels[v, u]:
                    labels[v, u] = count
                    queue.append((v, u))
    return labels


def component_stats(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """labels int32 [h, w] -> areas int32 [n], boxes int32 [n, 4] as x, y, width, height."""
    n = int(labels.max(initial=0))
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:].astype(np.int32)
    boxes = np.zeros((n, 4), np.int32)
    for label in range(1, n + 1):
        y, x = np.nonzero(labels == label)
        boxes[label - 1] = x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1
    return areas, boxes


def largest_component(mask: np.ndarray, connectivity: int) -> np.ndarray:
    """mask bool [h, w] -> bool [h, w]: its largest component; of several equally large, the first in raster order."""
    labels = connected_components(mask, connectivity)
    areas, _ = component_stats(labels)
    return labels == areas.argmax() + 1 if len(areas) else np.zeros_like(mask)


def fill_holes(mask: np.ndarray, connectivity: int) -> np.ndarray:
    """mask bool [h, w] -> bool [h, w]: the mask and the background that no connected path joins to the border."""
    labels = connected_components(~mask, connectivity)
    border = np.concatenate([labels[:1].ravel(), labels[-1:].ravel(), labels[:, :1].ravel(), labels[:, -1:].ravel()])
    return ~np.isin(labels, border[border > 0])
