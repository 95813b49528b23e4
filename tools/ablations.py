#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""The paper's ablations on the demo's photos: one change at a time, means over several seeds, as a Markdown table.

    python tools/ablations.py --out WORK --results bench/ABLATIONS.md   # resumes where it was stopped
    python tools/ablations.py --out WORK --seeds 7 --workers 1          # a part of it

The base is the run of `namedmask demo`, but with copy-paste as in the paper. Each other row is named after what it
changes. No training of the demo's weights has used these seeds. WORK/SEED/ROW.json holds the figures of a row; a row
with this file is not run again. Stages that rows have in common run once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np

from namedmask import run
from namedmask.archive import read_archive, write_archive
from namedmask.console import printing
from namedmask.demo import run as demo
from namedmask.demo.scenes import KINDS, index_photo
from namedmask.demo.score import iou
from namedmask.demo.score_scenes import score_scenes
from namedmask.masks import MaskRecord, read_masks, write_shard

BEGIN, END = "<!-- table: made by tools/ablations.py -->", "<!-- end of the table -->"
LARGEST = 100  # photos per kind in the largest archive
SCENES = 120
BLOCKS = 30  # of 53 photos, 120 of each kind

BASE = {
    "detector": "selfmask",
    "select": "none",
    "refine": True,
    "experts": "shared",
    "experts_select": "all",
    "photos": 50,
    "paste_objects": (0, 1),
    "dropout": 0.1,
    "empty_masks": "background",
    "steps": demo.SEGMENTER["steps"],
    "crop_size": demo.SEGMENTER["crop_size"],
    "dilations": demo.SEGMENTER["dilations"],
    "background_weight": demo.SEGMENTER["background_weight"],
}
# What a row sets of the segmenter's training.
SEGMENTER = ("paste_objects", "dropout", "empty_masks", "steps", "crop_size", "dilations", "background_weight")
ROWS = {
    "base": {},
    "selected by name": {"select": "name"},
    "selected by name, experts too": {"select": "name", "experts_select": "name"},
    "spectral detector": {"detector": "spectral"},
    "spectral detector, selected by prior": {"detector": "spectral", "select": "prior"},
    "spectral detector, selected by name": {"detector": "spectral", "select": "name"},
    "spectral detector, selected by name, experts too": {
        "detector": "spectral",
        "select": "name",
        "experts_select": "name",
    },
    "spectral detector, no experts": {"detector": "spectral", "experts": None},
    "true masks": {"detector": "truth"},
    "no solver": {"refine": False},
    "no experts": {"experts": None},
    "an expert network a kind": {"experts": "separate"},
    "no copy-paste": {"paste_objects": (0, 0)},
    "1 object pasted": {"paste_objects": (1, 1)},
    "1 to 2 objects pasted": {"paste_objects": (1, 2)},
    "no dropout": {"dropout": 0.0},
    "photos with empty masks left out": {"empty_masks": "skip"},
    "views of 160 pixels": {"crop_size": 160},
    "views of 160 pixels, no copy-paste": {"crop_size": 160, "paste_objects": (0, 0)},
    "views of 160 pixels, no experts": {"crop_size": 160, "experts": None},
    "views of 160 pixels, no experts, no copy-paste": {"crop_size": 160, "experts": None, "paste_objects": (0, 0)},
    "published dilations": {"dilations": [12, 24, 36]},
    "background weight 1": {"background_weight": 1.0},
    "four times the steps": {"steps": 4 * demo.SEGMENTER["steps"]},
    "10 photos a kind": {"photos": 10},
    "25 photos a kind": {"photos": 25},
    "100 photos a kind": {"photos": 100},
}


def settings(folder: Path, row: dict) -> dict:
    """The settings of the run of a row."""
    experts = demo.EXPERTS | {"mode": row["experts"] or "shared", "select": row["experts_select"]}
    if row["experts"] == "separate":  # the same total number of views, a twelfth for each expert
        experts |= {"steps": -(-2 * experts["steps"] // len(KINDS)), "batch_size": experts["batch_size"] // 2}
    return {
        "photos": str((folder / "photos").absolute()),
        "categories": list(KINDS),
        "pseudolabel": {"shard_size": LARGEST * len(KINDS)},  # one shard of masks, as `shorten` writes it
        "index": {"clip_model": demo.CLIP_NAME},
        "archive": {"photos_per_category": row["photos"]},
        "detector": (demo.SPECTRAL if row["detector"] == "spectral" else demo.DETECTOR) | {"select": row["select"]},
        "refine": demo.REFINE if row["refine"] else {"name": "none"},
        "experts": experts,
        "segmenter": demo.SEGMENTER | {name: row[name] for name in SEGMENTER},
    }


def run_stages(out: Path, given: dict, *names: str) -> None:
    """Runs stages of the pipeline, or what is left of them."""
    for name in names:
        run.start(out, given, [name], workers=1, gpus=0, overwrite=False)


def masks_of(folder: Path, row: dict) -> Path:
    """Runs the stages up to the masks with the largest archive, for all rows that differ in later stages."""
    out = folder / f"masks, {row['detector']}, {row['select']}{'' if row['refine'] else ', no solver'}"
    given = settings(folder, row | {"photos": LARGEST})
    run_stages(out, given, "index", "archive")
    if row["detector"] == "truth":
        run.settle(out, given, ["pseudolabel"])
        write_truth(out, int(folder.name))
    else:
        run_stages(out, given, "pseudolabel")
    return out


def write_truth(out: Path, seed: int) -> None:
    """Writes the true masks of the archive's photos in place of a detector's masks: the upper bound."""
    records = []
    for kind, entries in read_archive(out / "archive.json").photos.items():
        for entry in entries:
            scene = index_photo(seed, int(Path(entry.photo).stem))
            mask = scene.masks[0] if scene.kinds == (kind,) else np.zeros(scene.image.shape[:2], bool)
            records.append(MaskRecord.from_mask(entry.photo, mask, kind, entry.score, 1.0))
    (out / "masks").mkdir(exist_ok=True)
    write_shard(out / "masks" / "00000.jsonl", sorted(records, key=lambda record: record.photo))


def shorten(whole: Path, out: Path, photos: int, given: dict) -> None:
    """Copies the run folder `whole` with only the best `photos` of each kind, as a run with the settings `given`."""
    if out.exists():
        return
    part = out.with_name(f".{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    run.settle(part, given, ["index", "archive", "pseudolabel"])
    (part / "masks").mkdir()
    archive = read_archive(whole / "archive.json")
    kept = {kind: entries[:photos] for kind, entries in archive.photos.items()}
    write_archive(part / "archive.json", archive._replace(photos=kept))
    shutil.copytree(whole / "index", part / "index")
    pairs = {(entry.photo, kind) for kind, entries in kept.items() for entry in entries}
    records = [record for record in read_masks(whole / "masks") if (record.photo, record.category) in pairs]
    write_shard(part / "masks" / "00000.jsonl", records)
    part.rename(out)


def copy_results(source: Path, out: Path) -> None:
    """Copies a run, so that another one can continue from its results."""
    if not out.exists():
        part = out.with_name(f".{out.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(".*"))
        part.rename(out)


def mean_iou(masks: Path, seed: int) -> float:
    """Mean over the kinds of the mean IoU with the ground truth, over the photos that show their kind."""
    ious: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record in read_masks(masks):
        scene = index_photo(seed, int(Path(record.photo).stem))
        if scene.kinds == (record.category,):
            ious[record.category].append(iou(record.mask(), scene.masks[0]))
    return float(np.mean([np.mean(values) for values in ious.values()]))


def run_row(work: Path, seed: int, name: str) -> dict:
    """Returns the figures of a row, from WORK/SEED/ROW.json if it exists."""
    folder, row = work / str(seed), BASE | ROWS[name]
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    demo.render(folder / "photos", seed, BLOCKS * demo.BLOCK, False)
    with_masks = folder / f"run, {row['detector']}, {row['select']}, {row['refine']}, {row['photos']}"
    given = settings(folder, row)
    shorten(masks_of(folder, row), with_masks, row["photos"], given)
    with_experts = folder / f"{with_masks.name}, {row['experts']}, {row['experts_select']}"
    copy_results(with_masks, with_experts)
    if row["experts"]:
        run_stages(with_experts, given, "experts")
    out = folder / name
    copy_results(with_experts, out)
    run_stages(out, given, "train")
    scenes, _ = score_scenes(out, seed, SCENES)
    figures = {
        "masks": mean_iou(out / "masks", seed),
        "experts": mean_iou(out / "refined", seed) if row["experts"] else None,
        "segmenter": scenes["segmenter_miou"]["mean"],
        "mask + CLIP": scenes["pseudo_miou"]["mean"],
    }
    path.write_text(json.dumps(figures))
    return figures


def run_seed(job: tuple[Path, int]) -> None:
    """Runs all rows of a seed on one thread."""
    work, seed = job
    with printing():
        for name in ROWS:
            print(seed, name, run_row(work, seed, name), flush=True)


def table(work: Path, seeds: list[int]) -> list[str]:
    """Lines of Markdown: mean over the seeds, and their range in brackets, for the rows that all seeds have."""
    columns = ("masks", "experts", "segmenter", "mask + CLIP")
    lines = [f"| seeds {', '.join(map(str, seeds))} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ROWS:
        paths = [work / str(seed) / f"{name}.json" for seed in seeds]
        if not all(path.exists() for path in paths):
            continue
        figures = [json.loads(path.read_text()) for path in paths]
        cells = []
        for column in columns:
            values = [f[column] for f in figures if f[column] is not None]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder, outside the repository")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--workers", type=int, default=2, help="processes, one seed each")
    parser.add_argument("--results", type=Path, help="write the table to this file, between its two marks")
    parser.add_argument("--table-only", action="store_true", help="print the table of the existing rows; run nothing")
    arguments = parser.parse_args()
    if not arguments.table_only:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes, which read it when they import torch
        jobs = [(arguments.out, seed) for seed in arguments.seeds]
        with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(run_seed, jobs, chunksize=1):
                pass
    lines = table(arguments.out, arguments.seeds)
    print("\n".join(lines))
    if arguments.results:
        before, _, rest = arguments.results.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.results.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main()
