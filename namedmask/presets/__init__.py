# SPDX-License-Identifier: MIT
"""Presets: the settings of published experiments, complete, so that they stay what they are if a default changes; and
"best", which differs from the defaults where measurements say so and may change with them.

categories.json holds the names of the benchmarks' categories in class order, as NamedMask gives them to CLIP. For COCO
it is not certain that the released weights have this order; a wrong order would show in the first evaluation.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from ..config import nearest
from ..errors import UserError
from ..record import read_record

SELFMASK = {
    "detector": {
        "name": "selfmask",
        "select": "none",
        "backbone": "vit_small_patch8_224.dino",
        "image_size": 512,
        "interpolation": "bilinear",
        "patch_fit": "pad",
        "scales": [1.0],
        "horizontal_flip": False,
        "precision": "float32",
    },
    "refine": {
        "name": "bilateral",
        "size": "detector",
        "largest_component": False,
        "fill_holes": False,
        "sigma_spatial": 16.0,
        "sigma_luma": 16.0,
        "sigma_chroma": 8.0,
        "smoothness": 256.0,
    },
}

DEEPLAB = {
    "encoder": "resnet50.dino",
    "head_channels": 256,
    "dropout": 0.1,
    "dilations": [12, 24, 36],
    "crop_size": 384,
    "scale": [0.1, 1.0],
    "flip_prob": 0.5,
    "color_jitter": [0.8, 0.8, 0.8, 0.2],
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "blur_prob": 0.5,
    "blur_sigma": [0.1, 2.0],
    "min_score": 0.0,
    "keep_fraction": 1.0,
    "per_category": 0,
    "empty_masks": "background",
    "grad_accum_steps": 1,
    "lr": 5e-4,
    "encoder_lr": 5e-5,
    "encoder_bn_momentum": 0.01,
    "weight_decay": 2e-4,
    "poly_power": 0.9,
    "min_lr": 1e-6,
    "precision": "float32",
}

NAMEDMASK = {
    "index": {"clip_model": "ViT-L-14-336-quickgelu:openai"},
    "archive": {"photos_per_category": 500, "best_match_only": False, "near_duplicate_threshold": 1.0},
    **SELFMASK,
    "experts": {**DEEPLAB, "select": "all", "mode": "separate", "batch_size": 8, "steps": 5_000},
    "segmenter": {
        **DEEPLAB,
        "paste_objects": [0, 1],
        "batch_size": 16,
        "steps": 20_000,
        "held_out": 0.0,
        "background_weight": 1.0,
        "label_others": False,
        "score_power": 0.0,
        "ema_decay": 0.0,
    },
}

BEST = {
    "index": {"clip_model": "ViT-L-14-336-quickgelu:openai"},
    "archive": {"photos_per_category": 500, "best_match_only": True},
    "detector": {"name": "spectral", "select": "name"},
    "experts": {"select": "name"},
    "segmenter": {"score_power": 2.0, "ema_decay": 0.999},
}

# Name of each preset -> what it is, the benchmark of its categories, and its settings.
PRESETS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "best": ("the best of NamedMask's own without trained detectors, for any categories", None, BEST),
    "namedmask-voc2012": ("NamedMask on PASCAL VOC 2012", "voc2012", NAMEDMASK),
    "namedmask-coco": ("NamedMask on COCO 2017", "coco2017", NAMEDMASK),
    "namedmask-coca": ("NamedMask on CoCA", "coca", NAMEDMASK),
    "namedmask-cityscapes-object": ("NamedMask on Cityscapes' objects", "cityscapes-object", NAMEDMASK),
    **{
        f"namedmask-imagenet-s{count}": (f"NamedMask on ImageNet-S{count}", f"imagenet-s{count}", NAMEDMASK)
        for count in (50, 300, 919)
    },
    "selfmask": ("SelfMask with the bilateral solver, as NamedMask runs them", None, SELFMASK),
}


@functools.cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """What is known of each benchmark's categories: `names`, and `label_ids` where labels are not 1, 2, ..."""
    return json.loads((files(__package__) / "categories.json").read_text(encoding="utf-8"))


def preset(name: str) -> dict[str, Any]:
    """The nested settings of a preset, with its category names unless `needs_names`.

    Raises:
        UserError: If there is no preset of this name.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: there is no such preset{nearest(name, PRESETS)} (see `namedmask presets`)")
    _, benchmark, settings = PRESETS[name]
    known = benchmarks().get(benchmark) if benchmark else None
    return copy.deepcopy({**({"categories": known["names"]} if known else {}), **settings})


def describe(name: str, prompts: Sequence[str]) -> str:
    """A preset in the format of run.toml.

    Args:
        name: Name of the preset.
        prompts: The prompts, which no setting changes, for a comment.

    Raises:
        UserError: If there is no preset of this name.
    """
    settings = preset(name)
    notes = [PRESETS[name][0]]
    if needs_names(name):
        notes.append("category names: --categories-file FILE, in class order")
    if "archive" in settings:
        notes.append(f"{len(prompts)} prompts per category, such as {prompts[0].format('NAME')!r}")
    if settings["detector"]["name"] == "selfmask":
        notes.append("weights of SelfMask: --detector-weights FILE")
    return "".join(f"# {note}\n" for note in notes) + "\n" + tomli_w.dumps(settings)


def expect_names(name: str, given: dict, out: Path | None = None) -> None:
    """Raises UserError if a preset needs category names, and neither the given settings nor the run `out` has any."""
    recorded = read_record(out).settings() if out else {}
    if needs_names(name) and not (given.get("categories") or recorded.get("categories")):
        raise UserError(f"--preset {name}: pass its category names as --categories-file FILE, in class order")


def needs_names(name: str) -> bool:
    """Whether the category names of a preset must be given: those of ImageNet-S come with the data set."""
    benchmark = PRESETS[name][1]
    return benchmark is not None and benchmark not in benchmarks()
