# SPDX-License-Identifier: MIT
"""What the demo's masks are worth: the truth is rendered again from the seed, where no stage of the pipeline sees it.

- `archive_precision_at_50`: the share of a kind's archive that shows the kind.
- `trivial_baseline_iou`, `spectral_iou`, `detector_iou`, `refined_iou`, `experts_iou`: the mean IoU with the visible
  pixels of the object, over the photos of a kind's archive that show the kind: the same photos for all. What was
  retrieved wrongly has no true mask and is counted by the precision. A kind without any such photo counts as 0.
- `detector_iou` is of the detector's masks as they are; `spectral_iou` of the cut's, which the detector's network was
  trained on, refined; the baseline's are refined too, both with the settings that serve them best, and it is the one of
  `baselines.py` with the highest mean on every fourth photo (`all`).

A mean is that of the kinds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from ..archive import read_archive
from ..config import DetectorConfig, RefineConfig, RunConfig
from ..distributed import Worker, count_gpus
from ..errors import UserError
from ..masks import read_masks
from ..photos import PhotoSource
from ..progress import Progress
from ..record import read_config
from ..threads import kernels_on_one_thread, map_ahead
from .scenes import Scene, index_photo

SAMPLED = 4  # of the photos one is compared with all baselines
SHOWN = 2  # photos a kind on the contact sheet: the first of its archive and the one in the middle


Guess = Callable[[np.ndarray], np.ndarray]  # a photo -> a mask, as in `baselines.py`


class Shown(NamedTuple):
    """A photo for the contact sheet: uint8 [H, W, 3], its kind, and masks, bool [H, W]."""

    image: np.ndarray
    kind: str
    detector: np.ndarray
    refined: np.ndarray
    truth: np.ndarray


def score(out: Path, seed: int, spectral: DetectorConfig, coarse: RefineConfig) -> tuple[dict, list[Shown]]:
    """Compares the masks of the run folder `out` with the truth: (figures as demo.json holds them, what to look at).

    spectral: the settings of the cut, to be scored beside the run's own detector; coarse: those that refine the cut's
    masks and the baselines'.
    """
    import torch

    from ..refine import Refiner
    from .baselines import baselines

    config, archive = read_config(out), read_archive(out / "archive.json")
    source, refiner = PhotoSource(config.photos), Refiner(coarse)
    trivial = baselines(spectral.image_size, spectral.features, spectral.tau, spectral.center_features)
    names = sorted({entry.photo for entries in archive.photos.values() for entry in entries})
    retrieved = {name: {entry.photo for entry in archive.photos[name]} for name in archive.categories}

    with Progress("score", Worker()) as progress:
        progress.total = 2 * len(names)
        refined, experts = _masks(out / "masks"), _experts_masks(out / "refined")
        alone = _masks(out / "detected")
        cut = _remade(
            out,
            config.model_copy(
                update={
                    "detector": spectral,
                    "refine": coarse,
                    "pseudolabel": config.pseudolabel.model_copy(update={"keep_detected": False}),
                }
            ),
            progress,
        )

        def compare(name: str, guesses: Mapping[str, Guess]) -> tuple[Scene, dict[str, float]]:
            scene, photo = index_photo(seed, int(Path(name).stem)), source.decode(name)
            if not np.array_equal(scene.image, photo.pixels):
                raise UserError(
                    f"{Path(config.photos) / name} is not what this version renders; start anew with --overwrite"
                )
            if not scene.kinds or name not in retrieved[scene.kinds[0]]:
                return scene, {}
            masks = {"spectral": cut[name], "detector": alone[name], "refined": refined[name]}
            masks["experts"] = experts[name, scene.kinds[0]]
            guessed = [torch.from_numpy(guess(photo.pixels)).float() for guess in guesses.values()]
            softs = refiner.refine([photo] * len(guesses), guessed)
            masks |= {baseline: (soft > 0.5).numpy() for baseline, soft in zip(guesses, softs, strict=True)}
            return scene, {who: iou(mask, scene.masks[0]) for who, mask in masks.items()}

        found: dict[str, tuple[Scene, dict[str, float]]] = {}
        with kernels_on_one_thread("cpu") as threads:
            # A part of the photos tells which baseline is the strongest; it alone is compared on all of them.
            sample = map_ahead(lambda name: compare(name, trivial)[1], names[::SAMPLED], threads)
            tried = [values for values in sample if values]
            means = {who: float(np.mean([values[who] for values in tried])) if tried else 0.0 for who in trivial}
            strongest = max(means, key=lambda who: means[who])
            best = {strongest: trivial[strongest]}
            for name, result in zip(names, map_ahead(lambda name: compare(name, best), names, threads), strict=True):
                found[name] = result
                progress.advance(1)

    precision, shown = {}, []
    ious: dict[str, dict[str, float]] = {who: {} for who in ("spectral", "detector", "refined", "experts", strongest)}
    for category in archive.categories:
        entries = [entry.photo for entry in archive.photos[category]]
        right = [name for name in entries if found[name][0].kinds == (category,)]
        precision[category] = len(right) / max(1, len(entries))
        for who, values in ious.items():
            values[category] = float(np.mean([found[name][1][who] for name in right])) if right else 0.0
        for name in right[:: max(1, len(right) // SHOWN)][:SHOWN]:
            scene = found[name][0]
            shown.append(Shown(scene.image, category, alone[name], refined[name], scene.masks[0]))

    figures = {
        "archive_precision_at_50": _figure(precision),
        "trivial_baseline_iou": _figure(ious[strongest])
        | {"name": strongest, "all": {who: round(mean, 4) for who, mean in means.items()}},
        "spectral_iou": _figure(ious["spectral"]),
        "detector_iou": _figure(ious["detector"]),
        "refined_iou": _figure(ious["refined"]),
        "experts_iou": _figure(ious["experts"]),
        "photos_per_category": config.archive.photos_per_category,
        "photos_compared": sum(bool(values) for _, values in found.values()),
    }
    return figures, shown


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 0 where both are empty."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def print_figures(figures: Mapping) -> None:
    """The table of demo.json's figures, and where the time went."""
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
        "what takes no learning, refined, on every fourth photo: "
        + ", ".join(f"{who} {mean:.3f}" for who, mean in baseline["all"].items())
    )
    print(", ".join(f"{stage} {taken:.1f} s" for stage, taken in figures["seconds"].items()))


def _print_table(title: str, figures: Mapping, columns: Mapping[str, str], rows: str) -> None:
    """columns: heading -> key of `figures`. A row for each category of the first, which all have, and their mean."""
    table = Table(title=title, title_justify="left")
    table.add_column(rows)
    for column in columns:
        table.add_column(column, justify="right")
    for kind in figures[next(iter(columns.values()))]["per_category"]:
        values = [figures[key]["per_category"][kind] for key in columns.values()]
        table.add_row(kind, *("" if value is None else f"{value:.3f}" for value in values))
    table.add_section()
    table.add_row("mean", *(f"{figures[key]['mean']:.3f}" for key in columns.values()), style="bold")
    Console().print(table)


def _figure(per_category: Mapping[str, float]) -> dict:
    values = {category: round(value, 4) for category, value in per_category.items()}
    return {"mean": round(float(np.mean(list(per_category.values()))), 4), "per_category": values}


def _masks(folder: Path) -> dict[str, np.ndarray]:
    """Each photo's mask, bool [H, W]; retrieved for two kinds, it has the same mask twice."""
    return {record.photo: record.mask() for record in read_masks(folder)}


def _experts_masks(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Each photo's masks by photo and category, bool [H, W]: every expert has its own."""
    return {(record.photo, record.category): record.mask() for record in read_masks(folder)}


def _remade(out: Path, config: RunConfig, progress: Progress) -> dict[str, np.ndarray]:
    """What other settings make of the same archive, by the pipeline's own engine."""
    from ..pseudolabel import pseudolabel

    device = "cuda" if count_gpus(None, 1) else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        source, archive, masks = PhotoSource(config.photos), read_archive(out / "archive.json"), Path(folder, "masks")
        masks.mkdir()
        pseudolabel(source, archive, masks, config, Worker(), device, progress.advance)
        return _masks(masks)
