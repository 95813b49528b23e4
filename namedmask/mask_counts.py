# SPDX-License-Identifier: MIT
"""Counts the selected and the usable masks of each category before a training relies on them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .console import plain_console
from .distributed import Worker
from .errors import UserError, listed
from .masks import MaskRecord
from .progress import logger, warn

FEW = 10  # a category with fewer usable masks is worth a warning
LISTED = 20  # number of categories that are listed one by one


def show_mask_counts(
    categories: Sequence[str], records: Sequence[MaskRecord], masks: Path, selected: Sequence[MaskRecord] | None = None
) -> None:
    """Logs how many masks of each category are usable, that is not empty, and warns of those with few.

    Args:
        categories: Names of the categories.
        records: All masks.
        masks: The folder that they are from, for messages.
        selected: Those to train on: no other is usable. None: all, without a column of their own.
    """
    from rich.table import Table

    candidates = records if selected is None else selected
    total = Counter(record.category for record in records)
    usable = Counter(record.category for record in candidates if record.area)
    columns = {"masks": total, "selected": Counter(record.category for record in candidates), "usable": usable}
    if selected is None:
        del columns["selected"]
    counts = [usable[name] for name in categories]
    logger.info(
        f"usable masks in {masks}: {sum(counts)} of {total.total()}; per category {min(counts)} to {max(counts)}, "
        f"median {statistics.median(counts):g}"
    )
    few = [name for name in categories if usable[name] < FEW]
    if listed := list(categories) if len(categories) <= LISTED else few[:LISTED]:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("category", overflow="fold")
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        for name in listed:
            table.add_row(name, *(str(column[name]) for column in columns.values()))
        console = plain_console()
        with console.capture() as capture:
            console.print(table)
        logger.info(capture.get().removesuffix("\n"))
    if few:
        warn(f"{_some(few)} fewer than {FEW} usable masks in {masks}")


def check_mask_counts(
    categories: Sequence[str],
    records: Sequence[MaskRecord],
    selected: Sequence[MaskRecord],
    masks: Path,
    allow_empty: bool,
    worker: Worker,
) -> None:
    """Shows the masks of each category (`show_mask_counts`) before a training. Every worker calls it.

    Raises:
        UserError: If a category has no usable mask among the selected ones and `allow_empty` is false, or if none has
            any.
    """
    if worker.is_main:
        show_mask_counts(categories, records, masks, selected)
    usable, before = ({record.category for record in some if record.area} for some in (selected, records))
    if not before:
        raise UserError(f"all masks in {masks} are empty, so there is nothing to learn from")
    empty = [name for name in categories if name not in usable]
    if usable and (not empty or allow_empty):
        return
    if lost := [name for name in empty if name in before]:
        which, remedy = f"{_some(lost)} no usable mask that is selected", "lower --min-score or change review.jsonl"
    else:
        which, remedy = f"{_some(empty)} no usable mask in {masks}", "detect with other settings"
        if masks.name == "refined":
            remedy = f"train the experts again with other settings, delete {masks} to use the detector's masks"
    more = ", leave the categories out, or train without them with --allow-empty" if usable else ""
    raise UserError(f"{which}: {remedy}{more}")


def expect_listed(records: Sequence[MaskRecord], categories: Sequence[str], masks: Path) -> None:
    """Raises UserError if masks are of categories that the archive of their run does not list."""
    if unknown := sorted({record.category for record in records} - set(categories)):
        run = masks.parent
        raise UserError(
            f"{masks} has masks of {listed(unknown)}, which {run / 'archive.json'} does not list; make the masks again "
            f"with `namedmask pseudolabel {run} --overwrite`"
        )


def _some(names: Sequence[str]) -> str:
    """Names a few of many categories as the subject of a sentence."""
    return f"{len(names)} categories ({listed(names, 5)}) have" if len(names) > 1 else f"{names[0]!r} has"
