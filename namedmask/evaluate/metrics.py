# SPDX-License-Identifier: MIT
"""Metrics of semantic segmentation, from one confusion matrix over all photos."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Metrics(NamedTuple):
    """Metrics as fractions in [0, 1].

    NaN marks classes that are neither in the ground truth nor predicted, and everything if no pixel was counted. A
    class that is predicted but not in the ground truth has IoU 0, which counts in `mean_iou`, and accuracy NaN.

    Attributes:
        iou: Intersection over union of each class, float64 [classes].
        accuracy: Fraction of the pixels of each class that are predicted correctly, float64 [classes].
        mean_iou: Mean over the classes.
        mean_accuracy: Mean over the classes.
        pixel_accuracy: Fraction of all pixels that are predicted correctly.
        weighted_iou: Mean IoU, weighted by the pixels of each class in the ground truth; 0 if no pixel was counted.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    weighted_iou: float


class Confusion:
    """A confusion matrix.

    Attributes:
        counts: Pixels by true class (row) and predicted class, int64 [classes + 1, classes]; the last row are the
            ignored pixels.

    Args:
        classes: Number of classes, background included; ids are 0 to classes - 1.
        ignore: Id of ignored pixels in the ground truth; any number that is not a class.

    Raises:
        ValueError: If the ignored id is a class.
    """

    def __init__(self, classes: int, ignore: int | None = None):
        if ignore is not None and 0 <= ignore < classes:
            raise ValueError(f"Confusion: the ignored id {ignore} is one of the {classes} classes")
        self.classes, self.ignore = classes, ignore
        self.counts = np.zeros((classes + 1, classes), np.int64)

    @property
    def matrix(self) -> np.ndarray:
        """The counts without the ignored pixels, int64 [classes, classes]."""
        return self.counts[:-1]

    @property
    def ignored(self) -> float:
        """Fraction of the pixels that are ignored; NaN without pixels."""
        total = self.counts.sum()
        return float(self.counts[-1].sum() / total) if total else float("nan")

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Adds a photo to the matrix, in one pass of O(pixels + classes^2).

        Args:
            prediction: Predicted label map of any integer dtype.
            truth: True label map of the same shape and any integer dtype.

        Raises:
            ValueError: If the shapes differ or an id is not a class; the counts are unchanged then.
        """
        self.counts += self.count(prediction, truth)

    def count(self, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Returns the counts of one photo without adding it, so several threads may call it. See `add`."""
        n = self.classes
        if prediction.shape != truth.shape:
            raise ValueError(f"the prediction is {_size(prediction)}, the truth {_size(truth)}")
        # int32 is faster, if ids and the numbers of cells fit.
        rows: np.ndarray[Any, np.dtype[Any]] = truth.astype(
            np.int32 if n < 46_000 and np.can_cast(truth.dtype, np.int32) else np.int64
        )
        if self.ignore is not None:
            rows[rows == self.ignore] = n
        for name, ids, end in (("prediction", prediction, n), ("truth", rows, n + (self.ignore is not None))):
            if ids.size and (ids.min() < 0 or ids.max() >= end):
                wrong = int(ids.min() if ids.min() < 0 else ids.max())
                ignored = f", and {self.ignore} is ignored" if self.ignore is not None and name == "truth" else ""
                raise ValueError(f"the {name} has the id {wrong}: classes are 0 to {n - 1}{ignored}")
        rows *= n
        rows += prediction.astype(rows.dtype, copy=False)
        return np.bincount(rows.ravel(), minlength=(n + 1) * n).reshape(n + 1, n)

    def metrics(self) -> Metrics:
        """Computes the metrics of all photos."""
        correct, true = np.diag(self.matrix), self.matrix.sum(1)
        total = true.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = correct / (true + self.matrix.sum(0) - correct)
            accuracy = correct / true
            weight = true / total
            pixel_accuracy = float(correct.sum() / total)
        present = weight > 0
        weighted_iou = float((weight[present] * iou[present]).sum())
        return Metrics(iou, accuracy, _nanmean(iou), _nanmean(accuracy), pixel_accuracy, weighted_iou)


def _nanmean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _size(labels: np.ndarray) -> str:
    return " x ".join(map(str, labels.shape))
