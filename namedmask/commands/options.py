# SPDX-License-Identifier: MIT
"""Options and arguments of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PHOTOS_HELP = "Folder, list file (.txt), .tar or '{000..146}.tar' of photos, or a URL of the latter three."
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Run folder; created if missing, continued if it exists.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Run folder.")]
MovedPhotos = Annotated[
    str | None, typer.Option("--photos", metavar="PHOTOS", help="Where the photos are now, if they have moved.")
]
Categories = Annotated[
    str | None,
    typer.Option("--categories", metavar="NAME,...", help="Category names in class order, for weights without them."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="Named settings, such as a published experiment's; see `namedmask presets`."
    ),
]
PresetNames = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="Preset whose category names to use."),
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings in the format of a run's run.toml.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as refine.crf.confidence=0.9. Repeatable."),
]
Workers = Annotated[int, typer.Option("--workers", metavar="INTEGER", min=1, help="Number of processes on the CPU.")]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus", metavar="INTEGER", min=0, help="Number of processes with a GPU each. Default: 1 if there is a GPU."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start over; replace the results of this command and those made from them."),
]
OverwriteFolder = Annotated[bool, typer.Option("--overwrite", help="Start over; replace the earlier results.")]
WeightsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="WEIGHTS", help="Segmenter folder, its model.safetensors, hf-hub:USER/NAME, or NamedMask's .pth file."
    ),
]
EncoderName = Annotated[
    str,
    typer.Option("--encoder", metavar="NAME", help="timm name of the encoder, for weights without a categories.json."),
]
