# SPDX-License-Identifier: MIT
"""The model card of a segmenter, README.md: what it recognizes, what it was trained on, and how to use it.

It says what the segmenter's folder and the run around it have recorded, and no path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, counted
from ..masks import best_masks, is_refined, read_masks
from ..record import FILE, read_config
from ..training import HELD_OUT

SHOWN = ("crop_size", "batch_size", "steps", "lr", "encoder_lr", "precision", "seed")  # of the training's settings
LIMITS = """It was trained on masks that no person has drawn: a detector without labels found one object per photo, and
the name of the object is that of the photo's retrieval or folder. Expect wrong edges, missed objects, and parts of the
background that often accompany a category. It has only the categories above; everything else is background.
Evaluate it on labeled photos of your own before you rely on it."""


def model_card(weights: Path, categories: Sequence[str], encoder: str, license: str | None, repository: str) -> str:
    """The text of README.md with its front matter.

    Args:
        weights: The segmenter's file of weights. Metrics are read beside it, the data from the run folder above.
        categories: Names of classes 1, 2, ...
        encoder: Name of the encoder.
        license: License of the weights, as the Hub names it; None to leave it open.
        repository: Name on the Hub, or a folder, for the example.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license,
        library_name="namedmask",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "unsupervised", "deeplabv3plus"],
        categories=list(categories),
    )
    names = "\n".join(f"{number}. {_text(name)}" for number, name in enumerate(categories, 1))
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# Segmenter of {counted(len(categories), 'category')}",
        f"A DeepLabv3+ with the encoder `{encoder}`, trained with NamedMask without a labeled pixel.",
        f"## Categories\n\nClass 0 is the background.\n\n{names}",
        *_sections(weights),
        "## Use\n\n```python\nfrom namedmask.segmenter.predict import Segmenter\n\n"
        f'segmenter = Segmenter.from_pretrained("{repository}")\nmask, names, scores = segmenter("photo.jpg")\n```',
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(parts) + "\n"


def _text(name: str) -> str:
    """A name that Markdown and UTF-8 leave as it is."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(name.split()))
    return escaped.encode(errors="backslashreplace").decode()


def _sections(weights: Path) -> Iterator[str]:
    """The sections about data, training and metrics, as far as they are known."""
    out, lines = weights.parent.parent, _metrics(weights.parent / "metrics.jsonl")
    if weights.parent.name == "segmenter" and (out / FILE).exists():
        yield f"## Data\n\n{_data(out)}"
    if settings := next((line["settings"] for line in lines if isinstance(line.get("settings"), dict)), None):
        rows = "\n".join(f"| {name} | {settings[name]} |" for name in SHOWN if name in settings)
        yield f"## Training\n\n| Setting | Value |\n|---|---|\n{rows}"
    if scores := [line for line in lines if isinstance(line.get(HELD_OUT), float)]:
        score = max(scores, key=lambda line: line[HELD_OUT]) if weights.name == "best.safetensors" else scores[-1]
        yield (
            f"## Metrics\n\nMean IoU with the masks of photos that were held out of the training: "
            f"{score[HELD_OUT]:.3f} after {score.get('step')} steps. These masks were made like those of the training, "
            "not drawn by a person."
        )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; those that cannot be read are left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        lines += [value] if isinstance(value, dict) else []
    return lines


def _data(out: Path) -> str:
    """The masks of a run and how they were made."""
    try:
        records = list(read_masks(best_masks(out)))
        config = read_config(out)
    except UserError:  # moved or damaged
        return "The run that it was trained on cannot be read any more."
    photos, usable = len({record.photo for record in records}), sum(record.area > 0 for record in records)
    most = config.archive.photos_per_category
    chosen = (
        f"retrieved by CLIP (`{config.index.clip_model}`), at most {most} of each category"
        if any(record.category_score is not None for record in records)
        else "from a folder per category"
    )
    experts = " and relabeled by one network per category" if is_refined(out) else ""
    return (
        f"{counted(len(records), 'mask')} ({usable:,} not empty) of {counted(photos, 'photo')}, {chosen}. The masks "
        f"were made by the detector `{config.detector.name}` and the refiner `{config.refine.name}`{experts}. No "
        "person has labeled any."
    )
