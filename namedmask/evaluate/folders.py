# SPDX-License-Identifier: MIT
"""Folders of label maps compared: the pairs by name, the confusion matrix over all of them, the table, the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..distributed import Worker
from ..errors import UserError
from ..files import atomic_write
from ..formats import BACKGROUND, read_label_map
from ..progress import Progress
from ..threads import map_ahead, thread_count
from .metrics import Confusion, Metrics

if TYPE_CHECKING:
    from ..photos import PhotoSource
    from ..segmenter.predict import Segmenter

IGNORED = 255  # the id that is left out, where no class has it
IGNORED_RED_GREEN = 1000  # ImageNet-S's
IGNORED_16_BIT = 0xFFFF  # where 255 is a class


def label_maps(folder: Path) -> dict[str, Path]:
    """The PNG files of a folder and its sub-folders by their names, "sub/photo" for sub/photo.png."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of PNG masks")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png")
    if not paths:
        raise UserError(f"there are no PNG masks in {folder}")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def default_ignore(classes: int, red_green: bool) -> int:
    """The id that truth uses for pixels that do not count, as the benchmarks write it."""
    if red_green:
        return IGNORED_RED_GREEN
    return IGNORED if classes <= IGNORED else IGNORED_16_BIT


def new_confusion(categories: list[str], ignore: int | None, red_green: bool) -> Confusion:
    """Counts for the background and the categories; UserError where the ignored id is that of a class."""
    classes = len(categories) + 1
    ignore = default_ignore(classes, red_green) if ignore is None else ignore
    try:
        return Confusion(classes, ignore)
    except ValueError as error:
        raise UserError(f"--ignore {ignore}: {error}") from None


def read_categories(folder: Path) -> list[str]:
    """The names in categories.json of a folder; UserError where there is none."""
    try:
        return json.loads((folder / "categories.json").read_text(encoding="utf-8"))["categories"]
    except FileNotFoundError:
        raise UserError(
            f"there is no categories.json in {folder}: give the names of the classes after the background with "
            "--categories-file FILE, one a line"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'categories.json'} cannot be read: {error}") from None


def compare(
    predicted: Iterator[tuple[str, np.ndarray]],
    truth: dict[str, Path],
    confusion: Confusion,
    red_green: bool,
    advance: Callable[[int], None],
) -> None:
    """Adds every photo to `confusion`: predicted gives names of `truth` with labels [H, W]; `advance(1)` after each."""

    def count(one: tuple[str, np.ndarray]) -> np.ndarray:
        name, labels = one
        try:
            return confusion.count(labels, read_label_map(truth[name], red_green))
        except ValueError as error:
            raise UserError(f"{truth[name]}: {error}") from None

    for matrix in map_ahead(count, predicted, thread_count()):
        confusion.matrix += matrix
        advance(1)


def evaluate_folders(
    predictions: Path, truth: Path, categories: list[str] | None, ignore: int | None, red_green: bool
) -> dict:
    """The figures (`as_json`) of the masks in `predictions` against those in `truth`, matched by name.

    categories: names of classes 1, 2, ...; None: those in categories.json of `predictions`.
    ignore:     the id in `truth` that does not count; None: `default_ignore`.
    Errors:     UserError for a true mask without a prediction, other sizes, ids that are no class.
    """
    if categories is None:
        categories = read_categories(predictions)
    if (predictions / "masks").is_dir():  # what `namedmask segment` has made
        predictions = predictions / "masks"
    found, wanted = label_maps(predictions), label_maps(truth)
    if missing := [name for name in wanted if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{wanted[missing[0]]}{more}: there is no mask of that name in {predictions}")
    confusion = new_confusion(categories, ignore, red_green)
    with Progress("evaluate", Worker()) as progress:
        progress.total = len(wanted)
        compare(
            ((name, read_label_map(found[name])) for name in wanted), wanted, confusion, red_green, progress.advance
        )
    return as_json(confusion.metrics(), [BACKGROUND, *categories], len(wanted))


def evaluate_segmenter(
    segmenter: Segmenter, source: PhotoSource, truth: Path, ignore: int | None, red_green: bool
) -> dict:
    """The same of what a segmenter finds in those photos of `source` that `truth` has masks of; nothing is written."""
    from ..segmenter.folder import predictions

    wanted = label_maps(truth)
    confusion = new_confusion(segmenter.names[1:], ignore, red_green)
    with Progress("evaluate", Worker()) as progress:
        progress.total = len(wanted)
        compare(predictions(segmenter, source, set(wanted)), wanted, confusion, red_green, progress.advance)
    return as_json(confusion.metrics(), segmenter.names, len(wanted))


def as_json(metrics: Metrics, classes: Sequence[str], photos: int) -> dict:
    """The metrics as fractions, None where there is nothing to say."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    return {
        "mean_iou": number(metrics.mean_iou),
        "pixel_accuracy": number(metrics.pixel_accuracy),
        "mean_accuracy": number(metrics.mean_accuracy),
        "weighted_iou": number(metrics.weighted_iou),
        "photos": photos,
        "iou": {name: number(value) for name, value in zip(classes, metrics.iou, strict=True)},
        "accuracy": {name: number(value) for name, value in zip(classes, metrics.accuracy, strict=True)},
    }


def write_json(path: Path, figures: dict) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(figures, indent=1).encode() + b"\n")


def print_table(figures: dict) -> None:
    """The table of `as_json`'s figures, in percent."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{figures['photos']} photos", title_justify="left")
    for column in ("class", "IoU %", "accuracy %"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, iou in figures["iou"].items():
        table.add_row(name, _percent(iou), _percent(figures["accuracy"][name]))
    table.add_section()
    table.add_row("mean", _percent(figures["mean_iou"]), _percent(figures["mean_accuracy"]), style="bold")
    table.add_row("all pixels", _percent(figures["weighted_iou"]), _percent(figures["pixel_accuracy"]))
    Console().print(table)
    print(f"mIoU {_percent(figures['mean_iou'])} %, pixel accuracy {_percent(figures['pixel_accuracy'])} %")


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"
