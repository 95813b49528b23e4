# SPDX-License-Identifier: MIT
"""Metrics of salient object detection. Each is computed per photo, in float64, and averaged over the photos.

A prediction is a bool mask or a map of values in [0, 1]; the truth is a bool mask.
"""

from __future__ import annotations

import numpy as np

BETA_SQUARED = 0.3  # weight of the recall in F-beta
ALPHA = 0.5  # weight of the objects in the S-measure
LEVELS = 255  # thresholds of F-beta
TINY = np.finfo(np.float64).eps


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks [H, W]; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def f_beta(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F-beta at 255 thresholds; that of a binary mask is the same at all of them.

    Precision and recall are those of the pixels whose value is at least the threshold. F-beta is 0 where no pixel is
    correct.

    Args:
        prediction: bool, or float in [0, 1], [H, W].
        truth: bool [H, W].

    Returns:
        float64 [255], for the thresholds 1/255, 2/255, ..., 1.
    """
    level = np.floor(prediction.astype(np.float64) * LEVELS + 1e-9).astype(np.int64).clip(0, LEVELS)
    correct = _at_least(np.bincount(level[truth], minlength=LEVELS + 1))
    predicted = _at_least(np.bincount(level.ravel(), minlength=LEVELS + 1))
    # (1 + b) P R / (b P + R), multiplied by the pixels of both: defined wherever one of them is not empty.
    both = BETA_SQUARED * np.count_nonzero(truth) + predicted
    return (1 + BETA_SQUARED) * correct / np.maximum(both, TINY)


def _at_least(counts: np.ndarray) -> np.ndarray:
    """Pixels per level [256] -> pixels of at least level 1, 2, ..., float64 [255]."""
    return counts[::-1].cumsum()[::-1][1:].astype(np.float64)


def mean_absolute_error(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute difference of the prediction, bool or float in [0, 1], and the truth, bool, both [H, W]."""
    return float(np.abs(prediction.astype(np.float64) - truth).mean())


def s_measure(prediction: np.ndarray, truth: np.ndarray) -> float:
    """The structure measure of Fan et al., "Structure-measure: a new way to evaluate foreground maps", ICCV 2017.

    The mean of an object-aware part, which compares mean and deviation of the prediction on the object and on the
    background, and a region-aware part, which compares the four parts around the center of the object by SSIM. If the
    truth is all background (all object), it is the mean of 1 - prediction (of the prediction).

    Args:
        prediction: bool, or float in [0, 1], [H, W].
        truth: bool [H, W].

    Returns:
        The measure, in [0, 1].
    """
    values = prediction.astype(np.float64)
    share = float(truth.mean())
    if share == 0:
        return 1 - float(values.mean())
    if share == 1:
        return float(values.mean())
    objects = share * _object_score(values[truth]) + (1 - share) * _object_score(1 - values[~truth])
    return max(0.0, ALPHA * objects + (1 - ALPHA) * _region_score(values, truth))


def _object_score(values: np.ndarray) -> float:
    mean = values.mean()
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + deviation))


def _region_score(values: np.ndarray, truth: np.ndarray) -> float:
    rows, columns = np.nonzero(truth)
    # Rows and columns of the first part: the center, counted from 1 and rounded.
    row, column = (int(np.floor(axis.mean() + 1.5)) for axis in (rows, columns))
    score = 0.0
    for vertical in (slice(row), slice(row, None)):
        for horizontal in (slice(column), slice(column, None)):
            part, true = values[vertical, horizontal], truth[vertical, horizontal]
            if part.size:
                score += part.size / truth.size * _ssim(part, true.astype(np.float64))
    return score


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity of two regions, from their means, variances and covariance; 1 if both are flat."""
    mean_x, mean_y = x.mean(), y.mean()
    variances = ((x - mean_x) ** 2).sum() + ((y - mean_y) ** 2).sum()  # times the number of pixels, as the covariance
    covariance = ((x - mean_x) * (y - mean_y)).sum()
    above = 4 * mean_x * mean_y * covariance
    below = (mean_x**2 + mean_y**2) * variances
    if above != 0:
        return float(above / below)
    return 1.0 if below == 0 else 0.0


class SaliencyScores:
    """Scores of a set of photos, accumulated one photo at a time."""

    def __init__(self) -> None:
        self.photos = 0
        self.sums = np.zeros(4)  # IoU, pixel accuracy, S-measure, mean absolute error
        self.f_beta = np.zeros(LEVELS)

    def add(self, scores: tuple[np.ndarray, np.ndarray]) -> None:
        """Adds the result of `score` of a photo."""
        self.photos += 1
        self.sums += scores[0]
        self.f_beta += scores[1]

    @staticmethod
    def score(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores one photo; several threads may call it.

        Args:
            prediction: bool, or float in [0, 1], [H, W]. IoU and pixel accuracy are those of the pixels above 0.5.
            truth: bool [H, W].

        Returns:
            IoU, pixel accuracy, S-measure and mean absolute error, float64 [4]; and `f_beta`.

        Raises:
            ValueError: If the shapes differ.
        """
        if prediction.shape != truth.shape:
            sizes = (" x ".join(map(str, one.shape)) for one in (prediction, truth))
            raise ValueError("the prediction is {}, the truth {}".format(*sizes))
        mask = prediction > 0.5
        figures = (
            iou(mask, truth),
            float((mask == truth).mean()),
            s_measure(prediction, truth),
            mean_absolute_error(prediction, truth),
        )
        return np.array(figures), f_beta(prediction, truth)

    def means(self) -> dict[str, float]:
        """Returns the means over the photos by name; F-beta is that of the best threshold for the whole set."""
        names = ("iou", "pixel_accuracy", "s_measure", "mean_absolute_error")
        figures = {name: round(float(value), 6) for name, value in zip(names, self.sums / self.photos, strict=True)}
        return {**figures, "max_f_beta": round(float((self.f_beta / self.photos).max()), 6)}
