# SPDX-License-Identifier: MIT
"""`namedmask import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command_line import (
    HELP,
    PLAIN,
    CategoriesFile,
    Commands,
    Debug,
    command,
    command_with_settings,
    flags_of,
    given_settings,
    names_of,
)
from ..config import make_config
from ..errors import counted
from .options import PHOTOS_HELP, EncoderName, Out, Overwrite, PresetNames

import_app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, **PLAIN)
ImportOut = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Run folder.")]


@import_app.command("archive")
@command
def import_archive(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON {name: [path, ...]}, or JSON or CSV: name, photo, score."),
    ],
    photos: Annotated[str, typer.Option("--photos", metavar="PHOTOS", help=PHOTOS_HELP)],
    out: Out = Path("run"),
    categories: Annotated[
        str | None, typer.Option("--categories", metavar="NAME,...", help="Categories to import, in class order.")
    ] = None,
    categories_file: CategoriesFile = None,
    preset: PresetNames = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Import the photos of each category.

    Paths of another machine are matched with the photos by their ends. Continue with `namedmask pseudolabel`.
    """
    from ..imports.archive import import_archive

    archive = import_archive(file, photos, out, names_of(categories, categories_file, preset), overwrite)
    count = sum(map(len, archive.photos.values()))
    print(f"{counted(count, 'photo')} of {counted(len(archive.categories), 'category')} in {out / 'archive.json'}")


@import_app.command("masks")
@command
def import_masks(
    path: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|FILE", help="Folder of JSON files, a COCO RLE each, or one JSON file."),
    ],
    out: ImportOut,
    photos: Annotated[
        str | None,
        typer.Option("--photos", metavar="PHOTOS", help="Photos of a new run without archive, or where they are now."),
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Import masks of the photos of a run.

    Continue with `namedmask experts`, `train` or `train-saliency`.
    """
    from ..imports.masks import import_masks

    count, _ = import_masks(path, out, photos, overwrite)
    print(f"{counted(count, 'mask')} in {out / 'masks'}")


@import_app.command("experts")
@command
def import_experts(
    path: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|FILE", help="Folder of expert_CATEGORY.pt, or a JSON or CSV map."),
    ],
    out: ImportOut,
    encoder: EncoderName = "resnet50",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Import category experts.

    `namedmask experts` then relabels the photos of the run with them and trains nothing.
    """
    from ..imports.experts import import_experts

    files = import_experts(path, out, encoder, overwrite)
    print(f"{counted(len(files), 'network')} in {out / 'experts'}; `namedmask experts {out}` relabels with them")


def _import_embeddings(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="{photo: vector}, or clip-retrieval's output.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="File to write.")],
    photos: Annotated[str | None, typer.Option("--photos", metavar="PHOTOS", help=PHOTOS_HELP)] = None,
    categories: Annotated[
        str | None, typer.Option("--categories", metavar="NAME,...", help="Names to embed with CLIP.")
    ] = None,
    categories_file: CategoriesFile = None,
    preset: PresetNames = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load a pickle. Only arrays and tensors are accepted.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    **options: str | None,
) -> None:
    from ..imports.embeddings import import_embeddings

    config = make_config({"photos": "", **given_settings(["index"], None, [], CLIP_FLAGS, options)})
    names = names_of(categories, categories_file, preset) or []
    count = import_embeddings(path, out, photos, names, config.index, allow_pickle, overwrite)
    texts = counted(len(names), "category") if names else "no category; pass --categories to add their text embeddings"
    print(f"{out}: embeddings of {counted(count, 'photo')} and {texts}")


CLIP_FLAGS = flags_of(("index.clip_model", "index.clip_weights"))
import_app.command("embeddings", help="Convert image embeddings for --embeddings.")(
    command_with_settings(_import_embeddings, CLIP_FLAGS)
)
