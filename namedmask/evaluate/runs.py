# SPDX-License-Identifier: MIT
"""Scores the pseudo-masks of a run against a few labels made by hand, and suggests which scores to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..archive import key_of, read_archive
from ..console import plain_console
from ..distributed import Worker
from ..errors import UserError, counted, listed
from ..formats import read_label_map
from ..masks import MaskRecord
from ..progress import Progress, warn
from ..threads import map_ahead, thread_count
from .benchmarks import read_instances
from .folders import label_maps, new_confusion, percent
from .scoring import matched_records

BINS = 10  # of the score
FEW = 10  # with fewer masks the figures say little


class Labels(NamedTuple):
    """Labels of photos.

    Attributes:
        where: By the name of the photo: the file, and the photo in it if it holds several, for messages.
        read: Takes such a name and a category; returns which pixels show the category and which are ignored, bool
            [H, W] each.
        categories: The categories that are labeled; None if a label is a mask of the object, whatever its category.
    """

    where: dict[str, str]
    read: Callable[[str, str], tuple[np.ndarray, np.ndarray]]
    categories: Sequence[str] | None


def evaluate_run(folder: Path, truth: Path, names: Sequence[str] | None, ignore: int | None, red_green: bool) -> dict:
    """Scores the masks of a run for the photos that have a label.

    A mask is compared with the pixels of its category. It is left out if neither has a pixel.

    Args:
        folder: Folder of the masks, such as OUT/masks.
        truth: COCO file of instances, or folder of PNG files. The PNGs are label maps or, if all of them hold only 0
            and 255 or only 0 and 1, masks of the object of each photo. Their names match as in `scoring.PhotoMatcher`.
        names: Categories 1, 2, ... of label maps; None: those of the archive.
        ignore: Ignored id of label maps; None: `folders.default_ignore`.
        red_green: Whether the label maps are color files of ImageNet-S.

    Returns:
        Fractions and counts: `mean_iou` over the `masks`; the same for each of `categories`, and for `scores`, BINS
        bins of equal width; `rank_correlation` of score and IoU (Spearman's), None if it is undefined;
        `suggested_min_score` (`best_cut`) with its `kept_masks` and `kept_mean_iou`; numbers of `photos` with a label
        and of `labels`; `predictions`, a note.

    Raises:
        UserError: If no label is of a photo with a mask, if no label shows the category of its photo, or if a file
            cannot be read or does not fit its photo.
    """
    categories = names or read_archive(folder.parent / "archive.json").categories
    if truth.is_file():
        labels = read_coco_labels(truth, categories)
    else:
        labels = read_png_labels(truth, categories, ignore, red_green)
    records, note = matched_records(folder, truth, labels.where)
    everything = [(name, record) for name, group in records.items() for record in group]
    if labels.categories is None:
        pairs = [(name, record) for name, record in everything if len(records[name]) == 1]
        reason = f"a mask in {truth} does not say which of several categories of its photo it shows"
    else:
        pairs = [(name, record) for name, record in everything if record.category in labels.categories]
        others = sorted({record.category for _, record in everything} - set(labels.categories))
        reason = f"{truth} has no category {listed(others)}"
    if len(pairs) < len(everything):
        left_out = f"{len(everything) - len(pairs)} of {counted(len(everything), 'mask')} cannot be compared: {reason}"
        if not pairs:
            raise UserError(left_out)
        warn(left_out)
    ious, shown = _compare(pairs, labels)
    if not shown.any():
        raise UserError(f"no label in {truth} shows the category of its photo, such as {labels.where[pairs[0][0]]}")
    judged = [record for (_, record), iou in zip(pairs, ious, strict=True) if not np.isnan(iou)]
    return {
        "photos": len(records),
        "labels": len(labels.where),
        **figures(judged, ious[~np.isnan(ious)]),
        "predictions": note,
    }


def _compare(pairs: Sequence[tuple[str, MaskRecord]], labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The IoU of each mask with its label, NaN if both are empty, and whether the label shows the category."""

    def compare(pair: tuple[str, MaskRecord]) -> tuple[float, bool]:
        name, record = pair
        shown, ignored = labels.read(name, record.category)
        if shown.shape != record.size:
            turned = ", as if its photo were not upright" if shown.shape == record.size[::-1] else ""
            raise UserError(
                f"{labels.where[name]} is {' x '.join(map(str, shown.shape))}{turned}; the mask of {record.photo!r} is "
                f"{' x '.join(map(str, record.size))} (height x width)"
            )
        mask = record.mask() & ~ignored
        union = (mask | shown).sum()
        return (mask & shown).sum() / union if union else np.nan, bool(shown.any())

    results = []
    with Progress("evaluate", Worker()) as progress:
        progress.total = len(pairs)
        for result in map_ahead(compare, pairs, thread_count()):
            results.append(result)
            progress.advance(1)
    ious, shown = zip(*results, strict=True)
    return np.array(ious), np.array(shown)


def figures(records: Sequence[MaskRecord], ious: np.ndarray) -> dict:
    """The figures of `evaluate_run` that follow from masks and their IoUs, float [masks]."""
    scores = np.array([record.score for record in records])
    names = np.array([record.category for record in records])
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)

    def of(chosen: np.ndarray) -> dict:
        return {"masks": int(chosen.sum()), "mean_iou": round(float(ious[chosen].mean()), 6)}

    cut = best_cut(scores, ious)
    kept = of(scores >= cut)
    correlation = rank_correlation(scores, ious)
    return {
        **of(scores >= 0),
        "categories": {name: of(names == name) for name in sorted(set(names.tolist()))},
        "scores": [{"from": b / BINS, "to": (b + 1) / BINS, **of(bins == b)} for b in np.unique(bins).tolist()],
        "rank_correlation": None if np.isnan(correlation) else round(correlation, 6),
        "suggested_min_score": cut,
        "kept_masks": kept["masks"],
        "kept_mean_iou": kept["mean_iou"],
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values have their mean rank. NaN if one of the arrays is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def best_cut(scores: np.ndarray, ious: np.ndarray) -> float:
    """The minimum score that keeps the best masks.

    It maximizes the F1 of precision, the mean IoU of the masks kept, and recall, their share of the summed IoU of all
    masks. A mask is worth keeping if its IoU is above half of that F1. Of equal cuts, the lowest counts.

    Args:
        scores: float [masks], at least one.
        ious: float [masks], not all 0.

    Returns:
        The lowest score of the masks kept; 0 if all are.
    """
    order = np.argsort(-scores, kind="stable")
    scores, total = scores[order], np.cumsum(ious[order])
    f1 = 2 * total / (np.arange(1, len(scores) + 1) + total[-1])
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a cut cannot separate equal scores
    kept = len(f1) - int(np.argmax(f1[::-1]))
    return 0.0 if kept == len(f1) else float(scores[kept - 1])


def read_png_labels(folder: Path, categories: Sequence[str], ignore: int | None, red_green: bool) -> Labels:
    """The PNG files of a folder as labels, see `evaluate_run`."""
    paths = label_maps(folder)
    where = {name: str(path) for name, path in paths.items()}
    if ignore is None and not red_green and (_hold_only(paths.values(), 255) or _hold_only(paths.values(), 1)):

        def read_object(name: str, category: str) -> tuple[np.ndarray, np.ndarray]:
            labels = read_label_map(paths[name])
            return labels > 0, np.zeros(labels.shape, bool)

        return Labels(where, read_object, None)
    ignore = new_confusion(categories, ignore, red_green).ignore
    label_of = {name: label for label, name in enumerate(categories, 1)}

    def read(name: str, category: str) -> tuple[np.ndarray, np.ndarray]:
        labels = read_label_map(paths[name], red_green)
        ignored = labels == ignore
        if (wrong := labels[(labels > len(categories)) & ~ignored]).size:
            raise UserError(
                f"{paths[name]} has the id {wrong[0]}: classes are 0 to {len(categories)}, and {ignore} is ignored"
            )
        return labels == label_of[category], ignored

    return Labels(where, read, categories)


def read_coco_labels(path: Path, categories: Sequence[str]) -> Labels:
    """The photos in a COCO file of instances that have an annotation; categories match by name, or by `archive.key_of`.

    Crowd regions of a category (`iscrowd`) are ignored where no object of it is, as in COCO's own evaluation. In a file
    that has nothing else they are objects: CVAT marks every painted mask as a crowd.
    """
    numbered = {name: label for label, name in enumerate(categories, 1)}
    label_of = {key_of(name): label for name, label in numbered.items()} | numbered
    labeled: set[int | None] = set()

    def label(name: str) -> int | None:
        found = label_of.get(name, label_of.get(key_of(name)))
        labeled.add(found)
        return found

    photos = read_instances(path, label, "export it again, as COCO instances")
    photos = {name: photo for name, photo in photos.items() if photo.instances}
    if not photos:
        raise UserError(f"{path} has no annotation")
    crowd = [instance.crowd for photo in photos.values() for instance in photo.instances]
    ignored = 0 if all(crowd) else sum(crowd)
    if ignored:
        warn(
            f"{path}: crowd regions are ignored, {ignored} of {counted(len(crowd), 'annotation')}. CVAT marks all "
            "painted masks so: where they are objects, set iscrowd to 0"
        )

    def read(name: str, category: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            objects, crowds = photos[name].masks(label_of[category])
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}") from None
        return (objects, crowds) if ignored else (objects | crowds, np.zeros_like(crowds))

    where = {name: f"{path}: {name}" for name in photos}
    return Labels(where, read, [name for name in categories if label_of[name] in labeled])


def _hold_only(paths: Iterable[Path], value: int) -> bool:
    """Whether label maps hold 0 and one other value, and that one at least once."""
    found: set[int] = set()
    for path in paths:
        found |= set(np.unique(read_label_map(path)).tolist())
        if found - {0, value}:
            return False
    return value in found


def print_run(figures: dict) -> None:
    """Prints the result of `evaluate_run` as tables, in percent, and the suggested cut."""
    from rich.table import Table

    tables = {
        "category": figures["categories"],
        "score": {f"{one['from']:.1f} to {one['to']:.1f}": one for one in figures["scores"][::-1]},
    }
    for title, rows in tables.items():
        table = Table()
        for column in (title, "masks", "mean IoU %"):
            table.add_column(column, justify="left" if column == title else "right", overflow="fold")
        for name, row in rows.items():
            table.add_row(name, str(row["masks"]), percent(row["mean_iou"]))
        table.add_section()
        table.add_row("all", str(figures["masks"]), percent(figures["mean_iou"]), style="bold")
        plain_console().print(table)
    print(figures["predictions"])
    correlation = figures["rank_correlation"]
    print(f"rank correlation of score and IoU: {'-' if correlation is None else f'{correlation:.2f}'}")
    cut, kept, masks = (figures[name] for name in ("suggested_min_score", "kept_masks", "masks"))
    print(
        f"suggested --min-score {cut:g}: keeps {kept} of {counted(masks, 'mask')}, with a mean IoU of "
        f"{percent(figures['kept_mean_iou'])} % (best F1 of mean IoU and share of the summed IoU kept)"
    )
    if figures["masks"] < FEW:
        warn(f"only {counted(figures['masks'], 'mask')} with a label: a few dozen are needed")
