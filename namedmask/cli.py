# SPDX-License-Identifier: MIT
"""The commands: parse, call one stage or function, print. What is heavy is imported where it is needed.

The options of commands that run stages are generated from the fields of `config`; --set and --config reach those that
have no option.

Exit codes: 0 finished (photos that could not be used are in errors.jsonl), 1 internal error, 2 an error that the user
can fix, 3 finished but no photo could be used, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from .command_line import (
    HELP,
    PLAIN,
    Command,
    Commands,
    Debug,
    command,
    command_with_settings,
    flags_of,
    give_signature,
    given_settings,
    names_of,
    option,
    variable,
    with_names,
)
from .config import find_setting, make_config, merge
from .convert import FormatName
from .errors import UserError
from .evaluate import BenchmarkName
from .files import absolute
from .process import Interrupted
from .stages import LABELING, STAGES

app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, **PLAIN)
pseudolabel_app = typer.Typer(context_settings=HELP, **PLAIN)

PHOTOS_HELP = "Folder, list file (.txt), .tar or '{000..146}.tar' of photos, or a URL of the latter three."
Photos = Annotated[
    str | None,
    typer.Argument(metavar="[PHOTOS]", help=f"{PHOTOS_HELP} Default: those of the run in --out."),
]
Out = Annotated[Path, typer.Option("--out", help="Run folder; created if missing, continued if it exists.")]
RunFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Run folder.")]
MovedPhotos = Annotated[str | None, typer.Option("--photos", help="Where the photos are now, if they have moved.")]
Categories = Annotated[
    str | None,
    typer.Option("--categories", metavar="NAME,...", help="Category names in class order, for weights without them."),
]
CategoriesFile = Annotated[Path | None, typer.Option("--categories-file", help="File with one category name per line.")]
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
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as refine.crf.confidence=0.9. Repeatable."),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a profiler trace of some batches, for chrome://tracing."),
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Number of processes on the CPU.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=0, help="Number of processes with a GPU each. Default: 1 if there is a GPU.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Start over; replace the results of this command and those made from them."),
]
Update = Annotated[
    bool,
    typer.Option("--update", help="Add names or photos to the results; computes only what is new."),
]
OverwriteFolder = Annotated[bool, typer.Option("--overwrite", help="Start over; replace the earlier results.")]
WeightsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="WEIGHTS", help="Segmenter folder, its model.safetensors, hf-hub:USER/NAME, or NamedMask's .pth file."
    ),
]
EncoderName = Annotated[
    str, typer.Option("--encoder", help="timm name of the encoder, for weights without a categories.json.")
]
PrecisionName = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--precision", help="Floating-point format. [default: bfloat16 on a GPU, float32 on a CPU]"),
]


# -- commands that run stages ----------------------------------------------------------------------------------------


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
        chosen = {flags[name]: text for name, text in options.items() if text is not None}
        given = given_settings(sections, config, set_ or [], chosen)
        given = with_names(given, options.get("categories"), categories_file)
        if preset is not None:
            from . import presets

            given = merge(presets.preset(preset), given)
            if "archive" in stages:
                presets.expect_names(preset, given, out)
        if not takes_photos:  # a file's photos are those of the run that it comes from
            given.pop("photos", None)
        if photos is not None:
            given["photos"] = absolute(photos)
        from . import run

        if not run.start(out, given, stages, workers, gpus, overwrite, trace, update):
            raise typer.Exit(3)

    folder = {"photos": (Photos, None), "out": (Out, Path("run"))}
    parameters: dict[str, tuple[Any, Any]] = folder if takes_photos else {"out": (RunFolder, Parameter.empty)}
    for name, one in flags.items():
        parameters[name] = option(one), None
        if name == "categories":
            parameters["categories_file"] = CategoriesFile, None
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
app.command("run")(run_labeling)
pseudolabel_app.command(cls=Command)(run_labeling)
for _stage in STAGES.values():
    if _stage.sections:
        app.command(_stage.name, help=_stage.summary)(stage_command(_stage.name, takes_photos=_stage.name == "index"))


@app.command(help="Write the gallery of a run, or of photos that `segment` has segmented: OUT/report.html.")
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
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on this machine; 0 for a free one.")] = 0,
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


ESTIMATED = [section for stage in (*LABELING, "experts", "train") for section in STAGES[stage].sections]
ESTIMATE_FLAGS = flags_of([section for stage in LABELING for section in STAGES[stage].sections])


def _estimate(
    photos: Annotated[
        str | None, typer.Argument(metavar="[PHOTOS]", help=f"{PHOTOS_HELP} Default: that of --config.")
    ] = None,
    photos_total: Annotated[
        int | None,
        typer.Option("--photos-total", metavar="N", min=1, help="Photos of the job, if PHOTOS has only some of them."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="Time to measure, besides loading the models.")
    ] = 60.0,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights for models that are not downloaded.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=0, max=1, help="1: measure on the GPU, 0: on the CPU. Default: 1 if any."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE.")] = None,
    categories_file: CategoriesFile = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = None,
    **options: str | None,
) -> None:
    chosen = {ESTIMATE_FLAGS[name]: text for name, text in options.items() if text is not None}
    given = with_names(
        given_settings(ESTIMATED, config, set_ or [], chosen), options.get("categories"), categories_file
    )
    if preset is not None:
        from . import presets

        given = merge(presets.preset(preset), given)
        presets.expect_names(preset, given)
    if photos is not None:
        given["photos"] = absolute(photos)
    if "photos" not in given:
        raise UserError("pass PHOTOS, or a run's run.toml as --config")
    from .distributed import count_gpus
    from .estimate import estimate
    from .files import atomic_write
    from .threads import limit_torch_threads

    limit_torch_threads()
    device = "cuda:0" if count_gpus(gpus, 1) else "cpu"

    def report(part: str) -> None:
        print(f"measuring {part}", file=sys.stderr, flush=True)

    found = estimate(make_config(given), device, seconds, photos_total, random_weights=random_weights, report=report)
    if json_file is not None:
        import json

        with atomic_write(json_file) as file:
            file.write(json.dumps(found.to_json(), indent=1).encode() + b"\n")
    if found.random_weights:
        print(f"random weights: {', '.join(found.random_weights)}")
    print(f"{found.photos:,} photos, {found.categories:,} categories, one process on {found.device}")
    print(found.table())


app.command("estimate", help="Estimate hours, disk and memory of a run by measuring a sample of its photos.")(
    command_with_settings(_estimate, ESTIMATE_FLAGS.values())
)


# -- other commands --------------------------------------------------------------------------------------------------


def _device() -> str:
    from .distributed import count_gpus

    return "cuda" if count_gpus(None, 1) else "cpu"


def _local(weights: Path) -> Path:
    from .hub import local_weights

    return local_weights(weights)


AUGMENTATION = ("scales", "horizontal_flip")  # at test time: settings of the detector, and options of a segmenter


def _augmentation(given: dict[str, Any]) -> dict[str, Any]:
    """The test-time augmentation of a segmenter, checked as that of the detector is. Raises UserError."""
    detector = make_config({"photos": "", "detector": given}).detector
    return {name: getattr(detector, name) for name in AUGMENTATION}


def _load_segmenter(weights: Path, names: list[str] | None, encoder: str, augmentation: dict[str, Any]):
    from .segmenter.predict import Segmenter

    return Segmenter.load(weights, categories=names, encoder=encoder, device=_device(), **_augmentation(augmentation))


@app.command()
@command
def segment(
    weights: WeightsArgument,
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help=PHOTOS_HELP)],
    out: Annotated[Path, typer.Option("--out", help="Folder for masks and overlays; continued if it exists.")],
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    preset: PresetNames = None,
    encoder: EncoderName = "resnet50",
    precision: PrecisionName = None,
    scales: Annotated[
        str, typer.Option("--scales", help="Test-time augmentation: sizes of the input, relative to the photo.")
    ] = "1.0",
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip", help="Test-time augmentation: average with the flipped photo.")
    ] = False,
    overlays: Annotated[
        Literal["none", "sample", "all"],
        typer.Option("--overlays", help="Photos that get an overlay; sample: 100, evenly spaced."),
    ] = "sample",
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: OverwriteFolder = False,
    debug: Debug = False,
) -> None:
    """Segment photos with a trained segmenter.

    Writes a label map and scores per photo, and overlays, on a GPU if there is one. Run it again to continue.
    """
    weights = _local(weights)
    from .segmenter.segment import segment_photos

    if os.path.realpath(out) == os.path.realpath(weights if weights.is_dir() else weights.parent):
        raise UserError(f"{out} holds the weights: choose another --out, as their files would be overwritten")
    counts = segment_photos(
        weights,
        photos,
        out,
        categories=names_of(categories, categories_file, preset),
        encoder=encoder,
        precision=precision,
        **_augmentation({"scales": find_setting("detector.scales").parse(scales), "horizontal_flip": horizontal_flip}),
        overlays=overlays,
        workers=workers,
        gpus=gpus,
        overwrite=overwrite,
    )
    if counts is None:  # the main worker prints
        return
    made, failed = counts
    what = "masks" if overlays == "none" else "masks and overlays"
    print(f"{what} are in {out}" + (f"; {failed} photos failed: {out / 'errors.jsonl'}" if failed else ""))
    if not made:
        raise typer.Exit(3)


DETECTION = ("detector", "refine")  # sections of the settings that `evaluate` reads
DETECTION_FLAGS = flags_of(DETECTION)


def _evaluate(
    predictions: Annotated[
        Path | None,
        typer.Argument(
            metavar="PREDICTIONS",
            help="Folder of PNG masks, or the OUT of `segment`; a run, or its folder of masks; WEIGHTS with --photos "
            "or --benchmark.",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Argument(metavar="TRUTH", help="Folder of PNG masks with the same names; for a run also a COCO file."),
    ] = None,
    photos: Annotated[
        str | None, typer.Option("--photos", help="Photos to segment; PREDICTIONS are the weights of a segmenter.")
    ] = None,
    benchmark: Annotated[
        BenchmarkName | None, typer.Option("--benchmark", help="Public benchmark, instead of TRUTH; requires --root.")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder in which the benchmark was unpacked.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the benchmark. [default: the published one, such as val]")
    ] = None,
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="NAME", help="Preset whose category names to use, or without PREDICTIONS its detector."
        ),
    ] = None,
    encoder: EncoderName = "resnet50",
    ignore: Annotated[
        int | None,
        typer.Option(
            "--ignore",
            min=0,
            max=65535,
            help="Label in TRUTH to ignore. [default: 255, or 65535 if there are more than 255 classes]",
        ),
    ] = None,
    red_green: Annotated[
        bool, typer.Option("--red-green", help="TRUTH holds labels as R + 256 G and ignores 1000, as in ImageNet-S.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE.")] = None,
    config: Config = None,
    set_: Set = None,
    **options: str | None,
) -> None:
    """Evaluate masks: IoU and pixel accuracy.

    Prints the IoU of each class, the mIoU and the pixel accuracy. Label 0 is the background, label k the k-th category.
    For a run, it scores the masks of the photos in TRUTH and suggests a --min-score for trainings. With --benchmark,
    it reads a public benchmark as it was unpacked. The benchmarks of salient objects also score a detector, without
    PREDICTIONS: --detector and the options that follow it. --scales and --horizontal-flip also count for a segmenter.
    """
    from .evaluate.folders import evaluate_folders, evaluate_segmenter, print_table, write_json
    from .evaluate.scoring import evaluate_benchmark, print_benchmark, records_folder

    predictions = predictions and _local(predictions)
    show: Callable[[dict], None] = print_table
    given = {DETECTION_FLAGS[name]: text for name, text in options.items() if text is not None}
    values = given_settings(list(DETECTION), config, set_ or [], given)
    if preset is not None and predictions is None:
        from . import presets

        chosen = presets.preset(preset)
        values = merge({section: chosen[section] for section in DETECTION if section in chosen}, values)
        preset = None
    augmentation: dict[str, Any] = {}
    if predictions is not None and (predictions.is_file() or (predictions / "model.safetensors").exists()):
        detector = values.get("detector", {})
        augmentation = {name: detector.pop(name) for name in AUGMENTATION if name in detector}
        values = {section: given for section, given in values.items() if given}
    # Two names of ImageNet-S occur twice.
    names = names_of(categories, categories_file, preset, distinct=benchmark is None)

    def load(fallback: list[str] | None) -> Any:
        assert predictions is not None
        return _load_segmenter(predictions, fallback, encoder, augmentation)

    if benchmark is not None:
        taken = {"TRUTH": truth, "--photos": photos, "--ignore": ignore, "--red-green": red_green or None}
        if wrong := [name for name, value in taken.items() if value is not None]:
            raise UserError(f"leave out {', '.join(wrong)}: --benchmark {benchmark} has its own")
        if root is None:
            raise UserError(f"pass the folder of {benchmark} with --root DIR")
        if predictions is None and "name" not in values.get("detector", {}):
            raise UserError("pass PREDICTIONS, or --detector for a benchmark of salient objects")
        if predictions is not None and values:
            raise UserError("pass PREDICTIONS or a detector with its settings, not both")
        source = predictions or make_config({"photos": absolute(root), **values})
        figures, show = evaluate_benchmark(benchmark, root, split, source, names, load, _device()), print_benchmark
    elif predictions is None or truth is None:
        raise UserError("pass PREDICTIONS and TRUTH, or a --benchmark")
    elif wrong := [name for name, value in (("--root", root), ("--split", split), ("a detector", values)) if value]:
        raise UserError(f"{wrong[0]} requires --benchmark")
    elif photos is None and (masks := records_folder(predictions)):
        from .evaluate.runs import evaluate_run, print_run

        figures, show = evaluate_run(masks, truth, names, ignore, red_green), print_run
    elif photos is None:
        figures = evaluate_folders(predictions, truth, names, ignore, red_green)
    else:
        from .photos import open_source

        figures = evaluate_segmenter(load(names), open_source(photos), truth, ignore, red_green)
    if json_file is not None:  # before anything is printed: whatever happens to the output, the figures are there
        write_json(json_file, figures)
    show(figures)


app.command("evaluate")(command_with_settings(_evaluate, DETECTION_FLAGS.values()))


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
    from .segmenter.export import export_onnx
    from .segmenter.predict import Segmenter

    names = names_of(categories, categories_file, preset)
    segmenter = Segmenter.load(_local(weights), categories=names, encoder=encoder)
    worst = export_onnx(segmenter, onnx)
    print(f"{onnx}: onnxruntime's logits differ from torch's by at most {worst:.1g} of the largest")


@app.command()
@command
def convert(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|SEGMENTED", help="Run folder, or the --out of `namedmask segment`.")
    ],
    to: Annotated[FormatName, typer.Option("--to", help="Format of the data set.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it appears when it is complete.")],
    min_score: Annotated[float | None, typer.Option("--min-score", help="Use masks with at least this score.")] = None,
    keep_fraction: Annotated[
        float | None,
        typer.Option("--keep-fraction", help="Use this fraction of the masks of each category."),
    ] = None,
    per_category: Annotated[
        int | None, typer.Option("--per-category", help="Use at most this many masks of each category, best first.")
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
    seed: Annotated[int, typer.Option("--seed", help="Seed of --split.")] = 0,
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
    from .convert import Options, convert, describe
    from .selection import Selection

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


@app.command()
@command
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the demo; created if missing, continued if it exists.")
    ] = Path("namedmask-demo"),
    overwrite: OverwriteFolder = False,
    debug: Debug = False,
) -> None:
    """Run the whole method on rendered photos.

    Needs no download, scores the masks, and takes about three minutes on two idle cores.
    """
    from .demo.run import run_demo

    run_demo(out, overwrite=overwrite)


import_app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, **PLAIN)
app.add_typer(
    import_app, name="import", help="Import archives, masks, experts and embeddings that were made elsewhere."
)
ImportOut = Annotated[Path, typer.Option("--out", help="Run folder.")]


@import_app.command("archive")
@command
def import_archive(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON {name: [path, ...]}, or JSON or CSV: name, photo, score."),
    ],
    photos: Annotated[str, typer.Option("--photos", help=PHOTOS_HELP)],
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
    from .imports.archive import import_archive

    archive = import_archive(file, photos, out, names_of(categories, categories_file, preset), overwrite)
    count = sum(map(len, archive.photos.values()))
    print(f"{count:,} photos of {len(archive.categories)} categories are in {out / 'archive.json'}")


@import_app.command("masks")
@command
def import_masks(
    path: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|FILE", help="Folder of JSON files, a COCO RLE each, or one JSON file."),
    ],
    out: ImportOut,
    photos: Annotated[
        str | None, typer.Option("--photos", help="Photos of a new run without archive, or where they are now.")
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Import masks of the photos of a run.

    Continue with `namedmask experts`, `train` or `train-saliency`.
    """
    from .imports.masks import import_masks

    count, _ = import_masks(path, out, photos, overwrite)
    print(f"{count:,} masks are in {out / 'masks'}")


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
    from .imports.experts import import_experts

    files = import_experts(path, out, encoder, overwrite)
    print(f"{len(files)} networks are in {out / 'experts'}; `namedmask experts {out}` relabels with them")


def _import_embeddings(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="{photo: vector}, or clip-retrieval's output.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="File to write.")],
    photos: Annotated[str | None, typer.Option("--photos", help=PHOTOS_HELP)] = None,
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
    from .imports.embeddings import import_embeddings

    clip = {one: options[variable(one)] for one in map(find_setting, CLIP) if options.get(variable(one))}
    config = make_config({"photos": "", **given_settings(["index"], None, [], clip)})
    names = names_of(categories, categories_file, preset) or []
    count = import_embeddings(path, out, photos, names, config.index, allow_pickle, overwrite)
    texts = f"{len(names)} categories" if names else "no category; pass --categories to add their text embeddings"
    print(f"{out}: embeddings of {count:,} photos and {texts}")


CLIP = ("index.clip_model", "index.clip_weights")
import_app.command("embeddings", help="Convert image embeddings for --embeddings.")(
    command_with_settings(_import_embeddings, map(find_setting, CLIP))
)


FETCHED = ("index.clip_model", "detector.name", "detector.backbone", "detector.more_backbones", "segmenter.encoder")


def _fetch(config: Config = None, set_: Set = None, **options: str | None) -> None:
    given = {one: options[variable(one)] for one in map(find_setting, FETCHED) if options.get(variable(one))}
    sections = [section for stage in STAGES.values() for section in stage.sections]
    values = given_settings(sections, config, set_ or [], given)
    for trained, source, name in (("saliency", "detector", "backbone"), ("experts", "segmenter", "encoder")):
        if name in values.get(source, {}):  # unless the training is given another model, it uses the same one
            values = merge({trained: {name: values[source][name]}}, values)
    from . import hub

    for one in hub.needed(make_config({"photos": "", **values}), STAGES):
        print(f"{one.what}: {hub.fetch(one)}", flush=True)


app.command("fetch", help="Download the weights of models before they are needed.")(
    command_with_settings(_fetch, map(find_setting, FETCHED))
)


@app.command("presets")
@command
def list_presets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Preset to show, in the format of --config.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the presets, most of them of published experiments, or show one."""
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


def main() -> None:
    """The command `namedmask`."""
    app()


def main_pseudolabel() -> None:
    """The command `namedmask-pseudolabel`, another name of `namedmask run`."""
    pseudolabel_app()
