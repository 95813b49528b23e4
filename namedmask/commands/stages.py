# SPDX-License-Identifier: MIT
"""`namedmask run`, and a command for each stage."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from ..command_line import Debug, command, flags_of, give_signature, given_settings, options_of, with_names
from ..config import merge
from ..errors import UserError
from ..files import absolute
from ..stages import LABELING, STAGES
from .options import (
    PHOTOS_HELP,
    Config,
    Gpus,
    MovedPhotos,
    Out,
    Overwrite,
    Preset,
    RunFolder,
    Set,
    Workers,
)

Photos = Annotated[
    str | None,
    typer.Argument(metavar="PHOTOS", help=f"{PHOTOS_HELP} Default: those of the run in --out."),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a profiler trace of some batches, for chrome://tracing."),
]
Update = Annotated[
    bool,
    typer.Option("--update", help="Add names or photos to the results; computes only what is new."),
]


def stage_command(*stages: str, takes_photos: bool) -> Callable:
    """A command that runs stages, with an option for each of their settings that has a flag.

    takes_photos: its argument is the photos, as for a new run, instead of the run folder.
    """
    sections = [section for stage in stages for section in STAGES[stage].sections]
    flags = flags_of(sections)

    def run_stages(
        out: Path,
        photos: str | None = None,
        categories_file: Path | None = None,
        preset: str | None = None,
        config: Path | None = None,
        set_: list[str] | None = None,
        workers: int = 1,
        gpus: int | None = None,
        update: bool = False,
        overwrite: bool = False,
        trace: Path | None = None,
        **options: str | None,
    ) -> None:
        if update and overwrite:
            raise UserError("pass --update, which keeps results that are still valid, or --overwrite, not both")
        given = given_settings(sections, config, set_ or [], flags, options)
        given = with_names(given, options.get("categories"), categories_file)
        if preset is not None:
            from .. import presets

            given = merge(presets.preset(preset), given)
            if "archive" in stages:
                presets.expect_names(preset, given, out)
        if not takes_photos:  # a file's photos are those of the run that it comes from
            given.pop("photos", None)
        if photos is not None:
            given["photos"] = absolute(photos)
        from .. import run

        if not run.start(out, given, stages, workers, gpus, overwrite, trace, update):
            raise typer.Exit(3)

    folder = {"photos": (Photos, None), "out": (Out, Path("run"))}
    parameters: dict[str, tuple[Any, Any]] = folder if takes_photos else {"out": (RunFolder, Parameter.empty)}
    parameters |= options_of(flags)
    if not takes_photos:
        parameters["photos"] = MovedPhotos, None
    parameters |= {"preset": (Preset, None), "config": (Config, None), "set_": (Set, None)}
    parameters |= {"workers": (Workers, 1), "gpus": (Gpus, None)}
    if "pseudolabel" in stages:
        parameters["trace"] = Trace, None
    if stages != ("train-saliency",):  # whose network is of no stage
        parameters["update"] = Update, False
    parameters |= {"overwrite": (Overwrite, False), "debug": (Debug, False)}
    wrapper = command(run_stages)
    give_signature(wrapper, parameters)
    return wrapper


run_labeling = stage_command(*LABELING, takes_photos=True)
run_labeling.__doc__ = """Label photos, all stages in one go.

Runs index, archive, pseudolabel and report: photos and category names in, named masks and a gallery out. Run it
again to continue.
"""
