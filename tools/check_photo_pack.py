# SPDX-License-Identifier: MIT
"""Runs the pipeline on a pack of real photos and scores it: retrieval, masks with and without the solver, a segmenter.

    python tools/check_photo_pack.py PHOTOS STANDIN --out OUT [--workers 2]

PHOTOS: index/ with index_labels.csv and names.txt, saliency/ with photos/ and masks/, eval/ with eval_masks/ beside it.
STANDIN: a ViT-S/14 and image and text embeddings, which stand in for DINOv2 and CLIP. Labels are read for scoring only.
Prints tables and writes OUT/sheet.png: photos, each with the detector's mask, the refined one and the truth, and
OUT/segments.png: photos, each with the segmenter's labels and the true ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from namedmask.archive import read_archive
from namedmask.config import make_config
from namedmask.demo.score import iou
from namedmask.evaluate.folders import as_json, print_table
from namedmask.evaluate.metrics import Confusion
from namedmask.formats import read_label_map
from namedmask.photos import PhotoError, PhotoSource
from namedmask.pseudolabel import Labeler
from namedmask.run import start
from namedmask.segmenter.overlay import overlay
from namedmask.segmenter.predict import Segmenter


def detector_settings(standin: Path) -> dict:
    return {
        "backbone": "vit_small_patch14_dinov2.lvd142m",
        "backbone_weights": str(standin / "vit_small_patch14_standin.safetensors"),
        "features": "tokens",
        "center_features": True,
        "image_size": 448,
    }


def settings(photos: Path, standin: Path) -> dict:
    """Settings of a run on the index photos. The segmenter is a head on the frozen ViT: minutes on two cores."""
    vit = detector_settings(standin.absolute())
    return {
        "photos": str((photos / "index").absolute()),
        "categories": (photos / "names.txt").read_text().split("\n")[:-1],
        "index": {"embeddings": str((standin / "embeddings.safetensors").absolute())},
        "archive": {"photos_per_category": 40},
        "detector": vit,
        "segmenter": {
            "encoder": vit["backbone"],
            "encoder_weights": vit["backbone_weights"],
            "encoder_lr": 0.0,
            "head_channels": 128,
            "crop_size": 224,
            "scale": (0.3, 1.0),
            "steps": 250,
            "lr": 2e-3,
            "held_out": 0.0,
        },
    }


def check_archive(photos: Path, standin: Path, out: Path, workers: int) -> None:
    """The whole command on the index photos; prints each name's precision at 10, 20 and 40."""
    given = settings(photos, standin)
    if not start(out, given, ["index", "archive", "pseudolabel", "report"], workers, 0, False):
        raise SystemExit("no masks were made")
    label = {row["file"]: row["name"] for row in csv.DictReader((photos / "index_labels.csv").open())}
    archive = read_archive(out / "archive.json")
    table = Table("name", "P@10", "P@20", "P@40", title="archive precision")
    for name in archive.categories:
        hits = [label[entry.photo] == name for entry in archive.photos[name]]
        table.add_row(name, *(f"{np.mean(hits[:k]):.2f}" for k in (10, 20, 40)))
    Console().print(table)


def check_saliency(photos: Path, standin: Path, out: Path) -> None:
    """Detector alone and with the solver against the saliency masks; prints means, and how well the score ranks."""
    from scipy.stats import spearmanr

    folder = photos / "saliency"
    source = PhotoSource(folder / "photos")
    given = {"photos": source.path, "detector": detector_settings(standin), "pseudolabel": {"keep_detected": True}}
    labeler, rows, tiles = Labeler(make_config(given), "cpu"), [], []
    for (name, _), label in itertools.chain(*labeler.label(source, [(name, None) for name in source])):
        if isinstance(label, PhotoError):
            raise label
        photo = source.decode(name)
        truth = np.asarray(Image.open(folder / "masks" / Path(name).with_suffix(".png"))) > 127
        found, refined = label.detected.decode(), label.mask.decode()
        rows.append((truth.mean(), iou(found, truth), iou(refined, truth), label.score))
        dimmed = [np.where(mask[..., None], photo.pixels, photo.pixels // 4) for mask in (found, refined, truth)]
        tiles.append(_tile(photo.pixels, *dimmed))
    everything, raw, refined, scores = np.array(rows).T
    table = Table("mask", "mean IoU", "median", title=f"saliency set, {len(rows)} photos")
    for title, values in (("everything", everything), ("detector alone", raw), ("with the solver", refined)):
        table.add_row(title, f"{values.mean():.3f}", f"{np.median(values):.3f}")
    Console().print(table)
    print(f"the solver helps on {np.mean(refined > raw):.0%} of the photos; ", end="")
    print(f"rank correlation of the score with the IoU: {spearmanr(scores, refined).statistic:.2f}")
    sheet = np.concatenate(tiles[:30])
    Image.fromarray(sheet).save(out / "sheet.png")


def check_segmenter(photos: Path, standin: Path, out: Path) -> None:
    """A segmenter of the run's masks on everyday scenes; prints the IoU of each name that they show."""
    if not start(out, settings(photos, standin), ["train"], 1, 0, False):
        raise SystemExit("no segmenter was made")
    segmenter, source = Segmenter.load(out / "segmenter"), PhotoSource(photos / "eval")
    confusion, tiles = Confusion(len(segmenter.names), ignore=255), []
    for batch in segmenter.segment(source, sorted(source)):
        for name, photo, labels in batch:
            truth = read_label_map(photos / "eval_masks" / Path(name).with_suffix(".png"))
            confusion.add(labels, truth)
            shown = np.where(truth == 255, 0, truth)
            tiles.append(_tile(photo.pixels, overlay(photo.pixels, labels), overlay(photo.pixels, shown)))
    figures = as_json(confusion, segmenter.names, len(tiles))
    print_table(figures)
    Image.fromarray(np.concatenate(tiles[:30])).save(out / "segments.png")


def _tile(*views: np.ndarray) -> np.ndarray:
    """A row of thumbnails, uint8 [120, 160 * views, 3]."""
    return np.concatenate([np.asarray(Image.fromarray(view).resize((160, 120))) for view in views], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("standin", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    check_archive(options.photos, options.standin, options.out, options.workers)
    check_saliency(options.photos, options.standin, options.out)
    check_segmenter(options.photos, options.standin, options.out)


if __name__ == "__main__":
    main()
