# SPDX-License-Identifier: MIT
"""Curation: which of the photos that match a category best get the places in its archive.

A rule flags the photos that should not be in the archive, with the reason. They lose their places to the next photos.
If too few are left, they get the remaining places at the end of the archive, in the order of `Reason`: an archive is
never smaller than without rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from .errors import counted
from .files import write_json_lines
from .masks import ONLY_FIELDS, Number, parse_line, read_lines

if TYPE_CHECKING:
    import torch

POOL = 4  # candidates per place
BLOCK = 512  # photos whose similarities are computed together
# In the order in which such photos fill places that are left. A near-duplicate shows the category, if the photo that it
# resembles does; a photo that matches another category better probably does not.
Reason = Literal["near-duplicate", "better-match"]
FILE = "archive.dropped.jsonl"  # in the run folder


class Candidate(NamedTuple):
    """A photo among those that match a category best."""

    photo: int  # its number in the index
    score: float  # cosine similarity to the category's name
    best: int  # number of the category that it matches best
    best_score: float  # cosine similarity to that one


class Flag(NamedTuple):
    """Why a candidate should not be in the archive.

    other: number of the candidate that it resembles ("near-duplicate"), or of the category ("better-match")
    similarity: cosine similarity to it
    """

    reason: Reason
    other: int
    similarity: float


@dataclass(frozen=True)
class Dropped:
    """A photo that has lost its place in the archive of a category: a line of archive.dropped.jsonl.

    other: photo that it is a near-duplicate of, or category that it matches better
    similarity: cosine similarity to `other`
    """

    photo: str
    category: str
    score: Number
    reason: Reason
    other: str
    similarity: Number
    __pydantic_config__ = ONLY_FIELDS


def better_matches(candidates: Sequence[Candidate]) -> dict[int, Flag]:
    """The candidates that match another category better, by their positions. A tie is not flagged."""
    return {
        position: Flag("better-match", one.best, one.best_score)
        for position, one in enumerate(candidates)
        if one.best_score > one.score
    }


def near_duplicates(rows: torch.Tensor, threshold: float, count: int) -> dict[int, Flag]:
    """The candidates that are near-duplicates of better ones.

    A candidate is one if its cosine similarity to a better candidate that is none itself is above the threshold. The
    search ends when `count` candidates are none.

    Args:
        rows: Embeddings of the candidates, float32 [n, d], L2-normalized, best first.
        threshold: Cosine similarity. Similarities are rounded to 6 decimals.
        count: Candidates that are needed.

    Returns:
        Flags by position in `rows`. Each names the most similar one of the better candidates that are none; of
        equally similar ones the best.
    """
    kept: list[int] = []
    found: dict[int, Flag] = {}
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK]
        before, columns = len(kept), [*kept, *range(first, first + len(block))]
        similar = (block @ rows[columns].T).double().numpy().round(6)
        is_kept = np.arange(len(columns)) < before
        for number, row in enumerate(similar):
            if len(kept) == count:
                return found
            nearest = int(np.where(is_kept, row, -2).argmax())
            if is_kept[nearest] and row[nearest] > threshold:
                found[first + number] = Flag("near-duplicate", columns[nearest], float(row[nearest]))
            else:
                kept.append(first + number)
                is_kept[before + number] = True
    return found


def fill_places(candidates: int, flags: Mapping[int, Flag], count: int) -> tuple[list[int], dict[int, Flag]]:
    """Gives the places in the archive of a category.

    Args:
        candidates: Number of candidates, which are ordered best first.
        flags: By position.
        count: Number of places.

    Returns:
        Positions of the `count` candidates that get a place, or of all if there are fewer: those without a flag,
        then the others, in the order of `Reason`; best first each. And the flags of those of the best `count`
        candidates that get none, which have lost their places.
    """
    ranks = {reason: rank for rank, reason in enumerate(get_args(Reason))}
    order = sorted(range(candidates), key=lambda one: ranks[flags[one].reason] if one in flags else -1)
    places = order[:count]
    lost = sorted(set(range(min(count, candidates))).difference(places))
    return places, {one: flags[one] for one in lost}


def summary(reasons: Mapping[Reason, int]) -> str:
    """How many photos were dropped for each reason, in words; "" if none."""
    duplicates, matches = reasons.get("near-duplicate", 0), reasons.get("better-match", 0)
    photos = "photos that match" if matches > 1 else "photo that matches"
    parts = [counted(duplicates, "near-duplicate")] if duplicates else []
    return " and ".join(parts + [f"{matches:,} {photos} another category better"] * (matches > 0))


def write_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    """Writes archive.dropped.jsonl, one photo per line."""
    write_json_lines(path, map(asdict, dropped))


def read_dropped(path: Path) -> Iterator[Dropped]:
    """Yields the photos in archive.dropped.jsonl. Raises DamagedFile at a line that is invalid."""
    return read_lines(path, lambda line: parse_line(Dropped, line), "delete it; it only tells what was left out")
