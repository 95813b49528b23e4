# SPDX-License-Identifier: MIT
"""`namedmask estimate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..command_line import CategoriesFile, command_with_settings, flags_of, given_settings, with_names
from ..config import make_config, merge
from ..errors import UserError, counted
from ..files import absolute, write_json
from ..stages import LABELING, STAGES
from .options import PHOTOS_HELP, Config, JsonFile, Preset, Set

ESTIMATED = [section for stage in (*LABELING, "experts", "train") for section in STAGES[stage].sections]
ESTIMATE_FLAGS = flags_of([section for stage in LABELING for section in STAGES[stage].sections])


def _estimate(
    photos: Annotated[
        str | None, typer.Argument(metavar="PHOTOS", help=f"{PHOTOS_HELP} Default: that of --config.")
    ] = None,
    photos_total: Annotated[
        int | None,
        typer.Option(
            "--photos-total", metavar="INTEGER", min=1, help="Photos of the job, if PHOTOS has only some of them."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="NUMBER", min=0.1, help="Time to measure, besides loading the models.")
    ] = 60.0,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights for models that are not downloaded.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="INTEGER", min=0, max=1, help="1: measure on the GPU, 0: on the CPU. Default: 1 if any."
        ),
    ] = None,
    json_file: JsonFile = None,
    categories_file: CategoriesFile = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    **options: str | None,
) -> None:
    given = given_settings(ESTIMATED, config, set_ or [], ESTIMATE_FLAGS, options)
    given = with_names(given, options.get("categories"), categories_file)
    if preset is not None:
        from .. import presets

        given = merge(presets.preset(preset), given)
        presets.expect_names(preset, given)
    if photos is not None:
        given["photos"] = absolute(photos)
    if "photos" not in given:
        raise UserError("pass PHOTOS, or a run's run.toml as --config")
    from ..distributed import count_gpus
    from ..estimate import estimate
    from ..threads import limit_torch_threads

    limit_torch_threads()
    device = "cuda:0" if count_gpus(gpus, 1) else "cpu"

    def report(part: str) -> None:
        print(f"measuring {part}", file=sys.stderr, flush=True)

    found = estimate(make_config(given), device, seconds, photos_total, random_weights=random_weights, report=report)
    if json_file is not None:
        write_json(json_file, found.to_json())
    if found.random_weights:
        print(f"random weights: {', '.join(found.random_weights)}")
    print(f"{counted(found.photos, 'photo')}, {counted(found.categories, 'category')}, one process on {found.device}")
    print(found.table())


estimate = command_with_settings(_estimate, ESTIMATE_FLAGS)
