# SPDX-License-Identifier: MIT
"""Semantic segmentation's metrics, from one confusion matrix over all photos."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Metrics(NamedTuple):
    """Fractions in [0, 1]. NaN: a class that is neither in the truth nor predicted; all where nothing was counted.

    iou, accuracy: float64 [classes]. A class that is predicted but not in the truth has IoU 0, which counts in
    `mean_iou`, and accuracy NaN.
    """

    iou: np.ndarray
    accuracy: np.ndarray  # of the pixels of a class, the share that was found
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    weighted_iou: float  # by the pixels of each class in the truth; 0 where nothing was counted


class Confusion:
    """Counts of pixels, `matrix` int64 [classes, classes]: a row for each true class, a column for each predicted one.

    classes: their number, background included; ids are 0 to classes - 1. ignore: the id of true pixels that are left
    out, any number that is no class.
    """

    def __init__(self, classes: int, ignore: int | None = None):
        if ignore is not None and 0 <= ignore < classes:
            raise ValueError(f"Confusion: the ignored id {ignore} is that of one of the {classes} classes")
        self.classes, self.ignore = classes, ignore
        self.matrix = np.zeros((classes, classes), np.int64)

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Counts a photo: label maps [...] of one shape and any integer dtype. One pass, O(pixels + classes^2).

        Raises ValueError for different shapes, and for ids that are no class; nothing is counted then.
        """
        self.matrix += self.count(prediction, truth)

    def count(self, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """The matrix of one photo, as `add` counts it; changes nothing, so threads may call it."""
        n = self.classes
        if prediction.shape != truth.shape:
            raise ValueError(f"the prediction is {_size(prediction)}, the truth {_size(truth)}")
        # int32 is the faster one, where ids and numbers of cells fit.
        rows = truth.astype(np.int32 if n < 46_000 and np.can_cast(truth.dtype, np.int32) else np.int64)
        if self.ignore is not None:
            rows[rows == self.ignore] = n
        for what, ids, end in (("prediction", prediction, n), ("truth", rows, n + (self.ignore is not None))):
            if ids.size and (ids.min() < 0 or ids.max() >= end):
                wrong = int(ids.min() if ids.min() < 0 else ids.max())
                left_out = f", and {self.ignore} is left out" if self.ignore is not None and what == "truth" else ""
                raise ValueError(f"the {what} has the id {wrong}: classes are 0 to {n - 1}{left_out}")
        rows *= n
        rows += prediction.astype(rows.dtype, copy=False)
        return np.bincount(rows.ravel(), minlength=(n + 1) * n)[: n * n].reshape(n, n)

    def metrics(self) -> Metrics:
        found, true = np.diag(self.matrix), self.matrix.sum(1)
        total = true.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = found / (true + self.matrix.sum(0) - found)
            accuracy = found / true
            share = true / total
            pixel_accuracy = float(found.sum() / total)
        there = share > 0
        return Metrics(
            iou, accuracy, _nanmean(iou), _nanmean(accuracy), pixel_accuracy, float((share[there] * iou[there]).sum())
        )


def _nanmean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def _size(labels: np.ndarray) -> str:
    return " x ".join(map(str, labels.shape))
