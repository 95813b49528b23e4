# SPDX-License-Identifier: MIT
"""Imports the photos of each category: the authors' archives, or any list of one's own."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..archive import Archive, Retrieved, expect_distinct, write_archive
from ..errors import UserError, counted, quoted
from ..files import absolute, locked, open_csv
from ..masks import ErrorRecord, errors_path, write_errors
from ..photos import note_unlisted, open_source
from ..progress import warn
from . import imported_results, match_photos, read_json, unreadable

Listing = dict[str, list[Retrieved]]


def import_archive(
    file: Path,
    photos: str | os.PathLike,
    out: Path,
    categories: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Archive:
    """Writes the archive.json of a run folder.

    Args:
        file: A list as `read_listing` reads it.
        photos: Folder, list file or tar of the photos; `match_photos` finds those of the list.
        out: The run folder.
        categories: Which categories to import, in class order; None: all, in the order of the file.
        overwrite: Replace an existing archive and what was made from it.

    Raises:
        UserError: If the list cannot be read, or if a category has no photo. Photos that are not found are otherwise
            listed in errors.jsonl.
    """
    listing = read_listing(file)
    names = list(listing) if categories is None else list(categories)
    expect_distinct(names, str(file) if categories is None else "--categories")
    if absent := [name for name in names if not listing.get(name)]:
        having = [name for name in listing if listing[name]]
        raise UserError(f"{file} lists no photos of {quoted(absent)}; pass --categories, such as {quoted(having)}")
    source = open_source(photos)
    errors: list[ErrorRecord] = []
    listed = [photo for name in names for photo, _ in listing[name]]
    matched, reasons = match_photos(dict.fromkeys(listed).keys(), source.names(note_unlisted(errors)), source.path)
    archive = Archive(names, {name: list(_found(listing[name], matched)) for name in names})
    if empty := [name for name in names if not archive.photos[name]]:
        raise UserError(
            f"{file}: {photos} has none of the photos of {quoted(empty)}, such as {listing[empty[0]][0].photo!r} "
            f"({reasons[listing[empty[0]][0].photo]}); pass the folder that holds them as --photos"
        )
    errors += [ErrorRecord(path, "archive", reason) for path, reason in reasons.items()]
    with (
        locked(out),
        imported_results(out, {"photos": absolute(photos), "categories": names}, ["archive"], overwrite, file),
    ):
        write_errors(errors_path(out / "archive.json"), errors)
        write_archive(out / "archive.json", archive)
    if reasons:
        count = counted(len(set(listed)), "photo")
        warn(f"{len(reasons):,} of {count} not found: {quoted(reasons)}; see errors.jsonl")
    if left_out := [name for name in listing if name not in archive.photos]:
        warn(f"{counted(len(left_out), 'category')} of {file} left out: {quoted(left_out)}")
    return archive


def _found(entries: list[Retrieved], matched: dict[str, str]) -> Iterator[Retrieved]:
    """The photos of a category, best first, each once."""
    entries = sorted(entries, key=lambda entry: math.inf if entry.score is None else -entry.score)
    seen: set[str] = set()
    for path, score in entries:
        photo = matched.get(path)
        if photo is not None and photo not in seen:
            seen.add(photo)
            yield Retrieved(photo, score)


def read_listing(file: Path) -> Listing:
    """Reads the photos of each category.

    A .csv file has a header with the columns `name` or `category`, `photo` and, if known, `score`. All other files are
    JSON: {category: [path, ...]}, as the authors' archives; a list of objects with the keys of the columns; or an
    archive.json.

    Raises:
        UserError: If the file cannot be read or is something else.
    """
    try:
        is_csv = file.suffix.lower() == ".csv"
        data = None if is_csv else _without_order(read_json(file))
        listing: Listing = {name: [] for name in data} if isinstance(data, dict) else {}
        for where, name, photo, score in _csv_rows(file) if is_csv else _json_rows(data):
            if not isinstance(name, str) or not isinstance(photo, str) or not photo.strip():
                raise ValueError(f"{where}: expected a category name and the path of a photo, got {name!r}, {photo!r}")
            listing.setdefault(name, []).append(Retrieved(photo, _score(score, where)))
    except (OSError, ValueError, csv.Error) as error:
        raise unreadable(file, error) from None
    if not any(listing.values()):
        raise UserError(f"{file} lists no photos")
    return listing


def _csv_rows(file: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    with open_csv(file) as lines:
        rows = csv.DictReader(lines)
        header = [column.strip().lower() for column in rows.fieldnames or ()]
        if repeated := [column for column in ("name", "category", "photo", "score") if header.count(column) > 1]:
            raise ValueError(f"the header has the column {repeated[0]!r} twice")
        columns = dict(zip(header, rows.fieldnames or (), strict=True))
        named = columns.get("name", columns.get("category"))
        if named is None or "photo" not in columns:
            raise ValueError(
                f"expected a header with the columns name (or category), photo and score, got {quoted(columns)}"
            )
        for row in rows:
            where = f"line {rows.line_num}"
            if None in row:
                raise ValueError(f'{where} has more cells than the header; put names with commas in "quotes"')
            if not any(row.values()):  # Excel writes commas for rows that were cleared
                continue
            score = row[columns["score"]] if "score" in columns else None
            yield where, row[named] and row[named].strip(), row[columns["photo"]], score or None


def _without_order(data: Any) -> Any:
    """The photos of an archive.json, which also lists the order of its categories; other data as they are."""
    is_archive = isinstance(data, dict) and set(data) == {"categories", "photos"} and isinstance(data["photos"], dict)
    return data["photos"] if is_archive else data


def _json_rows(data: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    if isinstance(data, list):
        for number, entry in enumerate(data):
            if not isinstance(entry, dict):
                raise ValueError(f"entry {number}: expected an object with name, photo and score, got {entry!r:.60}")
            yield f"entry {number}", entry.get("name", entry.get("category")), entry.get("photo"), entry.get("score")
        return
    if not isinstance(data, dict) or not all(isinstance(entries, list) for entries in data.values()):
        raise ValueError("expected {category: [path, ...]}, or a list of objects with name, photo and score")
    for name, entries in data.items():
        for number, entry in enumerate(entries):
            where = f"category {name!r}, entry {number}"
            if isinstance(entry, dict):
                yield where, name, entry.get("photo"), entry.get("score")
            else:
                yield where, name, entry, None


def _score(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        score = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: expected a finite score, got {value!r}")
    return score
