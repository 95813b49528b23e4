# SPDX-License-Identifier: MIT
"""Counts the usable masks of each category before a training relies on them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .distributed import Worker
from .errors import UserError
from .masks import MaskRecord
from .progress import logger, warn

FEW = 10  # a category with fewer usable masks is worth a warning
LISTED = 20  # number of categories that are listed one by one


def show_mask_counts(categories: Sequence[str], records: Iterable[MaskRecord], masks: Path) -> None:
    """Logs how many masks of each category are usable, that is not empty, and warns of those with few.

    Args:
        categories: Names of the categories.
        records: All masks.
        masks: The folder that they are from, for messages.
    """
    total: Counter[str] = Counter()
    usable: Counter[str] = Counter()
    for record in records:
        total[record.category] += 1
        usable[record.category] += record.area > 0
    counts = [usable[name] for name in categories]
    logger.info(
        f"usable masks in {masks}: {sum(counts)} of {total.total()}; per category {min(counts)} to {max(counts)}, "
        f"median {statistics.median(counts):g}"
    )
    few = [name for name in categories if usable[name] < FEW]
    for name in categories if len(categories) <= LISTED else few[:LISTED]:
        logger.info(f"  {name}: {usable[name]} of {total[name]}")
    if few:
        warn(f"{_some(few)} fewer than {FEW} usable masks")


def check_mask_counts(
    categories: Sequence[str], records: Sequence[MaskRecord], masks: Path, allow_empty: bool, worker: Worker
) -> None:
    """Shows the masks of each category (`show_mask_counts`) before a training. Every worker calls it.

    Raises:
        UserError: If a category has no usable mask and `allow_empty` is false, or if none has any.
    """
    if worker.is_main:
        show_mask_counts(categories, records, masks)
    usable = {record.category for record in records if record.area}
    if not usable:
        raise UserError(f"all masks in {masks} are empty, so there is nothing to learn from")
    empty = [name for name in categories if name not in usable]
    if empty and not allow_empty:
        if masks.name == "refined":
            remedy = f"train the experts again with other settings, delete {masks} to use the detector's masks"
        else:
            remedy = "detect with other settings"
        raise UserError(
            f"{_some(empty)} no usable mask in {masks}: {remedy}, leave the categories out, or train without them "
            "with --allow-empty"
        )


def _some(names: Sequence[str]) -> str:
    """Names a few of many categories as the subject of a sentence."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} categories ({', '.join(names[:5])}{more}) have" if len(names) > 1 else f"{names[0]!r} has"
