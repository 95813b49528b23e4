# SPDX-License-Identifier: MIT
"""The commands: parse, call one stage or function, print. The longer ones are in `commands`.

What is heavy is imported where it is needed. The options of commands that run stages are generated from the fields of
`config`; --set and --config reach those that have no option.

Exit codes: 0 finished (photos that could not be used are in errors.jsonl), 1 internal error, 2 an error that the user
can fix, 3 finished but no photo could be used, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from .command_line import (
    HELP,
    PLAIN,
    CategoriesFile,
    Command,
    Commands,
    Debug,
    command,
    command_with_settings,
    flags_of,
    given_settings,
    names_of,
)
from .commands.convert import convert
from .commands.estimate import estimate
from .commands.evaluate import evaluate
from .commands.imports import import_app
from .commands.options import (
    Categories,
    Config,
    EncoderName,
    MovedPhotos,
    OverwriteFolder,
    PresetNames,
    RunFolder,
    Set,
    WeightsArgument,
)
from .commands.segment import segment
from .commands.stages import run_labeling, stage_command
from .config import make_config, merge
from .process import Interrupted
from .stages import STAGES

app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, **PLAIN)
pseudolabel_app = typer.Typer(context_settings=HELP, **PLAIN)

app.command("run")(run_labeling)
pseudolabel_app.command(cls=Command)(run_labeling)
for _stage in STAGES.values():
    if _stage.sections:
        app.command(_stage.name, help=_stage.summary)(stage_command(_stage.name, takes_photos=_stage.name == "index"))


@app.command(help="Write the gallery of a run or of segmented photos.")
@command
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run folder, or the OUT of `segment`.")],
    photos: MovedPhotos = None,
    debug: Debug = False,
) -> None:
    from .photos import SEGMENT_RECORD

    if (out / SEGMENT_RECORD).exists():
        from .segmenter.report import write_segmented_report

        print(write_segmented_report(out, photos))
    else:
        from .report import write_report
        from .run import move_photos

        move_photos(out, photos)
        print(write_report(out))


@app.command()
@command
def review(
    out: RunFolder,
    photos: MovedPhotos = None,
    port: Annotated[
        int, typer.Option("--port", metavar="INTEGER", min=0, max=65535, help="Port on this machine; 0 for a free one.")
    ] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    debug: Debug = False,
) -> None:
    """Accept and reject masks of a run in the browser.

    Serves the page of all masks on this machine alone and writes each verdict to OUT/review.jsonl. Ctrl-C ends it.
    """
    from .review_server import Review, ReviewServer
    from .run import move_photos

    move_photos(out, photos)
    with ReviewServer(Review(out), port) as server:
        print(f"{server.url}\nCtrl-C ends the review; verdicts are in {out / 'review.jsonl'}", flush=True)
        if browser:
            import webbrowser

            webbrowser.open(server.url)
        with contextlib.suppress(Interrupted, KeyboardInterrupt):
            server.serve_forever()


app.command("estimate", help="Estimate hours, disk and memory of a run from a sample.")(estimate)
app.command("segment")(segment)
app.command("evaluate")(evaluate)


@app.command()
@command
def export(
    weights: WeightsArgument,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="File to write.")],
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    preset: PresetNames = None,
    encoder: EncoderName = "resnet50",
    debug: Debug = False,
) -> None:
    """Export a segmenter to ONNX.

    The file takes photos of any size; it is checked with onnxruntime.
    """
    from .hub import local_weights
    from .segmenter.export import export_onnx
    from .segmenter.predict import Segmenter

    names = names_of(categories, categories_file, preset)
    segmenter = Segmenter.load(local_weights(weights), categories=names, encoder=encoder)
    worst = export_onnx(segmenter, onnx)
    print(f"{onnx}: onnxruntime's logits differ from torch's by at most {worst:.1g} of the largest")


app.command("convert")(convert)


@app.command()
@command
def demo(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Folder of the demo; created if missing, continued if it exists."),
    ] = Path("namedmask-demo"),
    overwrite: OverwriteFolder = False,
    debug: Debug = False,
) -> None:
    """Run the whole method on rendered photos.

    Needs no download, scores the masks, and takes about three minutes on two idle cores.
    """
    from .demo.run import run_demo

    run_demo(out, overwrite=overwrite)


app.add_typer(import_app, name="import", help="Import archives, masks, experts or embeddings.")

FETCH_FLAGS = flags_of(
    ("index.clip_model", "detector.name", "detector.backbone", "detector.more_backbones", "segmenter.encoder")
)


def _fetch(config: Config = None, set_: Set = None, **options: str | None) -> None:
    sections = [section for stage in STAGES.values() for section in stage.sections]
    values = given_settings(sections, config, set_ or [], FETCH_FLAGS, options)
    for trained, source, name in (("saliency", "detector", "backbone"), ("experts", "segmenter", "encoder")):
        if name in values.get(source, {}):  # unless the training is given another model, it uses the same one
            values = merge({trained: {name: values[source][name]}}, values)
    from . import hub

    for one in hub.needed(make_config({"photos": "", **values}), STAGES):
        print(f"{one.what}: {hub.fetch(one)}", flush=True)


app.command("fetch", help="Download the weights of models before they are needed.")(
    command_with_settings(_fetch, FETCH_FLAGS)
)


@app.command("presets")
@command
def list_presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Preset to show, in the format of --config.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the presets of settings, or show one."""
    from .archive import prompts
    from .presets import PRESETS, describe

    if name is not None:
        print(describe(name, prompts()))
        return
    for preset, (text, *_) in PRESETS.items():
        print(f"{preset:<28} {text}")


@app.command()
@command
def doctor(debug: Debug = False) -> None:
    """Show versions, kernels and weights."""
    from .doctor import examine

    for line in examine():
        print(line)


def _print_version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"namedmask {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Segmentation masks from photos and category names, without labeled pixels."""
