# SPDX-License-Identifier: MIT
"""The commands: parse, call one stage, print. Everything heavy is imported by what needs it, so --help is quick.

Exit codes: 0 finished (photos that could not be used are in errors.jsonl), 1 an error of the program, 2 something that
the user can mend, 3 finished but every photo failed, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
alone = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)  # namedmask-pseudolabel

Photos = Annotated[Path, typer.Argument(metavar="PHOTOS", help="A folder, a list file (.txt) or a .tar of photos.")]
Out = Annotated[Path, typer.Option("--out", help="The run folder; made if missing, continued if it is there.")]
DemoOut = Annotated[Path, typer.Option("--out", help="The demo's folder; made if missing, continued if it is there.")]
RunFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The run folder.")]
Categories = Annotated[
    str | None,
    typer.Option("--categories", help="Names, separated by commas. Without names PHOTOS must be class folders."),
]
CategoriesFile = Annotated[Path | None, typer.Option("--categories-file", help="A file with one name a line.")]
ClipModel = Annotated[
    str | None, typer.Option("--clip-model", help="open_clip's MODEL:PRETRAINED. (default: ViT-L-14-336:openai)")
]
ClipWeights = Annotated[Path | None, typer.Option("--clip-weights", help="A local file with CLIP's weights.")]
Embeddings = Annotated[
    Path | None, typer.Option("--embeddings", help="FILE.safetensors (beside FILE.json) instead of a CLIP model.")
]
PhotosPerCategory = Annotated[
    int | None, typer.Option("--photos-per-category", help="Size of the archive of each name. (default: 500)")
]
Detector = Annotated[
    str | None, typer.Option("--detector", help="spectral, cluster-vote or selfmask. (default: spectral)")
]
DetectorWeights = Annotated[
    Path | None, typer.Option("--detector-weights", help="A local file with selfmask's network, its encoder included.")
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", help="A timm ViT. (default: vit_small_patch8_224.dino)")
]
BackboneWeights = Annotated[Path | None, typer.Option("--backbone-weights", help="A local file with its weights.")]
MoreBackbones = Annotated[
    str | None,
    typer.Option("--more-backbones", help="NAME or NAME=FILE, separated by commas, that vote in cluster-vote too."),
]
Features = Annotated[str | None, typer.Option("--features", help="tokens or keys of the last block. (default: keys)")]
Center = Annotated[
    bool | None,
    typer.Option("--center/--no-center", help="Subtract each photo's mean feature; DINOv2 needs it. (default: no)"),
]
Tau = Annotated[float | None, typer.Option("--tau", help="Cosines above it are edges of the graph. (default: 0.2)")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Short side for the backbone, in pixels. (default: 448)")
]
Mirror = Annotated[
    bool | None, typer.Option("--mirror/--no-mirror", help="selfmask also looks at each photo mirrored. (default: no)")
]
Precision = Annotated[
    str | None, typer.Option("--precision", help="float32 or bfloat16 for the backbone. (default: float32)")
]
Refine = Annotated[str | None, typer.Option("--refine", help="bilateral, crf, pamr or none. (default: bilateral)")]
LargestComponent = Annotated[
    bool | None,
    typer.Option("--largest-component/--all-components", help="Refine the largest part alone. (default: all)"),
]
Weights = Annotated[
    Path,
    typer.Argument(metavar="WEIGHTS", help="A segmenter's folder or its model.safetensors, or NamedMask's .pth."),
]
EncoderName = Annotated[str, typer.Option("--encoder", help="A timm network, for weights without a categories.json.")]
TrainedEncoder = Annotated[
    str | None, typer.Option("--encoder", help="A timm network, or resnet50.dino. (default: resnet50.dino)")
]
EncoderWeights = Annotated[Path | None, typer.Option("--encoder-weights", help="A local file with its weights.")]
Width = Annotated[int | None, typer.Option("--width", help="Channels of the head. (default: 256)")]
Crop = Annotated[int | None, typer.Option("--crop", help="Pixels a side in training. (default: 384)")]
Rate = Annotated[float | None, typer.Option("--rate", help="Learning rate of the head. (default: 5e-4)")]
EncoderRate = Annotated[float | None, typer.Option("--encoder-rate", help="Of the encoder. (default: 5e-5)")]
TrainingPrecision = Annotated[
    str | None, typer.Option("--precision", help="float32 or bfloat16 for the products. (default: float32)")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of all draws. (default: 0)")]
FillHoles = Annotated[
    bool | None,
    typer.Option("--fill-holes/--keep-holes", help="What a refined mask surrounds is object too. (default: no)"),
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes on the CPU.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=0, help="Processes with a GPU each. (default: 1 if a GPU is there, else 0)"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew what was made with other settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# Where each option stands among the settings of a run (`config.RunConfig`).
SETTINGS = {
    "photos": ("photos",),
    "categories": ("categories",),
    "clip_model": ("index", "clip_model"),
    "clip_weights": ("index", "clip_weights"),
    "embeddings": ("index", "embeddings"),
    "photos_per_category": ("archive", "photos_per_category"),
    "detector": ("detector", "name"),
    "detector_weights": ("detector", "weights"),
    "backbone": ("detector", "backbone"),
    "backbone_weights": ("detector", "backbone_weights"),
    "more_backbones": ("detector", "more_backbones"),
    "features": ("detector", "features"),
    "center": ("detector", "center"),
    "tau": ("detector", "tau"),
    "image_size": ("detector", "image_size"),
    "mirror": ("detector", "mirror"),
    "precision": ("detector", "precision"),
    "refine": ("refine", "name"),
    "largest_component": ("refine", "largest_component"),
    "fill_holes": ("refine", "fill_holes"),
    "mode": ("experts", "mode"),
    "expert_encoder": ("experts", "encoder"),
    "expert_encoder_weights": ("experts", "encoder_weights"),
    "expert_width": ("experts", "width"),
    "expert_crop": ("experts", "crop"),
    "expert_batch": ("experts", "batch"),
    "expert_steps": ("experts", "steps"),
    "expert_rate": ("experts", "rate"),
    "expert_encoder_rate": ("experts", "encoder_rate"),
    "expert_precision": ("experts", "precision"),
    "expert_seed": ("experts", "seed"),
    "encoder": ("segmenter", "encoder"),
    "encoder_weights": ("segmenter", "encoder_weights"),
    "width": ("segmenter", "width"),
    "crop": ("segmenter", "crop"),
    "copies": ("segmenter", "copies"),
    "batch": ("segmenter", "batch"),
    "accumulate": ("segmenter", "accumulate"),
    "steps": ("segmenter", "steps"),
    "rate": ("segmenter", "rate"),
    "encoder_rate": ("segmenter", "encoder_rate"),
    "training_precision": ("segmenter", "precision"),
    "seed": ("segmenter", "seed"),
}


def settings_of(options: dict) -> dict:
    """The options that were given -> the nested settings of RunConfig; paths become absolute."""
    options = dict(options)
    options["categories"] = _names(options.get("categories"), options.pop("categories_file", None))
    options["more_backbones"] = _backbones(options.get("more_backbones"))
    given: dict = {}
    for option, value in options.items():
        if value is not None:
            *parts, key = SETTINGS[option]
            part = given.setdefault(parts[0], {}) if parts else given
            # abspath keeps links, which the user may turn elsewhere; Path.resolve() would not.
            part[key] = os.path.abspath(value) if isinstance(value, Path) else value  # noqa: PTH100
    return given


def _names(categories: str | None, file: Path | None) -> list[str] | None:
    if categories is not None and file is not None:
        raise UserError("give --categories or --categories-file, not both")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"--categories-file {file}: {error}") from None
        names = [line.strip() for line in text.splitlines()]
    elif categories is not None:
        names = [name.strip() for name in categories.split(",")]
    else:
        return None
    if not (names := [name for name in names if name]):
        raise UserError("no category name was given")
    return names


def _backbones(text: str | None) -> list[str] | None:
    """ "NAME,NAME=FILE" -> its entries, files with absolute paths."""
    if text is None:
        return None
    entries = [entry.strip().partition("=") for entry in text.split(",") if entry.strip()]
    return [name + equals + (os.path.abspath(file) if file else "") for name, equals, file in entries]  # noqa: PTH100


def _source(photos: Path):
    from .photos import PhotoSource

    try:
        return PhotoSource(photos)
    except ValueError as error:
        raise UserError(str(error)) from None


def _load_segmenter(weights: Path, categories: str | None, file: Path | None, encoder: str, precision: str):
    names = _names(categories, file)
    from .distributed import count_gpus
    from .segmenter.predict import Segmenter

    if precision not in ("float32", "bfloat16"):
        raise UserError(f"--precision {precision}: expected float32 or bfloat16")
    device = "cuda" if count_gpus(None, 1) else "cpu"
    return Segmenter.load(weights, categories=names, encoder=encoder, device=device, precision=precision)


def command(function: Callable) -> Callable:
    """Gives every ending its exit code; an error that a person can act on becomes one line."""

    @functools.wraps(function)
    def wrapper(debug: bool = False, **options) -> None:
        try:
            function(**options)
        except UserError as error:
            if debug:
                raise
            print(f"namedmask: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("namedmask: interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None
        except (typer.Exit, BrokenPipeError):  # click ends quietly when nobody reads its output any more
            raise
        except Exception as error:  # a fault of the program, but for the disk's and the network's
            if debug:
                raise
            print(f"namedmask: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, OSError) else 1) from None

    return wrapper


def stage_command(*stages: str) -> Callable:
    """A command that runs stages: the function it decorates is only its signature, the options and the help text."""

    def decorate(signature: Callable) -> Callable:
        @command
        @functools.wraps(signature)
        def run_stages(out, workers=1, gpus=None, overwrite=False, **options) -> None:
            given = settings_of(options)
            from . import run

            if not run.start(out, given, stages, workers, gpus, overwrite):
                raise typer.Exit(3)

        return run_stages

    return decorate


@alone.command()
@stage_command("index", "archive", "pseudolabel", "report")
def pseudolabel_everything(
    photos: Photos,
    out: Out,
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    embeddings: Embeddings = None,
    photos_per_category: PhotosPerCategory = None,
    detector: Detector = None,
    detector_weights: DetectorWeights = None,
    backbone: BackboneName = None,
    backbone_weights: BackboneWeights = None,
    more_backbones: MoreBackbones = None,
    features: Features = None,
    center: Center = None,
    tau: Tau = None,
    image_size: ImageSize = None,
    mirror: Mirror = None,
    precision: Precision = None,
    refine: Refine = None,
    largest_component: LargestComponent = None,
    fill_holes: FillHoles = None,
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Photos and names in, named masks and a gallery out: index, archive, pseudolabel and report in one go.

    Run it again to continue; what is done is kept.
    """


@app.command()
@stage_command("index")
def index(
    photos: Photos,
    out: Out,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    embeddings: Embeddings = None,
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Photos to CLIP image embeddings."""


@app.command()
@stage_command("archive")
def archive(
    out: RunFolder,
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    photos_per_category: PhotosPerCategory = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """The best photos of an index for each name."""


@app.command()
@stage_command("pseudolabel")
def pseudolabel(
    out: RunFolder,
    detector: Detector = None,
    detector_weights: DetectorWeights = None,
    backbone: BackboneName = None,
    backbone_weights: BackboneWeights = None,
    more_backbones: MoreBackbones = None,
    features: Features = None,
    center: Center = None,
    tau: Tau = None,
    image_size: ImageSize = None,
    mirror: Mirror = None,
    precision: Precision = None,
    refine: Refine = None,
    largest_component: LargestComponent = None,
    fill_holes: FillHoles = None,
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """A mask for every photo of an archive."""


@app.command()
@command
def train_saliency(
    out: RunFolder,
    backbone: BackboneName = None,
    backbone_weights: BackboneWeights = None,
    start: Annotated[Path | None, typer.Option("--start", help="A SelfMask network to go on from.")] = None,
    queries: Annotated[int | None, typer.Option("--queries", help="Masks that it proposes. (default: 20)")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Of its decoder. (default: 6)")] = None,
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the masks, by score. (default: 1)")] = None,
    paste: Annotated[
        float | None, typer.Option("--paste", help="Share of objects put before another background. (default: 0)")
    ] = None,
    texture: Annotated[
        float | None, typer.Option("--texture", help="Share of objects with a texture of another photo. (default: 0)")
    ] = None,
    crop: Annotated[int | None, typer.Option("--crop", help="Pixels a side in training. (default: 224)")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Photos a step. (default: 8)")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the masks. (default: 12)")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Instead of epochs.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate of the decoder. (default: 6e-6)")] = None,
    encoder_rate: Annotated[
        float | None, typer.Option("--encoder-rate", help="Of the encoder. (default: 6e-6)")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of all draws. (default: 0)")] = None,
    debug: Debug = False,
) -> None:
    """A SelfMask network from the masks of a run, for `--detector selfmask`; run it again to continue."""
    options = {name: value for name, value in locals().items() if value is not None and name not in ("out", "debug")}
    from . import run
    from .config import SaliencyTraining, make_config, read_config
    from .distributed import count_gpus
    from .saliency.selfmask_training import train_saliency

    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    settings = make_config(given, SaliencyTraining)
    read_config(out / "run.toml")  # says that this is no run's folder, before one is made
    with run.locked(out):
        print(train_saliency(out, settings, "cuda" if count_gpus(None, 1) else "cpu"))


@app.command()
@command
def segment(
    weights: Weights,
    photos: Photos,
    out: Annotated[Path, typer.Option("--out", help="A folder for masks and overlays; continued if it is there.")],
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    encoder: EncoderName = "resnet50",
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16, for GPUs.")] = "float32",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """A mask with the class of every pixel, and a picture of it, for each photo; run it again to continue."""
    segmenter = _load_segmenter(weights, categories, categories_file, encoder, precision)
    from . import run
    from .distributed import Worker
    from .progress import Progress
    from .segmenter.folder import segment_photos

    source = _source(photos)
    if out.resolve() == (weights if weights.is_dir() else weights.parent).resolve():
        raise UserError(f"{out} holds the weights: choose another --out, as their files would be overwritten")
    with run.locked(out):
        if overwrite:
            for name in ("masks", "overlays", "categories.json", "errors.jsonl"):
                run.remove(out / name)
        with Progress("segment", Worker()) as progress:
            made, failed = segment_photos(segmenter, weights, source, out, progress)
    print(f"masks and overlays are in {out}" + (f"; {failed} photos failed: {out / 'errors.jsonl'}" if failed else ""))
    if not made:
        raise typer.Exit(3)


@app.command()
@command
def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS", help="A folder of PNG masks, the OUT of `segment`, or WEIGHTS with --photos."
        ),
    ],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="A folder of PNG masks with the same names.")],
    photos: Annotated[
        Path | None, typer.Option("--photos", help="PREDICTIONS are the weights of a segmenter, to see these photos.")
    ] = None,
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    encoder: EncoderName = "resnet50",
    ignore: Annotated[
        int | None,
        typer.Option("--ignore", help="Id in TRUTH that does not count. (default: 255; 65535 where that is a class)"),
    ] = None,
    red_green: Annotated[
        bool, typer.Option("--red-green", help="TRUTH holds ids as R + 256 G and ignores 1000, as ImageNet-S does.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    debug: Debug = False,
) -> None:
    """How good predicted masks are: IoU of every class, mIoU, pixel accuracy; 0 is the background, k the k-th name."""
    from .evaluate.folders import evaluate_folders, evaluate_segmenter, print_table, write_json

    if photos is None:
        names = _names(categories, categories_file)
        figures = evaluate_folders(predictions, truth, names, ignore, red_green)
    else:
        segmenter = _load_segmenter(predictions, categories, categories_file, encoder, "float32")
        figures = evaluate_segmenter(segmenter, _source(photos), truth, ignore, red_green)
    print_table(figures)
    if json_file is not None:
        write_json(json_file, figures)


@app.command()
@stage_command("experts")
def experts(
    out: RunFolder,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="separate: a network a category; shared: one for all. (default: separate)"),
    ] = None,
    expert_encoder: TrainedEncoder = None,
    expert_encoder_weights: EncoderWeights = None,
    expert_width: Width = None,
    expert_crop: Crop = None,
    expert_batch: Annotated[int | None, typer.Option("--batch", help="Photos a step. (default: 8)")] = None,
    expert_steps: Annotated[int | None, typer.Option("--steps", help="Of each training. (default: 5000)")] = None,
    expert_rate: Rate = None,
    expert_encoder_rate: EncoderRate = None,
    expert_precision: TrainingPrecision = None,
    expert_seed: Seed = None,
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Better masks from what the masks of each category share: an expert learns them and labels the archive anew."""


@app.command()
@stage_command("train")
def train(
    out: RunFolder,
    encoder: TrainedEncoder = None,
    encoder_weights: EncoderWeights = None,
    width: Width = None,
    crop: Crop = None,
    copies: Annotated[
        tuple[int, int] | None,
        typer.Option("--copies", metavar="FROM TO", help="Objects pasted into a photo. (default: 1 2)"),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Photos a step, of all workers. (default: 16)")] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Parts of a batch, one after another. (default: 1)")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the training. (default: 20000)")] = None,
    rate: Rate = None,
    encoder_rate: EncoderRate = None,
    training_precision: TrainingPrecision = None,
    seed: Seed = None,
    workers: Workers = 1,
    gpus: Gpus = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """One segmenter for all categories from the masks of a run; run it again to continue."""


@app.command()
@command
def export(
    weights: Weights,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The file to write.")],
    categories: Categories = None,
    categories_file: CategoriesFile = None,
    encoder: EncoderName = "resnet50",
    debug: Debug = False,
) -> None:
    """A segmenter as one ONNX file for photos of any size, checked with onnxruntime."""
    from .segmenter.export import export_onnx
    from .segmenter.predict import Segmenter

    segmenter = Segmenter.load(weights, categories=_names(categories, categories_file), encoder=encoder)
    worst = export_onnx(segmenter, onnx)
    print(f"{onnx}: onnxruntime's logits differ from torch's by at most {worst:.1g} of the largest")


@app.command()
@command
def report(out: RunFolder, debug: Debug = False) -> None:
    """The gallery of a run: OUT/report.html."""
    from .report import write_report

    print(write_report(out))


@app.command()
@command
def demo(out: DemoOut = Path("namedmask-demo"), overwrite: Overwrite = False, debug: Debug = False) -> None:
    """The whole method on rendered photos, without a download, and how good its masks are: minutes on two cores."""
    from .demo.run import run_demo

    run_demo(out, overwrite=overwrite)


@app.command()
@command
def doctor(debug: Debug = False) -> None:
    """What is installed, which kernels run where and why not, and where weights are."""
    from .doctor import examine

    for line in examine():
        print(line)


def main() -> None:
    """The command `namedmask`."""
    app()


def main_pseudolabel() -> None:
    """The command `namedmask-pseudolabel`."""
    alone()
