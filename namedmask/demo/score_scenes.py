# SPDX-License-Identifier: MIT
"""Scores the segmenter of the demo on scenes of one to three objects, which no stage of the pipeline has seen.

- `segmenter_miou`: mean IoU over the kinds and the background, from one confusion matrix over all scenes, with the
  test-time augmentation `AUGMENTATION`.
- `pseudo_miou`: the same for pseudo-labels of the scenes: the refined mask of the detector with the most likely kind
  according to CLIP, one mask and one kind for each scene.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..archive import Archive, Retrieved, prompts
from ..config import RunConfig
from ..distributed import Worker, count_gpus
from ..evaluate.folders import as_json
from ..evaluate.metrics import Confusion
from ..formats import BACKGROUND
from ..index import make_embedder
from ..masks import read_masks
from ..photos import PhotoError, PhotoSource
from ..progress import Progress
from ..pseudolabel import pseudolabel
from ..record import read_config
from ..segmenter.predict import Segmenter
from ..threads import map_ahead, thread_count
from .scenes import KINDS, evaluation_scene

SHOWN = 16
# The training reduces photos to .4 to 1 of their size: a pass at .75 adds what one at 1 misses, and one at 1.25 finds
# more of the smaller objects in scenes of several (bench/ABLATIONS.md).
AUGMENTATION: dict[str, Any] = {"scales": (0.75, 1.0, 1.25), "horizontal_flip": True}


class ShownScene(NamedTuple):
    """A scene for the contact sheet, uint8 [H, W, 3], with labels uint8 [H, W]: 0 or 1 + the index of the kind."""

    image: np.ndarray
    pseudo: np.ndarray
    segmented: np.ndarray
    truth: np.ndarray


def render_scenes(folder: Path, seed: int, count: int) -> list[np.ndarray]:
    """Renders evaluation scenes as 00000.png, ... and returns their true labels, uint8 [H, W], as in `ShownScene`."""

    def draw(number: int) -> np.ndarray:
        scene = evaluation_scene(seed, number)
        Image.fromarray(scene.image).save(folder / f"{number:05}.png", compress_level=1)
        truth = np.zeros(scene.image.shape[:2], np.uint8)
        for mask, kind in zip(scene.masks, scene.kinds, strict=True):
            truth[mask] = 1 + KINDS.index(kind)
        return truth

    return list(map_ahead(draw, range(count), thread_count()))


def score_scenes(out: Path, seed: int, count: int) -> tuple[dict[str, dict], list[ShownScene]]:
    """Scores the segmenter of a run folder.

    Args:
        out: Run folder of the demo.
        seed: Seed of the scenes.
        count: Number of scenes.

    Returns:
        The figures, as in demo.json, and scenes for the contact sheet.
    """
    config = read_config(out)
    device = "cuda" if count_gpus(None, 1) else "cpu"
    with tempfile.TemporaryDirectory() as folder, Progress("scenes", Worker()) as progress:
        photos = Path(folder, "photos")
        photos.mkdir()
        progress.total = 2 * count
        truth = render_scenes(photos, seed, count)
        source = PhotoSource(str(photos))
        names = [f"{number:05}.png" for number in range(count)]
        figures: dict[str, dict] = {}
        first: dict[str, list[np.ndarray]] = {}
        for key, predictions in (
            ("pseudo_miou", _pseudo_labels(source, names, config, Path(folder, "masks"), device)),
            ("segmenter_miou", _segmented(source, names, out / "segmenter", device)),
        ):
            confusion, first[key] = Confusion(len(KINDS) + 1), []
            for labels, true in zip(predictions, truth, strict=True):
                confusion.add(labels, true)
                if len(first[key]) < SHOWN:
                    first[key].append(labels)
                progress.advance(1)
            metrics = as_json(confusion, (BACKGROUND, *KINDS), count)
            figures[key] = {"mean": metrics["mean_iou"], "per_category": metrics["iou"]}
        images = [source.decode(name).pixels for name in names[:SHOWN]]
        shown = [ShownScene(*row) for row in zip(images, *first.values(), truth, strict=False)]
    return figures, shown


def _segmented(source: PhotoSource, names: list[str], weights: Path, device: str) -> Iterator[np.ndarray]:
    segmenter = Segmenter.load(weights, device=device, **AUGMENTATION)
    order = [0, *(1 + KINDS.index(name) for name in segmenter.names[1:])]
    for batch in segmenter.segment(source, names):
        for _, _, mask in batch:
            yield np.array(order)[mask]


def _pseudo_labels(
    source: PhotoSource, names: list[str], config: RunConfig, folder: Path, device: str
) -> Iterator[np.ndarray]:
    """The masks that the pipeline computes if the archive has each scene under its most likely kind, in label maps."""
    clip = make_embedder(config.index, device)
    text = clip.texts(KINDS, prompts())
    photos: dict[str, list[Retrieved]] = {kind: [] for kind in KINDS}
    for name, embedding in clip.images(source, [names]):
        if isinstance(embedding, PhotoError):
            raise embedding
        similarity = text @ embedding
        photos[KINDS[int(similarity.argmax())]].append(Retrieved(name, float(similarity.max())))
    folder.mkdir()
    config = config.model_copy(update={"pseudolabel": config.pseudolabel.model_copy(update={"keep_detected": False})})
    pseudolabel(source, Archive(list(KINDS), photos), folder, config, Worker(), device, lambda *_, **__: None)
    for record in sorted(read_masks(folder), key=lambda record: record.photo):
        yield record.mask() * np.uint8(1 + KINDS.index(record.category))
