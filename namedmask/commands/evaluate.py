# SPDX-License-Identifier: MIT
"""`namedmask evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..command_line import CategoriesFile, command_with_settings, flags_of, given_settings, names_of
from ..config import make_config, merge
from ..errors import UserError
from ..evaluate import BenchmarkName
from ..files import absolute
from .options import Categories, Config, EncoderName, JsonFile, Set
from .segment import INFERENCE, inference_of

DETECTION = ("detector", "refine")  # sections of the settings that `evaluate` reads
DETECTION_FLAGS = flags_of(DETECTION)


def _device() -> str:
    from ..distributed import count_gpus

    return "cuda" if count_gpus(None, 1) else "cpu"


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
        str | None,
        typer.Option(
            "--photos", metavar="PHOTOS", help="Photos to segment; PREDICTIONS are the weights of a segmenter."
        ),
    ] = None,
    benchmark: Annotated[
        BenchmarkName | None,
        typer.Option(
            "--benchmark",
            metavar="|".join(get_args(BenchmarkName)),
            help="Public benchmark, instead of TRUTH; requires --root.",
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="FOLDER", help="Folder in which the benchmark was unpacked.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="NAME", help="Split of the benchmark. [default: the published one, such as val]"
        ),
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
            metavar="INTEGER",
            min=0,
            max=65535,
            help="Label in TRUTH to ignore. [default: 255, or 65535 if there are more than 255 classes]",
        ),
    ] = None,
    red_green: Annotated[
        bool, typer.Option("--red-green", help="TRUTH holds labels as R + 256 G and ignores 1000, as in ImageNet-S.")
    ] = False,
    json_file: JsonFile = None,
    config: Config = None,
    set_: Set = None,
    **options: str | None,
) -> None:
    """Evaluate masks: IoU and pixel accuracy.

    Prints the IoU of each class, the mIoU and the pixel accuracy. Label 0 is the background, label k the k-th category.
    For a run, it scores the masks of the photos in TRUTH and suggests a --min-score for trainings. With --benchmark,
    it reads a public benchmark as it was unpacked. The benchmarks of salient objects also score a detector, without
    PREDICTIONS: --detector and the options that follow it. --precision, --scales and --horizontal-flip also count for a
    segmenter.
    """
    from ..evaluate.folders import evaluate_folders, evaluate_segmenter, print_table
    from ..evaluate.scoring import evaluate_benchmark, is_weights, print_benchmark, records_folder
    from ..files import write_json
    from ..hub import local_weights

    predictions = predictions and local_weights(predictions)
    show: Callable[[dict], None] = print_table
    values = given_settings(DETECTION, config, set_ or [], DETECTION_FLAGS, options)
    if preset is not None and predictions is None:
        from .. import presets

        chosen = presets.preset(preset)
        values = merge({section: chosen[section] for section in DETECTION if section in chosen}, values)
        preset = None
    inference: dict[str, Any] = {}
    if predictions is not None and is_weights(predictions):
        detector = values.get("detector", {})
        inference = {name: detector.pop(name) for name in INFERENCE if name in detector}
        values = {section: given for section, given in values.items() if given}
    # Two names of ImageNet-S occur twice.
    names = names_of(categories, categories_file, preset, distinct=benchmark is None)

    def load(fallback: list[str] | None) -> Any:
        assert predictions is not None
        from ..segmenter.predict import Segmenter

        options = inference_of(inference)
        return Segmenter.load(predictions, categories=fallback, encoder=encoder, device=_device(), **options)

    if benchmark is not None:
        taken = {"TRUTH": truth, "--photos": photos, "--ignore": ignore, "--red-green": red_green or None}
        if wrong := [name for name, value in taken.items() if value is not None]:
            raise UserError(f"leave out {', '.join(wrong)}: --benchmark {benchmark} has its own")
        if root is None:
            raise UserError(f"pass the folder of {benchmark} with --root FOLDER")
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
        from ..evaluate.runs import evaluate_run, print_run

        figures, show = evaluate_run(masks, truth, names, ignore, red_green), print_run
    elif photos is None:
        figures = evaluate_folders(predictions, truth, names, ignore, red_green)
    else:
        from ..photos import open_source

        figures = evaluate_segmenter(load(names), open_source(photos), truth, ignore, red_green)
    if json_file is not None:  # before anything is printed: whatever happens to the output, the figures are there
        write_json(json_file, figures)
    show(figures)


evaluate = command_with_settings(_evaluate, DETECTION_FLAGS)
