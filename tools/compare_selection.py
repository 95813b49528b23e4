#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""Compares ways to select masks (`--select`) on the demo's photos, and on a pack of real photos with masks.

    python tools/compare_selection.py --seeds 7 8 9 --out WORK
    python tools/compare_selection.py --pack PHOTOS --standin STANDIN

Prints a Markdown table: mean IoU of the refined masks with the ground truth, over the photos of the archives (50 of
each kind) that show their kind; rank correlation (Spearman) of score and IoU; CPU seconds per photo with one thread.
PHOTOS and STANDIN are those of check_photo_pack.py; its photos have no names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from namedmask import run
from namedmask.archive import read_archive
from namedmask.config import make_config
from namedmask.console import printing
from namedmask.demo import run as demo
from namedmask.demo.scenes import KINDS, index_photo
from namedmask.demo.score import iou
from namedmask.photos import PhotoError, PhotoSource
from namedmask.pseudolabel import Labeler, Unit
from namedmask.threads import kernels_on_one_thread

CUT = {"detector": demo.SPECTRAL, "refine": demo.COARSE}
ROWS: dict[str, dict[str, Any]] = {
    "spectral": CUT,
    "cluster-vote": CUT | {"detector": demo.SPECTRAL | {"name": "cluster-vote"}},
    "selfmask": {"detector": demo.DETECTOR, "refine": demo.REFINE},
}

Truth = Callable[[Unit], np.ndarray | None]  # of a photo, bool [H, W]; None if it does not show its category


def score(given: dict[str, Any], select: str, units: list[Unit], truth: Truth) -> str:
    """A row of the table for some settings."""
    given = given | {"detector": given["detector"] | {"select": select}}
    labeler = Labeler(make_config(given), "cpu", KINDS)
    began, ious, scores = time.process_time(), [], []
    for batch in labeler.label(PhotoSource(given["photos"]), units):
        for unit, label in batch:
            assert not isinstance(label, PhotoError), label
            if (mask := truth(unit)) is not None:
                ious.append(iou(label.mask.decode(), mask))
                scores.append(label.score)
    seconds = (time.process_time() - began) / len(units)
    return f"{np.mean(ious):.3f} | {spearmanr(scores, ious).statistic:.2f} | {seconds:.3f} |"


def compare_demo(seed: int, out: Path, rows: list[str], selects: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    demo.render(out / "photos", seed, 20 * demo.BLOCK, False)
    shared = {"photos": str(out / "photos"), "categories": list(KINDS), "index": {"clip_model": demo.CLIP_NAME}}
    given = shared | {"archive": {"photos_per_category": 50}}
    run.start(out, given, ["index", "archive"], overwrite=False)
    archive = read_archive(out / "archive.json")
    units = [(entry.photo, kind) for kind in archive.categories for entry in archive.photos[kind]]

    def truth(unit: Unit) -> np.ndarray | None:
        scene = index_photo(seed, int(Path(unit[0]).stem))
        return scene.masks[0] if scene.kinds == (unit[1],) else None

    for name in rows:
        for select in selects:
            row = score(given | ROWS[name], select, units, truth)
            print(f"| seed {seed}, {name} | {select} | {row}", flush=True)


def compare_pack(photos: Path, standin: Path, selects: list[str]) -> None:
    from check_photo_pack import detector_settings

    folder = photos / "saliency"
    units: list[Unit] = [(name, None) for name in PhotoSource(folder / "photos")]

    def truth(unit: Unit) -> np.ndarray:
        return np.asarray(Image.open(folder / "masks" / Path(unit[0]).with_suffix(".png"))) > 127

    for name in ("spectral", "cluster-vote"):
        given = {"photos": str(folder / "photos"), "detector": detector_settings(standin) | {"name": name}}
        for select in selects:
            row = score(given, select, units, truth)
            print(f"| photo pack, {name} | {select} | {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="detectors on the demo's photos"
    )
    parser.add_argument("--select", nargs="+", default=["none", "prior", "name"])
    parser.add_argument("--out", type=Path, help="work folder of the demo's photos")
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--standin", type=Path)
    options = parser.parse_args()
    print("| photos, detector | select | mean IoU | rank correlation | CPU s per photo |\n|---|---|---|---|---|")
    with printing(), kernels_on_one_thread("cpu"):
        for seed in options.seeds:
            compare_demo(seed, options.out / str(seed), options.rows, options.select)
        if options.pack:
            compare_pack(options.pack, options.standin, [select for select in options.select if select != "name"])


if __name__ == "__main__":
    main()
