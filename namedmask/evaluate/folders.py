# SPDX-License-Identifier: MIT
"""Compares folders of label maps: pairs files by name, accumulates a confusion matrix, writes a table and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..console import plain_console
from ..distributed import Worker
from ..errors import UserError, counted
from ..files import composed, find_files
from ..formats import BACKGROUND, CATEGORIES, read_categories, read_label_map
from ..photos import SEGMENT_RECORD, PhotoError, PhotoSource
from ..progress import Progress, warn
from ..segmenter.mask_names import stem
from ..threads import map_ahead, thread_count
from .metrics import Confusion

if TYPE_CHECKING:
    from ..segmenter.predict import Segmenter

REMEDY = "pass the names with --categories-file FILE"  # for a damaged list of names
IGNORED = 255  # the ignored id, unless it is a class
IGNORED_RED_GREEN = 1000  # in color files of ImageNet-S
IGNORED_16_BIT = 0xFFFF  # if 255 is a class


class Truth(NamedTuple):
    """Ground truth of a photo.

    Attributes:
        where: The file, and the place in it if it holds several, for messages.
        read: Returns the integer labels [H, W]. Raises UserError, or ValueError if `where` is to be added.
    """

    where: str
    read: Callable[[], np.ndarray]


def by_stem(folder: Path, *suffixes: str) -> dict[str, Path]:
    """Files below a folder by their names without suffix, `composed`. Raises UserError if two have the same name."""
    files: dict[str, Path] = {}
    for name in find_files(folder, *suffixes):
        path = folder / name
        if (earlier := files.setdefault(composed(Path(name).with_suffix("").as_posix()), path)) is not path:
            raise UserError(f"{earlier} and {path} have the same name; remove one of them")
    return files


def label_maps(folder: Path, instead: str = "") -> dict[str, Path]:
    """Returns the PNG files of a folder and its subfolders by name, `composed`: "sub/photo" for sub/photo.png.

    Hidden files are skipped and links to folders are followed, as those of photos are.

    Args:
        folder: The folder.
        instead: Ends the message if there are none: what else the folder may hold.

    Raises:
        UserError: If there are none, if two have the same name, or if a folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of PNG masks" if folder.exists() else f"{folder} does not exist")
    if maps := by_stem(folder, ".png"):
        return maps
    raise UserError(f"there are no PNG masks in {folder}{instead}")


def default_ignore(classes: int, red_green: bool) -> int:
    """Returns the id that benchmarks use for ignored pixels of the ground truth."""
    if red_green:
        return IGNORED_RED_GREEN
    return IGNORED if classes <= IGNORED else IGNORED_16_BIT


def new_confusion(categories: Sequence[str], ignore: int | None, red_green: bool) -> Confusion:
    """Creates a confusion matrix for the background and the categories.

    Args:
        categories: Names of classes 1, 2, ...
        ignore: The ignored id; None: `default_ignore`.
        red_green: Whether the ground truth consists of color files of ImageNet-S.

    Raises:
        UserError: If the ignored id is a class.
    """
    classes = len(categories) + 1
    ignore = default_ignore(classes, red_green) if ignore is None else ignore
    try:
        return Confusion(classes, ignore)
    except ValueError as error:
        raise UserError(f"--ignore {ignore}: {error}") from None


def compare(predicted: Iterator[tuple[str, np.ndarray]], truth: Mapping[str, Truth], confusion: Confusion) -> list[str]:
    """Compares predictions with the ground truth.

    Args:
        predicted: Yields every name of `truth` with predicted labels [H, W].
        truth: Ground truth by name.
        confusion: The counts are added to it.

    Returns:
        Which ground truth has no pixel of a category.

    Raises:
        UserError: If a file cannot be read, if sizes differ, or if an id is not a class.
    """

    def count(prediction: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
        name, labels = prediction
        try:
            return truth[name].where, confusion.count(labels, truth[name].read())
        except ValueError as error:
            raise UserError(f"{truth[name].where}: {error}") from None

    no_object: list[str] = []
    with Progress("evaluate", Worker()) as progress:
        progress.total = len(truth)
        for where, counts in map_ahead(count, predicted, thread_count()):
            confusion.counts += counts
            if not counts[1:-1].any():
                no_object.append(where)
            progress.advance(1)
    return no_object


def _compare_folders(
    predicted: Iterator[tuple[str, np.ndarray]],
    paths: Mapping[str, Path],
    categories: Sequence[str],
    ignore: int | None,
    red_green: bool,
) -> dict:
    """Compares predictions with the files of a folder.

    Raises:
        UserError: As `compare` does, or if no file of the ground truth shows a category. Files that do not show any are
            counted in a warning.
    """
    confusion = new_confusion(categories, ignore, red_green)
    truth = {name: Truth(str(path), partial(read_label_map, path, red_green)) for name, path in paths.items()}
    if no_object := compare(predicted, truth, confusion):
        found = (
            f"files of the ground truth without a pixel of a category: {len(no_object)} of {len(truth)}, such as "
            f"{no_object[0]}; {confusion.ignored:.1%} of all pixels have the ignored label {confusion.ignore}"
        )
        if len(no_object) == len(truth):
            raise UserError(
                f"{found}. If {confusion.ignore} marks the objects, replace it by the number of their category, from 1 "
                f"({categories[0]}) to {len(categories)} ({categories[-1]})"
            )
        warn(found)
    return as_json(confusion, [BACKGROUND, *categories], len(truth))


def evaluate_folders(
    predictions: Path, truth: Path, categories: list[str] | None, ignore: int | None, red_green: bool
) -> dict:
    """Compares the label maps in two folders, matched by name.

    Args:
        predictions: Folder of the predictions, or the output folder of `namedmask segment`.
        truth: Folder of the ground truth.
        categories: Names of classes 1, 2, ...; None: those in categories.json of `predictions`.
        ignore: Ignored id of the ground truth; None: `default_ignore`.
        red_green: Whether the ground truth consists of color files of ImageNet-S.

    Returns:
        The metrics, see `as_json`.

    Raises:
        UserError: If a prediction is missing, or as `_compare_folders` does.
    """
    from ..segmenter.folder import segmented_photos

    masks = predictions / "masks" if (predictions / "masks").is_dir() else predictions
    predicted_paths, true_paths = label_maps(masks), label_maps(truth)
    if (predictions / SEGMENT_RECORD).exists():  # files of other origin do not count
        segmented = set(map(composed, segmented_photos(predictions).values()))
        predicted_paths = {name: path for name, path in predicted_paths.items() if name in segmented}
    if missing := [name for name in true_paths if name not in predicted_paths]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{true_paths[missing[0]]}{more}: there is no mask of that name in {masks}")
    if categories is None:
        if not (predictions / CATEGORIES).exists():
            raise UserError(
                f"there is no {CATEGORIES} in {predictions}: pass the names of the classes without the background, one "
                "per line, with --categories-file FILE"
            )
        categories = read_categories(predictions, REMEDY)
    predicted = ((name, read_label_map(predicted_paths[name])) for name in true_paths)
    return _compare_folders(predicted, true_paths, categories, ignore, red_green)


def evaluate_segmenter(
    segmenter: Segmenter, source: PhotoSource, truth: Path, ignore: int | None, red_green: bool
) -> dict:
    """Compares the predictions of a segmenter with the label maps in a folder. Writes no files.

    Args:
        segmenter: The segmenter.
        source: Photos; those without a label map in `truth` are skipped.
        truth: Folder of the ground truth.
        ignore: Ignored id of the ground truth; None: `default_ignore`.
        red_green: Whether the ground truth consists of color files of ImageNet-S.

    Returns:
        The metrics, see `as_json`.

    Raises:
        UserError: If a photo is missing, or as `_compare_folders` does.
    """
    true_paths = label_maps(truth)
    predicted = _segmented(segmenter, source, set(true_paths))
    return _compare_folders(predicted, true_paths, segmenter.names[1:], ignore, red_green)


def _segmented(segmenter: Segmenter, source: PhotoSource, stems: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Segments some photos of a source.

    Args:
        segmenter: The segmenter.
        source: The photos.
        stems: Names of the photos to segment, without suffixes.

    Yields:
        The name of a photo without its suffix, and its mask, uint16 [H, W].

    Raises:
        UserError: If a photo is missing or cannot be used, or if two have the same name without its suffix.
    """
    errors: list[PhotoError] = []
    names: dict[str, str] = {}
    for name in source.names(errors.append):
        if (key := composed(stem(name))) in stems and (other := names.setdefault(key, name)) != name:
            raise UserError(f"{other} and {name} would both become {key}.png; rename one of them")
    if missing := sorted(stems - names.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        why = f" ({errors[0]})" if errors else ""
        raise UserError(f"there is no photo called {missing[0]}{more} in {source.path}{why}")
    for name, mask in masks_of(segmenter, source, sorted(names.values())):
        yield composed(stem(name)), mask


def masks_of(segmenter: Segmenter, source: PhotoSource, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names of photos with their masks, uint16 [H, W]. Raises UserError if a photo cannot be used."""
    for batch in segmenter.segment(source, names):
        for name, photo, mask in batch:
            if isinstance(photo, PhotoError):
                raise UserError(f"{Path(source.path) / name}: {photo.reason}")
            yield name, mask


def as_json(confusion: Confusion, classes: Sequence[str], photos: int) -> dict:
    """Returns the metrics of photos as fractions, by name of the metric and of the class; undefined ones are None.

    A name that several classes have, as in ImageNet-S, is followed by the number of the class: "crane (135)".
    """
    metrics = confusion.metrics()
    counts = Counter(classes)
    names = [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(classes)]

    def number(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    return {
        "mean_iou": number(metrics.mean_iou),
        "pixel_accuracy": number(metrics.pixel_accuracy),
        "mean_accuracy": number(metrics.mean_accuracy),
        "weighted_iou": number(metrics.weighted_iou),
        "photos": photos,
        "ignored_pixels": number(confusion.ignored),
        "iou": {name: number(value) for name, value in zip(names, metrics.iou, strict=True)},
        "accuracy": {name: number(value) for name, value in zip(names, metrics.accuracy, strict=True)},
    }


def print_table(figures: dict, of: str = "") -> None:
    """Prints the result of `as_json` as a table, in percent; `of` says which photos they are."""
    from rich.table import Table

    table = Table(title=counted(figures["photos"], "photo") + of, title_justify="left")
    for column in ("class", "IoU %", "accuracy %"):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for name, iou in figures["iou"].items():
        table.add_row(name, percent(iou), percent(figures["accuracy"][name]))
    table.add_section()
    table.add_row("mean", percent(figures["mean_iou"]), percent(figures["mean_accuracy"]), style="bold")
    table.add_row("all pixels", percent(figures["weighted_iou"]), percent(figures["pixel_accuracy"]))
    plain_console().print(table)
    print(
        f"mIoU {percent(figures['mean_iou'])} %, pixel accuracy {percent(figures['pixel_accuracy'])} %, "
        f"{percent(figures['ignored_pixels'])} % of the pixels ignored"
    )


def percent(fraction: float | None) -> str:
    """Formats a fraction in percent, with one decimal."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"
