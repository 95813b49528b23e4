# SPDX-License-Identifier: MIT
"""Every setting of a run, and run.toml, where they are kept.

A setting belongs to the part that it changes the result of. What only changes how fast the result comes (workers, GPUs)
is no setting and is not kept: it may differ when a run is continued.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import UserError
from .files import atomic_write

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTS = "made-with"  # the table of run.toml that is no setting

Positive = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0, le=4)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], Field(strict=False)]  # from, to; a list in run.toml


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


SomePart = TypeVar("SomePart", bound=Part)


class IndexConfig(Part):
    """Photos -> CLIP image embeddings. Without categories there is no index."""

    clip_model: str = "ViT-L-14-336:openai"  # open_clip's MODEL:PRETRAINED
    clip_weights: str | None = None  # a local file instead of PRETRAINED
    embeddings: str | None = None  # embeddings computed elsewhere instead of a CLIP model
    shard_size: Positive = 1024  # photos per index shard


class ArchiveConfig(Part):
    photos_per_category: Positive = 500


class DetectorConfig(Part):
    """Which pixels are the object."""

    name: Literal["spectral", "cluster-vote", "selfmask"] = "spectral"
    weights: str | None = None  # a local file with the SelfMask network, its encoder included
    backbone: str = "vit_small_patch8_224.dino"  # a timm ViT
    backbone_weights: str | None = None  # a local file instead of the published weights
    more_backbones: list[str] = []  # of cluster-vote: NAME, or NAME=FILE with a local file of weights
    features: Literal["tokens", "keys"] = "keys"
    center: bool = False  # subtract each photo's mean feature
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.2
    image_size: Annotated[int, Field(ge=16)] = 448  # short side, pixels
    scales: Annotated[list[Scale], Field(min_length=1)] = [1.0]  # of image_size, at which selfmask looks at a photo
    mirror: bool = False  # it looks at each also mirrored; its mask is the mean of what all looks find
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("more_backbones")
    @classmethod
    def only_clusters_of_several_are_compared(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value and info.data.get("name") != "cluster-vote":
            raise ValueError("only the detector cluster-vote takes several backbones")
        return value


class SaliencyTraining(Part):
    """How a SelfMask network is trained on a run's masks. Rates, sizes and epochs are the SelfMask paper's."""

    backbone: str = "vit_small_patch8_224.dino"  # its encoder, a timm ViT
    backbone_weights: str | None = None  # a local file instead of the published weights
    start: str | None = None  # a SelfMask network to start from, encoder and all
    queries: Positive = 20
    layers: Positive = 6
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the masks, those with the best scores
    paste: Share = 0.0  # share of the views whose object is put before another background
    texture: Share = 0.0  # share of the views whose object gets a texture of another photo
    crop: Annotated[int, Field(ge=16)] = 224  # pixels a side
    scale: tuple[float, float] = (0.1, 1.0)  # area of a crop, as a share of the photo's
    batch: Positive = 8
    epochs: Positive = 12
    steps: Positive | None = None  # instead of epochs
    rate: Annotated[float, Field(gt=0)] = 6e-6  # of the decoder
    encoder_rate: Annotated[float, Field(gt=0)] = 6e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    seed: int = 0


class SegmenterTraining(Part):
    """How a segmenter is trained on a run's masks; a category's expert too, with other numbers. Those are the paper's.

    The result does not depend on the number of workers, to rounding: `batch` is that of all of them together.
    """

    encoder: str = "resnet50.dino"  # a timm network, or DINO's ResNet-50
    encoder_weights: str | None = None  # a local file instead of the published weights
    width: Annotated[int, Field(ge=16)] = 256  # channels of the head
    crop: Annotated[int, Field(ge=16)] = 384  # pixels a side
    scale: Range = (0.1, 1.0)  # of a photo's sides
    flip: Share = 0.5  # share of the views
    jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] = (0.8, 0.8, 0.8, 0.2)  # as ColorJitter
    jitter_share: Share = 0.8
    gray: Share = 0.2
    blur: Share = 0.5
    blur_sigma: Range = (0.1, 2.0)  # pixels
    copies: Annotated[tuple[int, int], Field(strict=False)] = (1, 2)  # objects pasted into a view, from, to
    batch: Positive = 16  # views a step
    accumulate: Positive = 1  # parts of the batch that go through the network one after another, to save memory
    steps: Positive = 20_000
    rate: Annotated[float, Field(gt=0)] = 5e-4  # Adam's, of the head
    encoder_rate: Annotated[float, Field(ge=0)] = 5e-5
    encoder_momentum: Annotated[float, Field(gt=0, le=1)] = 0.01  # of its BatchNorm; short trainings want a higher one
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    power: Annotated[float, Field(ge=0)] = 0.9  # rates fall as (1 - step / steps) ** power
    lowest_rate: Annotated[float, Field(ge=0)] = 1e-6
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights and sums are float32
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("copies")
    @classmethod
    def copies_go_upwards(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("expected two numbers, from and to")
        return value

    @field_validator("scale", "blur_sigma")
    @classmethod
    def ranges_go_upwards(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("expected two positive numbers, from and to")
        return value


class ExpertTraining(SegmenterTraining):
    """How category experts are trained, each on the masks of its own archive: as a segmenter, with the paper's numbers.

    A photo shows one object: nothing is pasted.
    """

    mode: Literal["separate", "shared"] = "separate"  # a network a category, or one with a last layer for each
    copies: Annotated[tuple[int, int], Field(strict=False)] = (0, 0)
    batch: Positive = 8
    steps: Positive = 5_000  # of each training

    @field_validator("copies")
    @classmethod
    def nothing_is_pasted(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value != (0, 0):
            raise ValueError("an expert's photo shows one object, so nothing is pasted: expected [0, 0]")
        return value


class CrfConfig(Part):
    """Fully connected CRF: the published weights and sigmas, and the confidence that erodes objects least."""

    iterations: Positive = 10
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.999  # that an object is one where the detector says so
    gaussian_sigma: Annotated[float, Field(gt=0)] = 3.0
    gaussian_weight: Annotated[float, Field(ge=0)] = 3.0
    bilateral_sigma: Annotated[float, Field(gt=0)] = 80.0
    color_sigma: Annotated[float, Field(gt=0)] = 13.0  # steps of 255
    bilateral_weight: Annotated[float, Field(ge=0)] = 10.0


class PamrConfig(Part):
    """Pixel-adaptive mask refinement."""

    iterations: Positive = 10
    dilations: Annotated[list[Positive], Field(min_length=1, max_length=16)] = [1, 2, 4, 8, 12, 24]


class RefineConfig(Part):
    """What makes a mask follow edges. Lengths are in pixels of a photo whose short side is 512 pixels.

    The sigmas and the smoothness are the bilateral solver's, as published.
    """

    name: Literal["bilateral", "crf", "pamr", "none"] = "bilateral"
    largest_component: bool = False  # of the detector's mask only the largest connected part is refined
    fill_holes: bool = False  # what the refined mask surrounds is object too
    sigma_spatial: Annotated[float, Field(gt=0)] = 16.0
    sigma_luma: Annotated[float, Field(ge=1)] = 16.0
    sigma_chroma: Annotated[float, Field(ge=1)] = 8.0
    smoothness: Annotated[float, Field(gt=0)] = 256.0
    crf: CrfConfig = CrfConfig()
    pamr: PamrConfig = PamrConfig()


class RunConfig(Part):
    """A whole run. `photos` is a folder, a list file or a tar; without `categories` its folders are the categories."""

    photos: str
    categories: list[str] = []
    shard_size: Positive = 64  # photos per shard of masks
    keep_detected: bool = False  # the detector's masks before refinement too, in OUT/detected
    index: IndexConfig = IndexConfig()
    archive: ArchiveConfig = ArchiveConfig()
    detector: DetectorConfig = DetectorConfig()
    refine: RefineConfig = RefineConfig()
    experts: ExpertTraining = ExpertTraining()
    segmenter: SegmenterTraining = SegmenterTraining()


def make_config(settings: dict, kind: type[SomePart] = RunConfig) -> SomePart:
    """A nested dictionary of settings -> RunConfig; UserError names each wrong value and what was expected."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg'].lower()}, got {e['input']!r}"
            for e in error.errors()
        ]
        raise UserError("wrong settings: " + "; ".join(lines)) from None


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line for each setting that differs, "detector.tau: 0.2 -> 0.3"."""

    def flat(part: dict, prefix: str = "") -> dict:
        items = {}
        for key, value in part.items():
            items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return items

    a, b = flat(old.model_dump()), flat(new.model_dump())
    return [f"{key}: {_short(a[key])} -> {_short(b[key])}" for key in a if a[key] != b[key]]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_config(path: Path, config: RunConfig, facts: dict[str, str]) -> None:
    """Writes run.toml: the settings in force and, under FACTS, versions and device, which are not compared."""
    settings = config.model_dump(exclude_none=True)
    with atomic_write(path) as file:
        file.write(tomli_w.dumps({**settings, FACTS: facts}).encode())


def read_config(path: Path) -> RunConfig:
    """The settings in run.toml; UserError when it is missing or damaged."""
    settings = _read(path)
    settings.pop(FACTS, None)
    return make_config(settings)


def read_facts(path: Path) -> dict[str, str]:
    """The versions and the device in run.toml; UserError when it is missing or damaged."""
    return _read(path).get(FACTS, {})


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not the folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
