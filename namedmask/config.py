# SPDX-License-Identifier: MIT
"""Every setting of a run: its name, default, range and description stand here, once.

The commands' options (`cli`), the settings reference in the documentation and run.toml are generated from these fields.
A setting belongs to the section of the stage whose result it changes. Options that change only how fast the result
comes (--workers, --gpus) are not settings and are not recorded: they can differ when a run is continued.
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from .errors import UserError, wrong_value
from .files import absolute
from .selection import Selection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AUGMENTATION = ("scales", "horizontal_flip")  # at test time: settings of the detector that segmenters have, too
MADE_WITH = "made_with"  # the table of run.toml that holds versions and devices, not settings

Precision = Literal["float32", "bfloat16"]
Range = Annotated[tuple[float, float], Field(strict=False)]  # low, high; TOML has lists instead of tuples


@dataclass(frozen=True)
class LocalFile:
    """Marks a setting that names a local file. Runs compare such files by content, wherever they lie.

    companions: suffixes of files beside it that belong to it.
    """

    companions: tuple[str, ...] = ()


Unset = BeforeValidator(lambda value: value or None)  # TOML has no null: "" stands for None
Weights = Annotated[str | None, Unset, LocalFile()]


class Section(BaseModel):
    """A group of settings. `setting` declares its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def without_files(self) -> dict[str, Any]:
        """The settings but for the paths of local files, which are compared by content elsewhere."""
        files = {one.name for one in settings(type(self)) if one.files}
        return {name: value for name, value in self.model_dump().items() if name not in files}


def setting(default: Any, description: str, *, flag: str | None = "", **limits: Any) -> Any:
    """A field of a Section.

    Args:
        default: Its default value.
        description: One sentence for --help and the settings reference.
        flag: Its option on the command line; "" for one called like the field, None for settings that only --set and
            --config reach.
        limits: Its range, as pydantic's Field takes it (gt, ge, lt, le, min_length, max_length).
    """
    return Field(default, description=description, json_schema_extra={"flag": flag}, **limits)


class IndexConfig(Section):
    """Image embeddings of all photos. Not needed for class folders."""

    clip_model: str = setting("ViT-L-14-336-quickgelu:openai", "CLIP model, as open_clip's MODEL:PRETRAINED.")
    clip_weights: Weights = setting(None, "Local file with CLIP weights, instead of PRETRAINED's.")
    embeddings: Annotated[str | None, Unset, LocalFile(companions=(".json",))] = setting(
        None, "Precomputed embeddings, FILE.safetensors with FILE.json beside it, instead of a CLIP model."
    )
    shard_size: int = setting(1024, "Photos per shard of the index.", flag=None, ge=1, le=1_000_000)


class ArchiveConfig(Section):
    """The photos of each category."""

    photos_per_category: int = setting(500, "Photos retrieved per category.", ge=1, le=10_000_000)
    best_match_only: bool = setting(
        True, "Retrieve a photo only for the category that it matches best, as long as there are others."
    )
    near_duplicate_threshold: float = setting(
        1.0,
        "Cosine similarity of embeddings above which the lower-ranked of two photos of a category is left out as a "
        "near-duplicate, as long as there are others; 1 to keep near-duplicates.",
        ge=0,
        le=1,
    )


class DetectorConfig(Section):
    """Which pixels of a photo are the object."""

    name: Literal["spectral", "cluster-vote", "selfmask"] = setting("spectral", "Detector.", flag="--detector")
    weights: Weights = setting(
        None, "Local file with the SelfMask network, including its encoder.", flag="--detector-weights"
    )
    select: Literal["auto", "none", "prior", "name"] = setting(
        "auto",
        "Choose among several candidate masks: none, as published; by their agreement and the border of the photo; or "
        "also by how likely CLIP finds the category's name in them. auto: none for selfmask, else prior.",
    )
    backbone: str = setting("vit_small_patch8_224.dino", "ViT backbone, by its timm name.")
    backbone_weights: Weights = setting(None, "Local file with backbone weights, instead of timm's.")
    more_backbones: list[Annotated[str, LocalFile()]] = setting(
        [], "Further backbones that vote in cluster-vote, each NAME or NAME=FILE with a local file of weights."
    )
    features: Literal["tokens", "keys"] = setting("keys", "Output of the last block to use as features.")
    center_features: bool = setting(False, "Subtract the mean feature of each photo. DINOv2 needs it.")
    tau: float = setting(0.2, "Cosine similarity above which two patches are connected.", ge=-1, le=1)
    image_size: int = setting(448, "Short side of the backbone's input, in pixels.", ge=16, le=4096)
    interpolation: Literal["bicubic", "bilinear"] = setting(
        "bicubic", "Interpolation of the photo to image_size, with antialiasing."
    )
    patch_fit: Literal["stretch", "pad"] = setting(
        "stretch", "Stretch the resized photo to whole patches, or pad it with the mean color at the bottom and right."
    )
    scales: list[Annotated[float, Field(ge=0.01, le=4)]] = setting(
        [1.0], "Test-time augmentation of selfmask: input sizes, relative to image_size.", min_length=1
    )
    horizontal_flip: bool = setting(False, "Test-time augmentation of selfmask: average with the flipped photo.")
    precision: Precision = setting("float32", "Floating-point format of the backbone.")

    @field_validator("more_backbones")
    @classmethod
    def _only_cluster_vote_combines_backbones(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value and info.data.get("name") != "cluster-vote":
            raise ValueError("only the detector cluster-vote takes several backbones")
        return value

    @property
    def selection(self) -> Literal["none", "prior", "name"]:
        """How a mask is chosen among candidates, `select` with "auto" resolved."""
        if self.select == "auto":
            return "none" if self.name == "selfmask" else "prior"
        return self.select


class CrfConfig(Section):
    """Fully connected CRF, with its published weights and sigmas."""

    iterations: int = setting(10, "Mean-field iterations.", flag=None, ge=1, le=1000)
    confidence: float = setting(
        0.999,
        "Probability of the detected class in the unary term. The default erodes objects least.",
        flag=None,
        gt=0.5,
        lt=1,
    )
    gaussian_sigma: float = setting(
        3.0, "Spatial sigma of the smoothness kernel, in pixels.", flag=None, ge=0.1, le=10_000
    )
    gaussian_weight: float = setting(3.0, "Weight of the smoothness kernel.", flag=None, ge=0, le=10_000)
    bilateral_sigma: float = setting(
        80.0, "Spatial sigma of the appearance kernel, in pixels.", flag=None, ge=0.1, le=10_000
    )
    color_sigma: float = setting(13.0, "Color sigma of the appearance kernel, of 255.", flag=None, ge=0.1, le=10_000)
    bilateral_weight: float = setting(10.0, "Weight of the appearance kernel.", flag=None, ge=0, le=10_000)


class PamrConfig(Section):
    """Pixel-adaptive mask refinement."""

    iterations: int = setting(10, "Iterations.", flag=None, ge=1, le=1000)
    dilations: list[Annotated[int, Field(ge=1, le=1024)]] = setting(
        [1, 2, 4, 8, 12, 24], "Dilations of the 3 x 3 neighborhoods, in pixels.", flag=None, min_length=1, max_length=16
    )


class RefineConfig(Section):
    """How masks are aligned to edges. Lengths are in pixels of a photo whose short side is 512 pixels.

    The sigmas and the smoothness are the published ones of the bilateral solver.
    """

    name: Literal["bilateral", "crf", "pamr", "none"] = setting("bilateral", "Mask refinement.", flag="--refine")
    size: Literal["photo", "detector"] = setting(
        "photo",
        "Size at which masks are refined: the photo's, or that of the detector's input, followed by a nearest-neighbor "
        "resize to the photo.",
        flag="--refine-size",
    )
    largest_component: bool = setting(False, "Refine only the largest connected component of the detected mask.")
    fill_holes: bool = setting(False, "Fill holes in the refined mask.")
    sigma_spatial: float = setting(
        16.0, "Spatial sigma of the bilateral solver, in pixels.", flag=None, ge=0.1, le=10_000
    )
    sigma_luma: float = setting(16.0, "Luma sigma of the bilateral solver, of 255.", flag=None, ge=1, le=10_000)
    sigma_chroma: float = setting(8.0, "Chroma sigma of the bilateral solver, of 255.", flag=None, ge=1, le=10_000)
    smoothness: float = setting(256.0, "Weight of the bilateral solver's smoothness term.", flag=None, ge=1e-6, le=1e6)
    crf: CrfConfig = CrfConfig()
    pamr: PamrConfig = PamrConfig()


class PseudolabelConfig(Section):
    """How masks are stored."""

    shard_size: int = setting(64, "Photos per shard of masks.", flag=None, ge=1, le=1_000_000)
    keep_detected: bool = setting(False, "Keep the masks before refinement, in OUT/detected.")


class SaliencyTraining(Section):
    """A SelfMask network, trained on the masks of a run with the SelfMask paper's settings."""

    backbone: str = setting("vit_small_patch8_224.dino", "Encoder, a ViT by its timm name.")
    backbone_weights: Weights = setting(None, "Local file with encoder weights, instead of timm's.")
    init_checkpoint: Weights = setting(None, "SelfMask network to start from, including its encoder.")
    num_queries: int = setting(20, "Queries, that is mask proposals per photo.", ge=1, le=1000)
    decoder_layers: int = setting(6, "Layers of the decoder.", ge=1, le=100)
    keep_fraction: float = setting(1.0, "Fraction of the masks to train on, best scores first.", gt=0, le=1)
    paste_prob: float = setting(0.0, "Probability of pasting the object onto another background.", ge=0, le=1)
    texture_prob: float = setting(0.0, "Probability of blending another photo's texture into the object.", ge=0, le=1)
    views: Literal["shrink", "crop"] = setting(
        "shrink", "Training views: photos squeezed to a square, shrunk and padded; or square crops of photos."
    )
    crop_size: int = setting(224, "Side of the training views, in pixels.", ge=16, le=4096)
    scale: Range = setting(
        (0.1, 1.0), "Side of a shrunk photo relative to the view, or area of a crop relative to the photo: low, high."
    )
    loss: Literal["sum", "mean"] = setting(
        "sum", "Sums of the losses at the size of the view, or smoothed means at the resolution of the mask."
    )
    batch_size: int = setting(8, "Photos per step, over all workers.", ge=1, le=65536)
    epochs: int = setting(12, "Passes over the masks.", ge=1, le=1_000_000)
    steps: int = setting(0, "Training steps, instead of epochs if above 0.", ge=0, le=1_000_000_000)
    lr: float = setting(6e-6, "Learning rate of the decoder.", gt=0, le=10)
    encoder_lr: float = setting(6e-6, "Learning rate of the encoder.", gt=0, le=10)
    warmup_steps: int = setting(0, "Steps in which the learning rates rise linearly.", ge=0, le=1_000_000_000)
    clip_grad_norm: float = setting(0.0, "Maximum norm of the gradients; 0 to disable clipping.", ge=0, le=1e6)
    weight_decay: float = setting(0.01, "Weight decay.", ge=0, le=10)
    precision: Precision = setting("float32", "Floating-point format of matrix products; weights stay float32.")
    seed: int = setting(0, "Random seed.", ge=0, le=2**32 - 1)

    @field_validator("scale")
    @classmethod
    def _scale_is_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ordered(value, 1)


class DeepLabTraining(Section):
    """What the trainings of the segmenter and of the experts share.

    `batch_size` is that of all workers together, so the result does not depend on their number, up to rounding.
    """

    encoder: str = setting("resnet50.dino", "Encoder: its timm name, or resnet50.dino for DINO's ResNet-50.")
    encoder_weights: Weights = setting(None, "Local file with encoder weights, instead of the published ones.")
    head_channels: int = setting(256, "Channels of the segmentation head.", ge=16, le=8192)
    dilations: list[Annotated[int, Field(ge=1, le=1024)]] = setting(
        [12, 24, 36],
        "Dilations of the head's pyramid pooling (ASPP), in steps of 8 pixels. Small crops need small ones.",
        min_length=1,
        max_length=16,
    )
    crop_size: int = setting(384, "Side of the training crops, in pixels.", ge=16, le=4096)
    scale: Range = setting((0.1, 1.0), "Random resize factor of a photo: low, high.")
    flip_prob: float = setting(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    color_jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] = setting(
        (0.8, 0.8, 0.8, 0.2), "Strength of brightness, contrast, saturation and hue jitter, as in ColorJitter."
    )
    color_jitter_prob: float = setting(0.8, "Probability of color jitter.", ge=0, le=1)
    grayscale_prob: float = setting(0.2, "Probability of conversion to grayscale.", ge=0, le=1)
    blur_prob: float = setting(0.5, "Probability of Gaussian blur.", ge=0, le=1)
    blur_sigma: Range = setting((0.1, 2.0), "Sigma of the blur in pixels: low, high.")
    paste_objects: Annotated[tuple[int, int], Field(strict=False)] = setting(
        (0, 1), "Objects of other photos pasted into a training photo: low, high."
    )
    min_score: float = setting(0.0, "Train on masks with at least this score.", ge=0, le=1)
    keep_fraction: float = setting(
        1.0, "Fraction of the masks of each category to train on, best scores first.", gt=0, le=1
    )
    per_category: int = setting(
        0, "Masks of each category to train on, best scores first; 0 for all.", ge=0, le=1_000_000_000
    )
    empty_masks: Literal["background", "skip"] = setting(
        "background", "Photos with an empty mask: train on them as background, or leave them out."
    )
    batch_size: int = setting(16, "Photos per step, over all workers.", ge=1, le=65536)
    grad_accum_steps: int = setting(1, "Parts into which a batch is split to save memory.", ge=1, le=65536)
    steps: int = setting(20_000, "Training steps.", ge=1, le=1_000_000_000)
    lr: float = setting(5e-4, "Learning rate of the head.", gt=0, le=10)
    encoder_lr: float = setting(5e-5, "Learning rate of the encoder.", ge=0, le=10)
    dropout: float = setting(0.1, "Dropout after the projection of the pyramid pooling (ASPP).", ge=0, lt=1)
    encoder_bn_momentum: float = setting(
        0.01, "Momentum of the encoder's BatchNorm. Short trainings need more.", gt=0, le=1
    )
    weight_decay: float = setting(2e-4, "Weight decay.", ge=0, le=10)
    poly_power: float = setting(0.9, "Learning rates decay as (1 - step / steps) ** poly_power.", ge=0, le=100)
    min_lr: float = setting(1e-6, "Lower bound of the learning rates.", ge=0, le=10)
    precision: Precision = setting("float32", "Floating-point format of matrix products; weights stay float32.")
    allow_empty: bool = setting(False, "Train although categories have no usable mask, without them.")
    seed: int = setting(0, "Random seed.", ge=0, le=2**32 - 1)

    @property
    def selection(self) -> Selection:
        """Which masks are trained on."""
        return Selection(self.min_score, self.keep_fraction, self.per_category or None)

    @field_validator("paste_objects")
    @classmethod
    def _paste_objects_is_ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1] <= 100:
            raise ValueError("expected two numbers, low and high, from 0 to 100")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _color_jitter_is_in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= strength <= highest for strength, highest in zip(value, (10, 10, 10, 0.5), strict=True)):
            raise ValueError("expected three numbers from 0 to 10 and one from 0 to 0.5")
        return value

    @field_validator("scale", "blur_sigma")
    @classmethod
    def _ranges_are_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ordered(value)


class SegmenterTraining(DeepLabTraining):
    """A segmenter of all categories, trained on the masks of a run with the paper's settings.

    `batch_size` is that of all workers together, so the result does not depend on their number, up to rounding.
    """

    held_out: float = setting(
        0.05, "Fraction of the photos that are held out, to score the network on their masks; 0 for none.", ge=0, le=0.5
    )
    background_weight: float = setting(
        1.0, "Weight of the background's pixels in the loss. Below 1, short trainings miss fewer objects.", gt=0, le=10
    )
    label_others: bool = setting(
        True,
        "In a photo with masks of several categories, label all of them, and ignore those that are not trained on. "
        "Otherwise, all but the mask of the sample is background.",
    )
    score_every: int = setting(500, "Steps between two scores on the held-out masks.", ge=1, le=1_000_000_000)
    score_power: float = setting(
        0.0,
        "Photos of a category are drawn in proportion to (score of the mask) ** score_power; 0: all equally often.",
        ge=0,
        le=100,
    )
    ema_decay: float = setting(
        0.0, "Decay of a moving average of the weights (EMA), which is stored instead of them; 0: none.", ge=0, lt=1
    )


class ExpertTraining(DeepLabTraining):
    """One binary segmenter per category, trained on the masks of its archive with the paper's settings.

    A photo shows one object, so nothing is pasted.
    """

    select: Literal["auto", "all", "name"] = setting(
        "auto",
        "Which masks the experts replace: all, as published; or those that differ from the expert's and in which CLIP "
        "finds the category's name less likely. auto: name if the run has an index of a CLIP model, else all.",
    )
    mode: Literal["separate", "shared"] = setting(
        "separate", "One network per category, or a shared one with an output layer per category."
    )
    paste_objects: Annotated[tuple[int, int], Field(strict=False)] = setting(
        (0, 0), "Always 0, 0: an expert's photo shows one object.", flag=None
    )
    batch_size: int = setting(8, "Photos per step.", ge=1, le=65536)
    steps: int = setting(5_000, "Steps of each training.", ge=1, le=1_000_000_000)

    @field_validator("paste_objects")
    @classmethod
    def _nothing_is_pasted(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value != (0, 0):
            raise ValueError("an expert's photo shows one object, so nothing is pasted: expected 0, 0")
        return value


class RunConfig(Section):
    """A whole run."""

    photos: str = setting(..., "Folder, list file (.txt) or .tar of photos.", flag=None)
    categories: list[str] = setting([], "Category names. Without names, the photos must be in class folders.")
    index: IndexConfig = IndexConfig()
    archive: ArchiveConfig = ArchiveConfig()
    detector: DetectorConfig = DetectorConfig()
    refine: RefineConfig = RefineConfig()
    pseudolabel: PseudolabelConfig = PseudolabelConfig()
    saliency: SaliencyTraining = SaliencyTraining()
    experts: ExpertTraining = ExpertTraining()
    segmenter: SegmenterTraining = SegmenterTraining()


def ordered(value: tuple[float, float], highest: int = 100) -> tuple[float, float]:
    """Returns a range unchanged. Raises ValueError unless 0.001 <= low <= high <= highest."""
    if not 0.001 <= value[0] <= value[1] <= highest:
        raise ValueError(f"expected two numbers, low and high, from 0.001 to {highest}")
    return value


METAVARS = {str: "NAME", int: "INTEGER", float: "NUMBER", bool: "true|false"}


# -- one setting at a time ------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting of RunConfig: `name` as in --set, such as "refine.crf.confidence", and its field."""

    name: str
    field: FieldInfo

    @property
    def flag(self) -> str | None:
        """Its option, such as "--batch-size"; None if only --set and --config reach it."""
        extra = self.field.json_schema_extra
        assert isinstance(extra, dict)
        flag = extra["flag"]
        assert flag is None or isinstance(flag, str)
        return "--" + self.name.rpartition(".")[2].replace("_", "-") if flag == "" else flag

    @property
    def kind(self) -> Any:
        """Its type annotation."""
        return self.field.annotation

    @property
    def default(self) -> Any:
        """Its default, as JSON has it."""
        value = self.field.default
        return list(value) if isinstance(value, tuple) else value

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) in (list, tuple)

    @property
    def files(self) -> LocalFile | None:
        """The mark of a setting that holds paths of local files."""
        inner = [m for arg in get_args(self.kind) for m in getattr(arg, "__metadata__", ())]
        return next((mark for mark in (*self.field.metadata, *inner) if isinstance(mark, LocalFile)), None)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a setting that takes one of a few strings."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def limits(self) -> str:
        """Its range, such as "0<=x<=1"; "" where there is none."""
        signs = {"Gt": "<", "Ge": "<=", "Lt": "<", "Le": "<="}
        text = "x"
        for m in self.field.metadata:
            name = type(m).__name__
            if name in ("Gt", "Ge"):
                text = f"{getattr(m, name.lower())}{signs[name]}{text}"
            elif name in ("Lt", "Le"):
                text = f"{text}{signs[name]}{getattr(m, name.lower())}"
        return "" if text == "x" else text

    @property
    def metavar(self) -> str:
        """The type of its value, for --help."""
        kind = self.kind
        if self.name == "photos":
            return "PHOTOS"
        if self.files:
            return "NAME[=FILE],..." if self.is_list else "FILE"
        if self.choices:
            return "|".join(self.choices)
        if self.is_list:
            kinds = [get_args(arg)[0] if get_origin(arg) is Annotated else arg for arg in get_args(kind)]
            return ",".join(METAVARS[k] for k in kinds) + (",..." if get_origin(kind) is list else "")
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        return METAVARS[kind]

    def parse(self, text: str) -> Any:
        """The value of a text from the command line; the values of lists are separated by commas. Raises UserError."""
        raw: Any = text
        if self.is_list:
            if get_args(self.kind)[0] is not str and text[:1] + text[-1:] == "[]":  # as TOML writes numbers
                text = text[1:-1]
            raw = [part.strip() for part in text.split(",") if part.strip()]
        elif text.lower() in ("", "none") and type(None) in get_args(self.kind):
            raw = None
        try:
            value = TypeAdapter(self.kind).validate_python(raw, strict=False)
        except ValidationError as error:
            raise UserError(f"wrong settings: {describe(self, error.errors()[0])}") from None
        return self.absolute(value)

    def absolute(self, value: Any) -> Any:
        """The value, with absolute paths if it names local files."""
        if not self.files or not value:
            return value
        return [_absolute_file(entry) for entry in value] if self.is_list else absolute(value)


def _absolute_file(entry: str) -> str:
    """ "NAME=FILE" with an absolute path; "NAME" as it is."""
    name, equals, file = entry.partition("=")
    return name + equals + (absolute(file) if file else "")


def settings(kind: type[Section] = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """All settings below a section, in order, those of nested sections too."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, field)


def find_setting(name: str) -> Setting:
    """The setting of a dotted name; UserError, with the nearest name, if there is none."""
    known = {one.name: one for one in settings()}
    if name not in known:
        raise UserError(f"there is no setting {name!r}{nearest(name, known)}")
    return known[name]


def nearest(name: str, known: Any) -> str:
    """ "; did you mean X?" for the most similar of the known names, or nothing. "tau" finds "detector.tau" too."""
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, list(known), 1) or [k for k in known if k.rpartition(".")[2] == last][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


# -- nested dictionaries ---------------------------------------------------------------------------------------------


def flatten(nested: dict, prefix: str = "") -> dict[str, Any]:
    """{"detector": {"tau": 0.2}} -> {"detector.tau": 0.2}"""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def nest(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    nested: dict = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return nested


def merge(*layers: dict) -> dict:
    """Nested dictionaries on top of each other: later ones win."""
    return nest({name: value for layer in layers for name, value in flatten(layer).items()})


def make_config(values: dict) -> RunConfig:
    """The settings of a nested dictionary; UserError names each wrong value and what was expected."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        known = {one.name: one for one in settings()}
        lines = []
        for e in error.errors():
            name = ".".join(map(str, e["loc"]))
            place = next((one for key, one in known.items() if name == key or name.startswith(key + ".")), None)
            if e["type"] == "extra_forbidden":
                hint = "; write it without quotes" if name in known else nearest(name, known)
                lines.append(f"there is no setting {name!r}{hint}")
            else:
                lines.append(describe(place or name, e))
        raise UserError("wrong settings: " + "; ".join(lines)) from None


def describe(where: Setting | str, error: Any) -> str:
    """A pydantic error in one line: the setting, what was expected, what came, and the nearest choice."""
    name = where.name if isinstance(where, Setting) else where
    if isinstance(where, Setting) and where.flag:
        name += f" ({where.flag})"
    given, choices = error["input"], where.choices if isinstance(where, Setting) else ()
    return wrong_value(name, error) + (nearest(given, choices) if choices and isinstance(given, str) else "")


# -- files -----------------------------------------------------------------------------------------------------------


def read_settings(path: Path) -> dict:
    """The nested settings in a TOML file such as run.toml; UserError if it cannot be read or has unknown names.

    Paths in the file are relative to the current folder, as on the command line.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from None
    values.pop(MADE_WITH, None)
    return checked(values)


def checked(values: dict) -> dict:
    """Nested settings with absolute paths; UserError names each wrong name and value."""
    make_config({"photos": "", **values})
    flat = flatten(values)
    for one in settings():
        if one.name in flat:
            flat[one.name] = one.absolute(flat[one.name])
    if "photos" in flat:
        flat["photos"] = absolute(flat["photos"])
    return nest(flat)


def to_toml(config: RunConfig, made_with: dict[str, dict[str, str]] | None = None) -> str:
    """The settings as run.toml shows them; under MADE_WITH, versions and the device of each stage."""
    flat = flatten(config.model_dump())
    values = nest({name: "" if value is None else value for name, value in flat.items()})
    return tomli_w.dumps({**values, MADE_WITH: made_with} if made_with else values)
