# SPDX-License-Identifier: MIT
"""`namedmask segment`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..command_line import CategoriesFile, Debug, command, names_of
from ..config import AUGMENTATION, find_setting, make_config
from ..errors import UserError, counted
from .options import (
    PHOTOS_HELP,
    Categories,
    EncoderName,
    Gpus,
    OverwriteFolder,
    PresetNames,
    WeightsArgument,
    Workers,
)

INFERENCE = ("precision", *AUGMENTATION)  # settings of the detector, and options of a segmenter


def inference_of(given: dict[str, Any]) -> dict[str, Any]:
    """Precision and test-time augmentation of a segmenter, checked as those of the detector are. Raises UserError."""
    detector = make_config({"photos": "", "detector": given}).detector
    return {name: getattr(detector, name) for name in INFERENCE}


@command
def segment(
    weights: WeightsArgument,
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help=PHOTOS_HELP)],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for masks and overlays; continued if it exists.")
    ],
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    preset: PresetNames = None,
    encoder: EncoderName = "resnet50",
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            "--precision",
            metavar="float32|bfloat16",
            help="Floating-point format. [default: bfloat16 on a GPU, float32 on a CPU]",
        ),
    ] = None,
    scales: Annotated[
        str,
        typer.Option(
            "--scales", metavar="NUMBER,...", help="Test-time augmentation: sizes of the input, relative to the photo."
        ),
    ] = "1.0",
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip", help="Test-time augmentation: average with the flipped photo.")
    ] = False,
    overlays: Annotated[
        Literal["none", "sample", "all"],
        typer.Option(
            "--overlays", metavar="none|sample|all", help="Photos that get an overlay; sample: 100, evenly spaced."
        ),
    ] = "sample",
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: OverwriteFolder = False,
    debug: Debug = False,
) -> None:
    """Segment photos with a trained segmenter.

    Writes a label map and scores per photo, and overlays, on a GPU if there is one. Run it again to continue.
    """
    from ..hub import local_weights

    weights = local_weights(weights)
    from ..segmenter.segment import segment_photos

    if os.path.realpath(out) == os.path.realpath(weights if weights.is_dir() else weights.parent):
        raise UserError(f"{out} holds the weights: choose another --out, as their files would be overwritten")
    augmentation = {"scales": find_setting("detector.scales").parse(scales), "horizontal_flip": horizontal_flip}
    counts = segment_photos(
        weights,
        photos,
        out,
        categories=names_of(categories, categories_file, preset),
        encoder=encoder,
        **inference_of(augmentation) | {"precision": precision},
        overlays=overlays,
        workers=workers,
        gpus=gpus,
        overwrite=overwrite,
    )
    if counts is None:  # the main worker prints
        return
    made, failed = counts
    what = "masks" if overlays == "none" else "masks and overlays"
    failures = f"; {counted(failed, 'photo')} failed: {out / 'errors.jsonl'}" if failed else ""
    print((f"{what} are in {out}" if made else "no photo could be segmented") + failures)
    if not made:
        raise typer.Exit(3)
