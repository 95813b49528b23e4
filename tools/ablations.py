#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""The paper's ablations on the demo's world: one change at a time, mean of several seeds, as a Markdown table.

    python tools/ablations.py --out WORK --results bench/ABLATIONS.md   # goes on where it was stopped
    python tools/ablations.py --out WORK --seeds 7 --workers 1          # a part of it

The base is the demo's own run (`namedmask demo`), but with objects pasted as the paper does; every other row says
what it has changed. The photos are of seeds that no training of the demo's weights has seen. WORK/SEED/ROW.json
holds the figures of a row; a row that has one is not run again. What rows have in common is made once.
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
from namedmask.demo import run as demo
from namedmask.demo.scenes import KINDS, index_photo
from namedmask.demo.score import iou
from namedmask.demo.score_scenes import score_scenes
from namedmask.masks import MaskRecord, read_masks, write_shard

BEGIN, END = "<!-- table: made by tools/ablations.py -->", "<!-- end of the table -->"
LARGEST = 100  # photos a kind in the largest archive
SCENES = 120
BLOCKS = 30  # of 53 photos: 120 of each kind

BASE = {
    "detector": "selfmask",
    "refine": True,
    "experts": "shared",
    "photos": 50,
    "paste_objects": (1, 2),
    "crop_size": demo.SEGMENTER["crop_size"],
}
ROWS = {
    "base": {},
    "spectral detector": {"detector": "spectral"},
    "spectral detector, no experts": {"detector": "spectral", "experts": None},
    "true masks": {"detector": "truth"},
    "no solver": {"refine": False},
    "no experts": {"experts": None},
    "an expert network a kind": {"experts": "separate"},
    "no copy-paste": {"paste_objects": (0, 0)},
    "1 object pasted": {"paste_objects": (1, 1)},
    "1 to 3 objects pasted": {"paste_objects": (1, 3)},
    "views of 160 pixels": {"crop_size": 160},
    "views of 160 pixels, no copy-paste": {"crop_size": 160, "paste_objects": (0, 0)},
    "views of 160 pixels, no experts": {"crop_size": 160, "experts": None},
    "views of 160 pixels, no experts, no copy-paste": {"crop_size": 160, "experts": None, "paste_objects": (0, 0)},
    "10 photos a kind": {"photos": 10},
    "25 photos a kind": {"photos": 25},
    "100 photos a kind": {"photos": 100},
}


def settings(folder: Path, row: dict) -> dict:
    """The run's settings for a row."""
    experts = demo.EXPERTS | {"mode": row["experts"] or "shared"}
    if row["experts"] == "separate":  # as many views in all, a twelfth of them for each
        experts |= {"steps": -(-2 * experts["steps"] // len(KINDS)), "batch_size": experts["batch_size"] // 2}
    return {
        "photos": str((folder / "photos").absolute()),
        "categories": list(KINDS),
        "pseudolabel": {"shard_size": LARGEST * len(KINDS)},  # one file of masks, as `cut_short` writes
        "index": {"clip_model": demo.CLIP_NAME},
        "archive": {"photos_per_category": row["photos"]},
        "detector": demo.SPECTRAL if row["detector"] == "spectral" else demo.DETECTOR,
        "refine": demo.REFINE if row["refine"] else {"name": "none"},
        "experts": experts,
        "segmenter": demo.SEGMENTER | {"paste_objects": row["paste_objects"], "crop_size": row["crop_size"]},
    }


def stages(out: Path, given: dict, *names: str) -> None:
    for name in names:
        run.start(out, given, [name], workers=1, gpus=0, overwrite=False)


def masks_of(folder: Path, row: dict) -> Path:
    """A folder with the run's stages as far as the masks, of the largest archive; for all rows that differ later."""
    out = folder / f"masks, {row['detector']}{'' if row['refine'] else ', no solver'}"
    given = settings(folder, row | {"photos": LARGEST})
    stages(out, given, "index", "archive")
    if row["detector"] == "truth":
        write_truth(out, int(folder.name))
    else:
        stages(out, given, "pseudolabel")
    return out


def write_truth(out: Path, seed: int) -> None:
    """The true masks of the archive's photos, where a detector's would be: what no mask can be better than."""
    records = []
    for kind, entries in read_archive(out / "archive.json").photos.items():
        for entry in entries:
            scene = index_photo(seed, int(Path(entry.photo).stem))
            mask = scene.masks[0] if scene.kinds == (kind,) else np.zeros(scene.image.shape[:2], bool)
            records.append(MaskRecord.from_mask(entry.photo, mask, kind, entry.score, 1.0))
    (out / "masks").mkdir(exist_ok=True)
    write_shard(out / "masks" / "00000.jsonl", sorted(records, key=lambda record: record.photo))


def cut_short(whole: Path, out: Path, photos: int) -> None:
    """The run folder `whole` with the best `photos` of each kind alone."""
    if out.exists():
        return
    made = out.with_name(f".{out.name}")
    shutil.rmtree(made, ignore_errors=True)
    (made / "masks").mkdir(parents=True)
    archive = read_archive(whole / "archive.json")
    kept = {kind: entries[:photos] for kind, entries in archive.photos.items()}
    write_archive(made / "archive.json", archive._replace(photos=kept))
    shutil.copytree(whole / "index", made / "index")
    wanted = {(entry.photo, kind) for kind, entries in kept.items() for entry in entries}
    records = [record for record in read_masks(whole / "masks") if (record.photo, record.category) in wanted]
    write_shard(made / "masks" / "00000.jsonl", records)
    made.rename(out)


def copied(made: Path, out: Path) -> None:
    """What a run has made, as another's that goes on with settings of its own."""
    if not out.exists():
        part = out.with_name(f".{out.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(made, part, ignore=shutil.ignore_patterns("run.toml", ".*"))
        part.rename(out)


def mean_iou(masks: Path, seed: int) -> float:
    """The mean over kinds of the mean IoU with the truth, over the photos that show their kind."""
    ious: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record in read_masks(masks):
        scene = index_photo(seed, int(Path(record.photo).stem))
        if scene.kinds == (record.category,):
            ious[record.category].append(iou(record.mask(), scene.masks[0]))
    return float(np.mean([np.mean(values) for values in ious.values()]))


def run_row(work: Path, seed: int, name: str) -> dict:
    """The figures of a row, from WORK/SEED/ROW.json if it is there."""
    folder, row = work / str(seed), BASE | ROWS[name]
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    demo.render(folder / "photos", seed, BLOCKS * demo.BLOCK, False)
    with_masks = folder / f"run, {row['detector']}, {row['refine']}, {row['photos']}"
    cut_short(masks_of(folder, row), with_masks, row["photos"])
    with_experts = folder / f"{with_masks.name}, {row['experts']}"
    given = settings(folder, row)
    copied(with_masks, with_experts)
    if row["experts"]:
        stages(with_experts, given, "experts")
    out = folder / name
    copied(with_experts, out)
    stages(out, given, "train")
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
    """All rows of a seed, on one thread."""
    work, seed = job
    for name in ROWS:
        print(seed, name, run_row(work, seed, name), flush=True)


def table(work: Path, seeds: list[int]) -> list[str]:
    """Lines of Markdown: of the rows that all seeds have, the mean over the seeds, and their range in brackets."""
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
    parser.add_argument("--workers", type=int, default=2, help="processes, a seed each")
    parser.add_argument("--results", type=Path, help="write the table into this file, between its two marks")
    parser.add_argument("--table-only", action="store_true", help="of the rows that are there; run nothing")
    arguments = parser.parse_args()
    if not arguments.table_only:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, which read it when they load torch
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
