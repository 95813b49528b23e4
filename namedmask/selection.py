# SPDX-License-Identifier: MIT
"""Which masks of a run to use: those with good scores, and those that a review accepts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .masks import Key, MaskRecord
    from .review import Verdict


@dataclass(frozen=True)
class Selection:
    """Cuts by score, applied to each category in this order. None: no cut.

    Attributes:
        min_score: Keep masks with at least this score, in [0, 1].
        keep_fraction: Keep this fraction of the remaining masks, in (0, 1], best scores first, but at least one mask.
        per_category: Keep at most this many of the remaining masks, at least 1, best scores first.

    Raises:
        ValueError: If a number is out of its range.
    """

    min_score: float | None = None
    keep_fraction: float | None = None
    per_category: int | None = None

    def __post_init__(self) -> None:
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score: expected a number from 0 to 1, got {self.min_score!r}")
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction: expected a number above 0 and at most 1, got {self.keep_fraction!r}")
        if self.per_category is not None and self.per_category < 1:
            raise ValueError(f"per_category: expected at least 1, got {self.per_category!r}")

    def count(self, masks: int) -> int:
        """How many of this many masks of a category with `min_score` are kept."""
        if masks and self.keep_fraction is not None:
            masks = max(1, round(self.keep_fraction * masks))
        return masks if self.per_category is None else min(masks, self.per_category)


def select(records: Iterable[MaskRecord], selection: Selection, review: Mapping[Key, Verdict] = {}) -> list[MaskRecord]:
    """Returns the masks that a selection and a review keep, in their order.

    Of masks with equal scores, the one with the higher `category_score` is better, then the earlier one. A rejected
    mask is left out and not counted. A mask with another verdict always stays: it counts as better than all scores.

    Args:
        records: Masks of any categories.
        selection: The cuts.
        review: Verdicts by photo and category, see `namedmask.review`.
    """
    candidates: dict[str, list[tuple[bool, float, float, int]]] = {}  # by category; the greatest is the best
    kept: dict[int, MaskRecord] = {}
    for number, record in enumerate(records):
        verdict = review.get(record.key)
        if verdict == "reject" or (
            verdict is None and selection.min_score is not None and record.score < selection.min_score
        ):
            continue
        kept[number] = record
        candidates.setdefault(record.category, []).append((verdict is not None, *record.rank, -number))
    for ranks in candidates.values():
        for reviewed, *_, number in sorted(ranks, reverse=True)[selection.count(len(ranks)) :]:
            if not reviewed:
                del kept[-number]
    return list(kept.values())
