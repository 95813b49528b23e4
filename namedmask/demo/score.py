# SPDX-License-Identifier: MIT
"""Scores the masks of the demo. The ground truth is rendered again from the seed; no stage of the pipeline reads it.

- `archive_precision_at_50`: fraction of the photos in the archive of a kind that show the kind.
- `trivial_baseline_iou`, `spectral_iou`, `detector_iou`, `refined_iou`, `experts_iou`: mean IoU with the visible pixels
  of the object, over the photos in the archive of a kind that show the kind; the same photos for all. Photos that were
  retrieved by mistake have no true mask and lower the precision only. A kind without any such photo counts as 0.
- `detector_iou` scores the masks of the detector without refinement. `spectral_iou` scores the refined masks that are
  selected among the candidates of the cut, which needs no training on such photos. The baseline is the one of
  `baselines.py` with the highest mean on every tenth photo (`all`), refined. The cut and the baselines are refined
  with the settings that suit them best.

Means are over the kinds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from ..archive import read_archive
from ..config import DetectorConfig, RefineConfig, RunConfig
from ..console import plain_console
from ..distributed import Worker, count_gpus
from ..errors import UserError
from ..masks import read_masks
from ..photos import PhotoSource
from ..progress import Progress
from ..record import read_config
from ..threads import kernels_on_one_thread, map_ahead
from .scenes import Scene, index_photo

SAMPLE_EVERY = 10  # one photo in ten is compared with all baselines
SHOWN = 2  # photos per kind on the contact sheet: the first of the archive and the middle one

Baseline = Callable[[np.ndarray], np.ndarray]  # a photo -> a mask, as in `baselines.py`


class ScoredPhoto(NamedTuple):
    """A photo for the contact sheet, uint8 [H, W, 3], with its kind and masks, bool [H, W]."""

    image: np.ndarray
    kind: str
    detector: np.ndarray
    refined: np.ndarray
    truth: np.ndarray


def score(out: Path, seed: int, spectral: DetectorConfig, coarse: RefineConfig) -> tuple[dict, list[ScoredPhoto]]:
    """Compares the masks of a run folder with the ground truth.

    Args:
        out: Run folder of the demo.
        seed: Seed of the photos.
        spectral: Settings of the cut, which is scored in addition to the run's own detector.
        coarse: Settings that refine the masks of the cut and of the baselines.

    Returns:
        The figures, as in demo.json, and photos for the contact sheet.

    Raises:
        UserError: If a photo differs from the one that this version renders.
    """
    import torch

    from namedmask_kernels import Ragged

    from ..refine import Refiner
    from .baselines import baselines

    config, archive = read_config(out), read_archive(out / "archive.json")
    source, refiner = PhotoSource(config.photos), Refiner(coarse)
    candidates = baselines(spectral.image_size, spectral.features, spectral.tau, spectral.center_features)
    names = sorted({entry.photo for entries in archive.photos.values() for entry in entries})
    retrieved = {name: {entry.photo for entry in archive.photos[name]} for name in archive.categories}

    with Progress("score", Worker()) as progress:
        progress.total = 2 * len(names)
        refined, experts = _masks(out / "masks"), _experts_masks(out / "refined")
        alone = _masks(out / "detected")
        masks_only = config.pseudolabel.model_copy(update={"keep_detected": False})
        changes = {"detector": spectral, "refine": coarse, "pseudolabel": masks_only}
        spectral_config = config.model_copy(update=changes)
        cut = _masks_with(out, spectral_config, progress)

        def compare(name: str, baselines: Mapping[str, Baseline]) -> tuple[Scene, dict[str, float]]:
            scene, photo = index_photo(seed, int(Path(name).stem)), source.decode(name)
            if not np.array_equal(scene.image, photo.pixels):
                raise UserError(
                    f"{Path(config.photos) / name} is not what this version renders; start over with --overwrite"
                )
            if not scene.kinds or name not in retrieved[scene.kinds[0]]:
                return scene, {}
            masks = {"spectral": cut[name], "detector": alone[name], "refined": refined[name]}
            masks["experts"] = experts[name, scene.kinds[0]]
            targets = Ragged.pack([torch.from_numpy(baseline(photo.pixels)).float() for baseline in baselines.values()])
            softs = refiner.refine(Ragged.pack([photo.pixels] * len(baselines)), targets)
            masks |= {baseline: (soft > 0.5).numpy() for baseline, soft in zip(baselines, softs.grids(), strict=True)}
            return scene, {method: iou(mask, scene.masks[0]) for method, mask in masks.items()}

        scores: dict[str, tuple[Scene, dict[str, float]]] = {}
        with kernels_on_one_thread("cpu") as threads:
            # A sample of the photos decides which baseline is the strongest. Only that one is compared on all photos.
            sample = map_ahead(lambda name: compare(name, candidates)[1], names[::SAMPLE_EVERY], threads)
            sampled = [ious for ious in sample if ious]
            means = {
                method: float(np.mean([ious[method] for ious in sampled])) if sampled else 0.0 for method in candidates
            }
            strongest = max(means, key=lambda method: means[method])
            best = {strongest: candidates[strongest]}
            for name, result in zip(names, map_ahead(lambda name: compare(name, best), names, threads), strict=True):
                scores[name] = result
                progress.advance(1)

    precision, shown = {}, []
    methods = ("spectral", "detector", "refined", "experts", strongest)
    mean_ious: dict[str, dict[str, float]] = {method: {} for method in methods}
    for category in archive.categories:
        entries = [entry.photo for entry in archive.photos[category]]
        correct = [name for name in entries if scores[name][0].kinds == (category,)]
        precision[category] = len(correct) / max(1, len(entries))
        for method, values in mean_ious.items():
            values[category] = float(np.mean([scores[name][1][method] for name in correct])) if correct else 0.0
        for name in correct[:: max(1, len(correct) // SHOWN)][:SHOWN]:
            scene = scores[name][0]
            shown.append(ScoredPhoto(scene.image, category, alone[name], refined[name], scene.masks[0]))

    figures = {
        "archive_precision_at_50": _figure(precision),
        "trivial_baseline_iou": _figure(mean_ious[strongest])
        | {"name": strongest, "all": {method: round(mean, 4) for method, mean in means.items()}},
        "spectral_iou": _figure(mean_ious["spectral"]),
        "detector_iou": _figure(mean_ious["detector"]),
        "refined_iou": _figure(mean_ious["refined"]),
        "experts_iou": _figure(mean_ious["experts"]),
        "photos_per_category": config.archive.photos_per_category,
        "photos_compared": sum(bool(ious) for _, ious in scores.values()),
    }
    return figures, shown


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 0 if both are empty."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def print_figures(figures: Mapping) -> None:
    """Prints the figures of demo.json as tables, and the seconds of each stage."""
    baseline = figures["trivial_baseline_iou"]
    columns = {
        f"precision at {figures['photos_per_category']}": "archive_precision_at_50",
        baseline["name"]: "trivial_baseline_iou",
        "the cut, refined": "spectral_iou",
        "SelfMask alone": "detector_iou",
        "SelfMask, refined": "refined_iou",
        "experts": "experts_iou",
    }
    _print_table(f"IoU on {figures['photos_compared']} photos", figures, columns, "kind")
    columns = {"mask + CLIP's name": "pseudo_miou", "segmenter": "segmenter_miou"}
    _print_table("IoU on scenes of one to three objects", figures, columns, "class")
    print(
        "baselines without learning, refined, on every tenth photo: "
        + ", ".join(f"{method} {mean:.3f}" for method, mean in baseline["all"].items())
    )
    print(", ".join(f"{stage} {taken:.1f} s" for stage, taken in figures["seconds"].items()))


def _print_table(title: str, figures: Mapping, columns: Mapping[str, str], rows: str) -> None:
    """Prints a row for each category and one for the mean. `columns` maps headings to keys of `figures`."""
    table = Table(title=title, title_justify="left")
    table.add_column(rows)
    for column in columns:
        table.add_column(column, justify="right")
    for kind in figures[next(iter(columns.values()))]["per_category"]:
        values = [figures[key]["per_category"][kind] for key in columns.values()]
        table.add_row(kind, *("" if value is None else f"{value:.3f}" for value in values))
    table.add_section()
    table.add_row("mean", *(f"{figures[key]['mean']:.3f}" for key in columns.values()), style="bold")
    plain_console().print(table)


def _figure(per_category: Mapping[str, float]) -> dict:
    values = {category: round(value, 4) for category, value in per_category.items()}
    return {"mean": round(float(np.mean(list(per_category.values()))), 4), "per_category": values}


def _masks(folder: Path) -> dict[str, np.ndarray]:
    """The mask of each photo, bool [H, W]. A photo that was retrieved for two kinds has the same mask twice."""
    return {record.photo: record.mask() for record in read_masks(folder)}


def _experts_masks(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """The masks of the experts by photo and category, bool [H, W]."""
    return {record.key: record.mask() for record in read_masks(folder)}


def _masks_with(out: Path, config: RunConfig, progress: Progress) -> dict[str, np.ndarray]:
    """The masks that the pipeline computes for the same archive with other settings."""
    from ..pseudolabel import pseudolabel

    device = "cuda" if count_gpus(None, 1) else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        source, archive, masks = PhotoSource(config.photos), read_archive(out / "archive.json"), Path(folder, "masks")
        masks.mkdir()
        pseudolabel(source, archive, masks, config, Worker(), device, progress.advance)
        return _masks(masks)
