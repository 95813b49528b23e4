# SPDX-License-Identifier: MIT
"""Imports category experts: binary segmenters of other origin, which relabel the photos of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from .. import weights as stored
from ..archive import read_archive
from ..errors import UserError, quoted
from ..experts import network_path
from ..files import locked, make_folder, open_csv
from ..progress import warn
from ..record import read_config
from ..segmenter.deeplab import network_of
from ..stages import STAGES
from . import category_of, imported_results, read_json, unreadable

SUFFIXES = (".pt", ".pth", ".safetensors")
PREFIX = "expert_"  # of the authors' files


def import_experts(path: Path, out: Path, encoder: str = "resnet50", overwrite: bool = False) -> dict[str, Path]:
    """Writes the networks of a run's category experts. `namedmask experts` relabels with them, and trains nothing.

    Args:
        path: A folder of files of weights named CATEGORY or expert_CATEGORY, or a JSON file {category: file} or a .csv
            file with the columns category and file, which are relative to its folder.
        out: The run folder, which has masks already.
        encoder: timm name of the encoder of the networks.
        overwrite: Replace existing experts and what was made from them.

    Returns:
        The file of each category.

    Raises:
        UserError: If a category of the run has no file or more than one, if a file is no binary segmenter, or if the
            run has no masks. Nothing is written then.
    """
    read_config(out)  # an error if there is no run
    archive = read_archive(out / "archive.json")
    if not STAGES["pseudolabel"].has_results(out):
        raise UserError(
            f"{out} has no masks that experts could replace: run `namedmask pseudolabel {out}` or `namedmask import "
            "masks` first"
        )
    files, others = _files(path, archive.categories)
    head_channels: dict[int, Path] = {}
    for file in files.values():  # all are checked before anything changes, and one at a time is in memory
        head_channels.setdefault(network_of(stored.read(file), file, 2, encoder).head_channels, file)
    if len(head_channels) > 1:
        raise UserError(
            f"{path}: the experts differ in the channels of their heads: "
            + ", ".join(f"{count} in {file.name}" for count, file in head_channels.items())
        )
    settings = {"mode": "separate", "encoder": encoder, "head_channels": next(iter(head_channels))}
    with locked(out), imported_results(out, {"experts": settings}, ["experts"], overwrite, path):
        make_folder(out / "experts")
        for name, file in files.items():
            stored.write(network_path(out, name), network_of(stored.read(file), file, 2, encoder))
    if others:
        warn(f"{path} has networks of other categories than those of the run: {quoted(others)}")
    return files


def _files(path: Path, categories: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The file of each category, and the names of those of other categories."""
    if not path.is_dir():
        listed = _listed(path)
        if absent := [name for name in categories if name not in listed]:
            raise UserError(f"{path} names no network of {quoted(absent)}; it names {quoted(listed)}")
        return {name: path.parent / listed[name] for name in categories}, [n for n in listed if n not in categories]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    found: dict[str, Path] = {}
    others: list[str] = []
    for file in files:
        name = category_of(file.stem, categories) or category_of(file.stem.removeprefix(PREFIX), categories)
        if name in found:
            raise UserError(f"{path} has several networks of {name!r}: {found[name].name} and {file.name}")
        if name is None:
            others.append(file.name)
        else:
            found[name] = file
    if absent := [name for name in categories if name not in found]:
        rest = f"; files that match no category: {quoted(others)}" if others else ""
        raise UserError(
            f"{path} has no network of {quoted(absent)} (expert_CATEGORY.pt){rest}; to map other file names, pass a "
            'JSON file {"category": "file"} instead of the folder'
        )
    return {name: found[name] for name in categories}, others


def _listed(path: Path) -> dict[str, str]:
    try:
        if path.suffix.lower() == ".csv":
            with open_csv(path) as lines:
                rows = list(csv.DictReader(lines))
            names = [row.get("category") for row in rows]
            if len(set(names)) < len(names):
                raise ValueError("a category is listed twice")
            listed = {row.get("category"): row.get("file") for row in rows}
        else:
            listed = read_json(path)
        if not isinstance(listed, dict) or not all(isinstance(text, str) for pair in listed.items() for text in pair):
            raise ValueError("expected {category: file}, or a .csv file with the columns category and file")
    except (OSError, ValueError, csv.Error) as error:
        raise unreadable(path, error) from None
    return listed
