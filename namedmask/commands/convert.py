# SPDX-License-Identifier: MIT
"""`namedmask convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..command_line import Debug, command
from ..convert import FormatName
from ..errors import UserError
from .options import MovedPhotos, OverwriteFolder


@command
def convert(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|SEGMENTED", help="Run folder, or the --out of `namedmask segment`.")
    ],
    to: Annotated[
        FormatName, typer.Option("--to", metavar="|".join(get_args(FormatName)), help="Format of the data set.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write; it appears when it is complete.")
    ],
    min_score: Annotated[
        float | None, typer.Option("--min-score", metavar="NUMBER", help="Use masks with at least this score.")
    ] = None,
    keep_fraction: Annotated[
        float | None,
        typer.Option("--keep-fraction", metavar="NUMBER", help="Use this fraction of the masks of each category."),
    ] = None,
    per_category: Annotated[
        int | None,
        typer.Option(
            "--per-category", metavar="INTEGER", help="Use at most this many masks of each category, best first."
        ),
    ] = None,
    largest_part: Annotated[
        bool, typer.Option("--largest-part", help="Keep only the largest connected part of each mask.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help="Put links to the photos into the data set.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the photos into the data set.")] = False,
    upright: Annotated[
        bool, typer.Option("--upright", help="Rotate the copies of photos by their EXIF orientation.")
    ] = False,
    split: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--split", metavar="TRAIN VAL TEST", help="Shares of the photos, such as .8 .1 .1."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="INTEGER", help="Seed of --split.")] = 0,
    gray: Annotated[
        bool,
        typer.Option("--gray", help="Write label maps as grayscale PNGs; cv2 reads the colors of others."),
    ] = False,
    photos: MovedPhotos = None,
    overwrite: OverwriteFolder = False,
    debug: Debug = False,
) -> None:
    """Convert masks to the data set format of another tool.

    Takes the best masks of a run, as its review leaves them, or the label maps of `segment`.
    """
    from ..convert import Options, convert, describe
    from ..selection import Selection

    if link and copy:
        raise UserError("pass --link or --copy, not both")
    try:
        selection = Selection(min_score, keep_fraction, per_category)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    mode: Any = "link" if link else "copy" if copy else None
    options = Options(selection, largest_part, mode, upright, split, seed, gray)
    for line in describe(convert(path, to, out, options, photos, overwrite), to, out):
        print(line)
