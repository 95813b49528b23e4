# SPDX-License-Identifier: MIT
"""Scores predictions on a benchmark: of a segmenter, of a run, of a folder of PNGs, or of a detector.

A benchmark's names and ids are fixed. The classes of a segmenter or run are assigned to them by name; PNG files without
names, and weights without names, have the ids of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..archive import key_of, read_archive
from ..config import RunConfig
from ..console import plain_console
from ..decoding import as_stored
from ..distributed import Worker
from ..errors import UserError, counted, quoted
from ..files import path_parts
from ..formats import BACKGROUND, CATEGORIES, read_categories, read_label_map
from ..masks import MaskRecord, best_masks, has_shards, read_masks
from ..photos import SEGMENT_RECORD, PhotoError, PhotoSource
from ..progress import Progress, warn
from ..suffixes import PHOTO_SUFFIXES
from ..threads import map_ahead, thread_count
from .benchmarks import BENCHMARKS, Split, category_names, read_gray
from .folders import REMEDY, Confusion, as_json, compare, label_maps, masks_of, print_table
from .saliency import SaliencyScores

if TYPE_CHECKING:
    from ..segmenter.predict import Segmenter
    from . import BenchmarkName


def evaluate_benchmark(
    benchmark: BenchmarkName,
    root: Path,
    split: str | None,
    predictions: Path | RunConfig,
    names: list[str] | None,
    load: Callable[[list[str] | None], Segmenter],
    device: str,
) -> dict:
    """Scores predictions on a benchmark.

    Args:
        benchmark: Name of the benchmark.
        root: Its folder.
        split: Name of the split; None: that of the published protocol.
        predictions: Weights or folder of a segmenter; a run, or a folder of its masks; a folder of PNG files, or the
            output of `namedmask segment`. For saliency benchmarks, also the settings of a detector and a refiner.
        names: Names of classes 1, 2, ... of the benchmark, instead of the published ones.
        load: Loads the segmenter; takes the names of its classes, for weights that have none.
        device: Device of the detector, as torch names it.

    Returns:
        The metrics (`as_json`, or `SaliencyScores.means`), with the benchmark, the split, the published figures and the
        numbers of photos without counterpart.

    Raises:
        UserError: If files are missing or damaged, if nothing matches, or if names do not belong to the benchmark.
    """
    about = BENCHMARKS[benchmark]
    if split is not None and about.split is None:
        raise UserError(f"--split {split}: {benchmark} has only one split; leave the option out")
    if names is not None and not about.classes:
        raise UserError(f"leave out --categories and --categories-file: {benchmark} has no categories")
    if isinstance(predictions, RunConfig) and about.classes:
        raise UserError(
            f"--detector is for ecssd, duts-te and dut-omron: a detector finds no categories, as {benchmark} requires"
        )
    data = about.read(root, split or about.split)
    _report_unpaired(data)
    if about.classes:
        assert isinstance(predictions, Path)
        figures, note = _score_labels(benchmark, data, predictions, names, load)
    else:
        figures, note = _score_saliency(benchmark, data, predictions, device)
    if split in (None, about.split) and figures["photos"] != about.photos:
        warn(f"scored {counted(figures['photos'], 'photo')}; the benchmark has {about.photos}")
    return {
        "benchmark": benchmark,
        "split": split or about.split,
        **figures,
        "photos_without_truth": len(data.without_truth),
        "truth_without_photo": len(data.without_photo),
        "predictions": note,
        "published": about.published,
    }


def print_benchmark(figures: dict) -> None:
    """Prints the result of `evaluate_benchmark` as a table, in percent, with the published figures below it."""
    of = f" of {figures['benchmark']}" + (f", split {figures['split']}" if figures["split"] else "")
    if "mean_iou" in figures:
        print_table(figures, of)
    else:
        from rich.table import Table

        table = Table(title=counted(figures["photos"], "photo") + of, title_justify="left")
        columns = {"iou": "IoU", "pixel_accuracy": "pixel accuracy", "max_f_beta": "max F-beta"}
        columns |= {"s_measure": "S-measure", "mean_absolute_error": "MAE"}
        for title in columns.values():
            table.add_column(title, justify="right")
        table.add_row(*(f"{figures[name]:.3f}" for name in columns))
        plain_console().print(table)
    if figures["predictions"]:
        print(figures["predictions"])
    print(f"published: {figures['published']}")


def _report_unpaired(data: Split) -> None:
    for paths, what in ((data.without_truth, "photos without ground truth"), (data.without_photo, "missing photos")):
        if paths:
            warn(f"{what}: {len(paths)}, such as {paths[0]}; they are left out")


# -- names and photos ------------------------------------------------------------------------------------------------


def class_table(own: Sequence[str], names: Sequence[str], what: str) -> np.ndarray:
    """Assigns classes to those of a benchmark by name, up to letter case and punctuation.

    Args:
        own: Names of classes 1, 2, ... of a segmenter or run.
        names: Names of classes 1, 2, ... of the benchmark.
        what: Where `own` is from, for messages.

    Returns:
        The class of the benchmark for each class, uint16 [len(own) + 1]; 0 stays 0.

    Raises:
        UserError: If a name is not one of the benchmark.
    """
    label_of = {key_of(name): label for label, name in enumerate(names, 1)}
    if unknown := [name for name in own if key_of(name) not in label_of]:
        raise UserError(
            f"{what} has {quoted(unknown)}, not a category of the benchmark; if it has other names for the "
            f"{len(names)} categories, pass them with --categories-file in the benchmark's order ({quoted(names)})"
        )
    if missing := [name for name in names if key_of(name) not in set(map(key_of, own))]:
        warn(f"{what} has no class for {len(missing)} of {len(names)} categories, counted as missed: {quoted(missing)}")
    return np.array([0, *(label_of[key_of(name)] for name in own)], np.uint16)


class PhotoMatcher:
    """Finds photos by the names that they have elsewhere.

    Two names match if they agree in all their folders from the end, as far as the shorter one goes. Of several names
    for a photo, the one that agrees in most folders counts. Suffixes such as .jpg decide only between names that agree
    in as many.

    Attributes:
        matches: By photo of the benchmark: how many parts of the names agree and whether the suffix does, and the name
            elsewhere.

    Args:
        folder: Folder of the photos of the benchmark.
        names: Their names, below it.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.matches: dict[str, tuple[tuple[int, bool], str]] = {}
        above = path_parts(folder.absolute().as_posix())
        self.by_last: dict[str, list[tuple[tuple[str, ...], int, str]]] = {}
        for name in names:
            parts = path_parts(_without_suffix(name))
            self.by_last.setdefault(parts[-1], []).append((above + parts, len(parts), name))

    def add(self, name: str) -> str | None:
        """Adds a name from elsewhere; returns the photo of the benchmark, or None if there is none.

        Raises:
            UserError: If several photos match equally well, or if another name matches the photo equally well.
        """
        parts = path_parts(_without_suffix(name))
        found = []
        for path, own, photo in self.by_last.get(parts[-1] if parts else "", ()):
            shared = _shared_end(path, parts)
            if shared >= min(own, len(parts)):
                found.append(((shared, _suffix(photo) == _suffix(name)), photo))
        if not found:
            return None
        found.sort(reverse=True)
        (agreement, photo), *others = found
        if others and others[0][0] == agreement:
            raise UserError(
                f"{name!r} may be {others[0][1]} or {photo} in {self.folder}: names must include the folders"
            )
        known, other = self.matches.get(photo, ((0, False), ""))
        if agreement == known and other != name:
            raise UserError(
                f"{other!r} and {name!r} may both be {self.folder / photo}: names must include the folders, or score "
                "the photos apart"
            )
        if agreement > known:
            self.matches[photo] = agreement, name
        return photo


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    is_photo = f".{suffix}".lower() in PHOTO_SUFFIXES
    return stem if is_photo and stem.rpartition("/")[2].strip(".") else name  # ".jpg" is a whole name


def _suffix(name: str) -> str:
    return name[len(_without_suffix(name)) :]


def _shared_end(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


# -- predictions -----------------------------------------------------------------------------------------------------


def is_weights(path: Path) -> bool:
    """Whether a path is the weights of a segmenter, a file or a folder."""
    return path.is_file() or (path / "model.safetensors").exists()


def records_folder(path: Path) -> Path | None:
    """The folder of the masks of a run, if `path` is a run or such a folder."""
    return next((folder for folder in (best_masks(path), path) if has_shards(folder)), None)


def matched_records(folder: Path, photos: Path, names: Collection[str]) -> tuple[dict[str, list[MaskRecord]], str]:
    """Finds the masks of a run that are of given photos (`PhotoMatcher`).

    Args:
        folder: Folder of the masks.
        photos: Folder of the photos.
        names: Their names, below it.

    Returns:
        The masks by these names, and a note that says how many there are.

    Raises:
        UserError: If there are none.
    """
    matcher = PhotoMatcher(photos, names)
    records: dict[str, list[MaskRecord]] = {}  # by the name of the photo in the run
    others: set[str] = set()
    for record in read_masks(folder):
        if record.photo in records or matcher.add(record.photo) is not None:
            records.setdefault(record.photo, []).append(record)
        else:
            others.add(record.photo)
    found = f"{len(matcher.matches)} of {len(names)}"
    note = f"photos with masks in {folder}: {found}; others, which are not scored: {len(others)}"
    if not records and not others:
        raise UserError(f"there are no masks in {folder}")
    if not records:
        raise UserError(
            f"{note}: no photo, such as {min(others)!r}, has the name of one in {photos}, such as {next(iter(names))!r}"
        )
    return {photo: records[name] for photo, (_, name) in sorted(matcher.matches.items())}, note


def _png_files(folder: Path, data: Split) -> dict[str, Path]:
    """The PNG file of each photo of a benchmark."""
    masks = folder / "masks" if (folder / "masks").is_dir() else folder
    files = label_maps(masks, ", nor a segmenter (model.safetensors) or masks of a run (*.jsonl)")
    matcher = PhotoMatcher(data.photos, data.truth)
    for name in files:
        matcher.add(name)
    if missing := [name for name in data.truth if name not in matcher.matches]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{data.photos / missing[0]}{more}: there is no mask of that name in {masks}")
    return {photo: files[matcher.matches[photo][1]] for photo in data.truth}


def _score_labels(
    benchmark: BenchmarkName,
    data: Split,
    predictions: Path,
    names: list[str] | None,
    load: Callable[[list[str] | None], Segmenter],
) -> tuple[dict, str]:
    """Scores label maps; returns figures and a note."""
    about = BENCHMARKS[benchmark]
    if names is not None and len(names) != about.classes:
        raise UserError(f"{benchmark} has {about.classes} categories: expected as many names, got {len(names)}")
    known = names or category_names(benchmark)
    own: list[str] | None = None  # names of the classes of the predictions
    note, photos = "", list(data.truth)
    if is_weights(predictions):
        segmenter = load(known or data.categories)
        own = segmenter.names[1:]
        pairs = masks_of(segmenter, PhotoSource(data.photos, upright=False), photos)
    elif folder := records_folder(predictions):
        records, note = matched_records(folder, data.photos, data.truth)
        own = _categories_of(folder.parent / "archive.json", records, known)
        photos, pairs = list(records), _as_stored(data, _painted(records, own))
    else:
        files = _png_files(predictions, data)
        if (predictions / CATEGORIES).exists():
            own = read_categories(predictions, REMEDY)
        pairs = _label_maps(files, about.classes if own is None else len(own))
        if (predictions / SEGMENT_RECORD).exists():
            pairs = _as_stored(data, pairs)
    if known is None:  # ImageNet-S: names come with the predictions, in the order of the ids
        known = own or data.categories or [f"class {label}" for label in range(1, about.classes + 1)]
        if len(known) != about.classes:
            raise UserError(
                f"{predictions} has {counted(len(known), 'category')}, {benchmark} has {about.classes}: pass the names "
                "of the benchmark, in the order of its ids, with --categories-file"
            )
    if own is not None and list(map(key_of, own)) != list(map(key_of, known)):
        table = class_table(own, known, str(predictions))
        pairs = ((name, table[labels]) for name, labels in pairs)
    confusion = Confusion(about.classes + 1, about.ignore)
    truth = {name: data.truth[name] for name in photos}
    no_object = compare(pairs, truth, confusion)
    if len(no_object) == len(truth):
        raise UserError(
            f"none of {counted(len(truth), 'photo')} has a pixel of a category in its ground truth, such as "
            f"{no_object[0]}"
        )
    return as_json(confusion, [BACKGROUND, *known], len(truth)), note


def _categories_of(path: Path, records: dict[str, list[MaskRecord]], known: list[str] | None) -> list[str]:
    """The categories of a run, without those that neither the benchmark nor its photos have."""
    used = {record.category for group in records.values() for record in group}
    if not path.exists():
        return sorted(used)
    categories = read_archive(path).categories
    keys = set(map(key_of, known or categories))
    return [name for name in categories if name in used or key_of(name) in keys]


def _label_maps(files: dict[str, Path], classes: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, path in files.items():
        labels = read_label_map(path)
        if labels.max(initial=0) > classes:
            raise UserError(f"{path} has the id {labels.max()}: classes are 0 to {classes}")
        yield name, labels


def _painted(records: dict[str, list[MaskRecord]], categories: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Paints the masks of each photo, so that the category with the highest score is on top."""
    label_of = {name: label for label, name in enumerate(categories, 1)}
    for name, group in records.items():
        labels = np.zeros(group[0].size, np.uint16)
        for record in sorted(group, key=lambda record: record.category_score or 0):
            if record.category not in label_of:
                raise UserError(
                    f"the category {record.category!r} of {record.photo!r} is not in archive.json of its run"
                )
            labels[record.mask()] = label_of[record.category]
        yield name, labels


def _score_saliency(
    benchmark: BenchmarkName, data: Split, predictions: Path | RunConfig, device: str
) -> tuple[dict, str]:
    """Scores masks of objects; returns figures and a note."""
    note, photos = "", list(data.truth)
    if isinstance(predictions, RunConfig):
        pairs = _detected(predictions, data, device)
        note = f"detector {predictions.detector.name}, refinement {predictions.refine.name}"
    elif is_weights(predictions):
        raise UserError(
            f"{predictions}: {benchmark} scores masks of objects: pass a run, a folder of PNG files or --detector"
        )
    elif folder := records_folder(predictions):
        records, note = matched_records(folder, data.photos, data.truth)
        photos, pairs = list(records), _as_stored(data, _united(records))
    else:
        files = _png_files(predictions, data)
        pairs = ((name, read_gray(path) / 255) for name, path in files.items())
    scores = SaliencyScores()

    def score(pair: tuple[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        name, prediction = pair
        try:
            return scores.score(prediction, data.truth[name].read())
        except ValueError as error:
            raise UserError(f"{data.truth[name].where}: {error}") from None

    with Progress("evaluate", Worker()) as progress:
        progress.total = len(photos)
        for result in map_ahead(score, pairs, thread_count()):
            scores.add(result)
            progress.advance(1)
    return {"photos": scores.photos, **scores.means()}, note


def _as_stored(data: Split, pairs: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Turns masks of upright photos to the orientation of the ground truth."""
    for name, labels in pairs:
        try:
            yield name, as_stored(data.photos / name, labels)
        except PhotoError as error:
            raise UserError(f"{error.photo}: {error.reason}") from None


def _united(records: dict[str, list[MaskRecord]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, group in records.items():
        yield name, np.logical_or.reduce([record.mask() for record in group])


def _detected(config: RunConfig, data: Split, device: str) -> Iterator[tuple[str, np.ndarray]]:
    from ..pseudolabel import Labeler

    if config.detector.selection == "name":
        raise UserError("the photos of this benchmark have no category names: --select name cannot choose; try prior")
    units = [(name, None) for name in data.truth]
    for batch in Labeler(config, device).label(PhotoSource(data.photos, upright=False), units):
        for (name, _), label in batch:
            if isinstance(label, PhotoError):
                raise UserError(f"{data.photos / name}: {label.reason}")
            yield name, label.mask.decode()
