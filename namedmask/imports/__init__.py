# SPDX-License-Identifier: MIT
"""`namedmask import`: archives, masks, category experts and embeddings that were made elsewhere.

Everything is read and checked before a run folder is changed. The run then has the results of a stage as if it had made
them, and records in `made_with` what they were imported from.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..archive import key_of
from ..errors import UserError, first_line, quoted
from ..files import absolute, path_parts, read_bytes, remove_files
from ..record import UNFINISHED, read_record
from ..run import finish, put_back, settle
from ..stages import STAGES, assemble_run_errors
from ..suffixes import PHOTO_SUFFIXES


@contextmanager
def imported_results(out: Path, given: dict, stages: Sequence[str], overwrite: bool, source: Path) -> Iterator[None]:
    """Records that the block writes the results of `stages` to the run folder, which must be locked.

    If the block raises, its results are removed and those that it was to replace are restored. If it is killed, the
    results stay recorded as `UNFINISHED`, and the next import replaces them.

    Args:
        out: The run folder.
        given: Nested settings that the imported results were made with.
        stages: Names of the stages.
        overwrite: Replace existing results and those made from them.
        source: What is imported.

    Raises:
        UserError: As `run.settle` does.
    """
    settle(out, given, stages, overwrite, imported=absolute(source))
    try:
        yield
    except BaseException:
        if not put_back(out):
            for name in stages:
                remove_files(out, STAGES[name].own_files(out))
        raise
    assemble_run_errors(out)
    finish(out, stages)
    record = read_record(out)
    for name in stages:
        del record.stages[name].made_with[UNFINISHED]
    record.write(out)


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ValueError or OSError if it is something else, or has a key twice or NaN in it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return result

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(read_bytes(path), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be imported."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: there is no such file")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UserError(f"{path} cannot be imported: {reason}")


def category_of(name: str, categories: Collection[str]) -> str | None:
    """The category for which a file or folder is named; None if there is none, or if several match equally well.

    Upper and lower case, spaces and punctuation may differ, and the name may be percent-encoded.
    """
    if name in categories:
        return name
    found = [category for category in categories if _letters(category) == _letters(name) != ""]
    return found[0] if len(found) == 1 else None


@functools.lru_cache(1 << 16)
def _letters(name: str) -> str:
    return key_of(unquote(name))


def match_photos(paths: Collection[str], names: Iterable[str], root: str = "") -> tuple[dict[str, str], dict[str, str]]:
    """Finds photos by paths that may have been written on another machine.

    A path matches the photo with which it has most folders and the file name in common, counted from the end. One
    folder and the file name must agree, unless the path or the name of the photo has no folder.

    Args:
        paths: The paths.
        names: Names of the photos.
        root: The folder to which the names are relative. Its own name and those of its parents count as well.

    Returns:
        The photo of each path, and for each path without one the reason: no photo matches, several match equally well,
        or another path matches its photo better.
    """
    parts_of = {path: path_parts(path) for path in paths}
    wanted = {parts[-1] for parts in parts_of.values() if parts}
    above = path_parts(absolute(root)) if root else ()
    own = {parts: name for name in names if (parts := path_parts(name)) and parts[-1] in wanted}
    backwards = sorted((above + parts)[::-1] for parts in own)  # photos with the same end are neighbors
    matched: dict[str, str] = {}
    reasons: dict[str, str] = {}
    rivals: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for path, parts in parts_of.items():
        at = bisect_left(backwards, parts[::-1])
        near = [(_common(parts[::-1], photo), photo) for photo in backwards[max(0, at - 2) : at + 2]]
        common = max((count for count, _ in near), default=0)
        found = [own[photo[::-1][len(above) :]] for count, photo in near if count == common]
        if parts in own:
            found = [own[parts]]
        elif common == 1 and len(parts) > 1:  # another folder, unless the photo is in none
            found = [own[parts[-1:]]] if parts[-1:] in own else []
        if common and len(found) == 1:
            matched[path] = found[0]
            rivals[found[0]].append((common, path))
        else:
            windows = "; write / in place of \\" if "\\" in path and len(parts) == 1 else ""
            several = f"several photos match: {quoted(found)}" if common and found else ""
            reasons[path] = several or f"there is no such photo{windows}"
    for name, claims in rivals.items():
        partial = [(common, path) for common, path in claims if common < len(parts_of[path])]
        best = max(common for common, _ in claims)
        if len({parts_of[path] for common, path in partial if common == best}) > 1:
            best += 1  # none is better than the others
        for common, path in partial:
            if common < best:
                reasons[path] = f"other paths match the same photo: {name!r}"
                del matched[path]
    return matched, reasons


def match_stems(paths: Collection[str], names: Iterable[str], root: str = "") -> tuple[dict[str, str], dict[str, str]]:
    """Finds photos by paths without regard to suffixes such as .jpg.

    Args:
        paths: The paths.
        names: Names of the photos, each once.
        root: As for `match_photos`.

    Returns:
        As `match_photos`. Photos or paths that differ in their suffix alone are not told apart: none of them matches.
    """
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_stem[without_suffix(name)].append(name)
    stems, stem_reasons = match_photos({without_suffix(path): None for path in paths}.keys(), by_stem, root)
    counts = Counter(map(without_suffix, paths))
    matched: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for path in paths:
        stem = without_suffix(path)
        photos = by_stem.get(stems.get(stem, ""), [])
        if len(photos) == 1 and counts[stem] == 1:
            matched[path] = photos[0]
        else:
            reasons[path] = stem_reasons.get(stem, "several photos or masks have this name")
    return matched, reasons


def without_suffix(name: str) -> str:
    """The name of a photo without its suffix; a name without one as it is."""
    suffix = next((suffix for suffix in PHOTO_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The number of equal parts at the beginning."""
    return next((count for count, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
