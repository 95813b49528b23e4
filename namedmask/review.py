# SPDX-License-Identifier: MIT
"""OUT/review.jsonl: what a person has decided about masks of a run.

    {"photo": "cat/1.jpg", "category": "cat", "verdict": "reject"}

One line per verdict; of several about the same photo and category, the last one counts.

accept    the mask stays, whatever its score
reject    the mask is left out
detector  the mask of the detector (OUT/masks) stays instead of the expert's (OUT/refined)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .errors import UserError
from .files import write_json_lines
from .masks import ONLY_FIELDS, Key, MaskRecord, best_masks, parse_line, read_lines, read_masks
from .progress import warn

FILE = "review.jsonl"
Verdict = Literal["accept", "reject", "detector"]


@dataclass(frozen=True, slots=True)
class _Line:
    photo: str
    category: str
    verdict: Verdict
    __pydantic_config__ = ONLY_FIELDS


Review = dict[Key, Verdict]


def read_review(out: str | os.PathLike) -> Review:
    """Returns the verdicts of a run, by photo and category; none if there is no review.

    Raises:
        DamagedFile: With the file and the line number, at an invalid line.
    """
    path = Path(out, FILE)
    return dict(read_lines(path, _parse, "correct or delete the line")) if path.exists() else {}


def _parse(line: bytes) -> tuple[Key, Verdict]:
    one = parse_line(_Line, line)
    return (one.photo, one.category), one.verdict


def warn_of_others(out: str | os.PathLike, review: Review, keys: Iterable[Key]) -> None:
    """Warns of verdicts that are about none of the masks: their names are mistyped, or the masks are gone.

    Args:
        out: The run folder.
        review: Its verdicts.
        keys: Photo and category of its masks.
    """
    others = review.keys() - set(keys)
    if others:
        photo, category = min(others)
        warn(
            f"{Path(out, FILE)}: verdicts about no mask: {len(others)} of {len(review)}, such as {photo!r} ({category})"
        )


def write_review(out: str | os.PathLike, verdicts: Mapping[Key, Verdict]) -> None:
    """Writes the verdicts of a run, in their order. The file appears whole or not at all."""
    write_json_lines(Path(out, FILE), (asdict(_Line(*key, verdict)) for key, verdict in verdicts.items()))


def reviewed_masks(out: str | os.PathLike) -> Iterator[MaskRecord]:
    """Yields the best masks of a run, in order, without the rejected ones; the detector's where the review says so.

    Raises:
        DamagedFile: If the review or a shard is damaged.
        UserError: If the review chooses a mask of the detector that OUT/masks does not have.
    """
    review = read_review(out)
    for record in current_masks(out, review):
        if review.get(record.key) != "reject":
            yield record


def current_masks(out: str | os.PathLike, review: Mapping[Key, Verdict]) -> Iterator[MaskRecord]:
    """Yields the best masks of a run as `reviewed_masks` does, but rejected ones as well."""
    folder, detector = best_masks(out), Path(out, "masks")
    chosen = {key for key, verdict in review.items() if verdict == "detector"}
    if not chosen or folder == detector:
        yield from read_masks(folder)
        return
    detected = {record.key: record for record in read_masks(detector) if record.key in chosen}
    for record in read_masks(folder):
        if record.key in chosen and record.key not in detected:
            raise UserError(
                f"{Path(out, FILE)} chooses the detector's mask of {record.photo!r} ({record.category}), but "
                f"{detector} has none; remove the line"
            )
        yield detected.get(record.key, record)
