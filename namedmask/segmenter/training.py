# SPDX-License-Identifier: MIT
"""Trains a segmenter on masks: of all categories, or as the expert of one.

OUT/segmenter/
  model.safetensors, categories.json   the network (see `deeplab`), written last
  metrics.jsonl, tensorboard/, checkpoint.pt   see `namedmask.training`; the checkpoint goes at the end

A step draws its photos and all that happens to them from the seed and the number of the step. On the CPU an interrupted
training therefore ends with the very bits of one that was not; on a GPU some of torch's gradients are not reproducible.
Several workers share each batch: BatchNorm and the loss are over all of it, so they train what one would, to rounding.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..archive import read_archive
from ..backbones import load_encoder
from ..config import SegmenterTraining
from ..distributed import Worker
from ..errors import UserError
from ..masks import MaskRecord, best_masks, digest, read_masks
from ..photos import PhotoError, PhotoSource
from ..progress import Progress
from ..threads import map_ahead, one_torch_thread, thread_count
from ..training import TrainingState, fit
from .augment import IGNORE, View, augmented, copy_paste
from .batch_norm import synchronize
from .deeplab import DeepLab, on_device, save_segmenter


class Sample(NamedTuple):
    """A photo with the mask of one object, the label of the object, and that of the rest."""

    record: MaskRecord
    label: int
    background: int = 0


def train_segmenter(
    out: Path, source: PhotoSource, settings: SegmenterTraining, worker: Worker, device: str, progress: Progress
) -> None:
    """Trains on all masks of the run folder `out`, the experts' (OUT/refined) where there are any, unless it is done.

    Class i + 1 is the i-th category of the archive. Raises UserError where there are no masks, where a finished
    segmenter is of others than are there now, or as `train` does.
    """
    folder = out / "segmenter"
    folder.mkdir(exist_ok=True)
    categories = read_archive(out / "archive.json").categories
    masks = best_masks(out)
    records = [record for record in read_masks(masks) if record.area]
    if not records:
        raise UserError(f"there are no masks in {masks}; make them with `namedmask-pseudolabel`")
    if unknown := sorted({record.category for record in records} - set(categories)):
        raise UserError(f"{masks} has masks of {', '.join(unknown)}, of which {out / 'archive.json'} knows nothing")
    samples = [Sample(record, categories.index(record.category) + 1) for record in records]
    if (folder / "model.safetensors").exists():
        if json.loads((folder / "categories.json").read_text(encoding="utf-8")).get("masks") != _digest(samples):
            raise UserError(f"{folder} was trained on other masks than {masks} has now; start anew with --overwrite")
        if worker.is_main:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        progress.note = "done before"
        return
    progress.total = settings.steps * settings.batch_size
    network = train(source, samples, len(categories) + 1, folder, settings, worker, device, progress)
    if worker.is_main:
        save_segmenter(folder, network, categories, _digest(samples))
        (folder / "checkpoint.pt").unlink()


def train(
    source: PhotoSource,
    samples: Sequence[Sample],
    classes: int,
    folder: Path,
    settings: SegmenterTraining,
    worker: Worker,
    device: str,
    progress: Progress,
    kind: type[DeepLab] = DeepLab,
) -> DeepLab:
    """A network of `kind` trained on `samples`, going on from the checkpoint in `folder`; the same in every worker.

    progress: ticks with every photo, `settings.steps * settings.batch_size` in all
    Raises UserError where the batch cannot be shared out evenly, where a photo is not what its mask was made of, or
    where the checkpoint is of other settings or samples.
    """
    if settings.batch_size % (worker.count * settings.grad_accum_steps):
        raise UserError(
            f"a batch of {settings.batch_size} cannot be split evenly among {worker.count} workers in "
            f"{settings.grad_accum_steps} parts each; choose another --batch-size or --grad-accum-steps"
        )
    if settings.batch_size // settings.grad_accum_steps < 2:
        raise UserError(
            "BatchNorm needs two photos at a time: choose a larger --batch-size or a smaller --grad-accum-steps"
        )
    torch.manual_seed(settings.seed)
    encoder = load_encoder(settings.encoder, settings.encoder_weights)
    network = kind(encoder, classes, settings.head_channels, settings.encoder_bn_momentum)
    if worker.count > 1:
        synchronize(network, device)
    network = on_device(network, device).train()
    optimizer = torch.optim.Adam(
        [
            {"params": network.backbone.parameters(), "highest": settings.encoder_lr},
            {"params": network.classifier.parameters(), "highest": settings.lr},
        ],
        weight_decay=settings.weight_decay,
        fused=True,
    )
    about = {"settings": settings.model_dump(), "samples": _digest(samples)}

    def learning_rate(step: int, highest: float) -> float:
        decayed = highest * (1 - step / settings.steps) ** settings.poly_power
        return max(decayed, min(highest, settings.min_lr))

    with worker.collective(device), TrainingState(folder, about, network, optimizer, settings.steps, worker) as state:
        shared: nn.Module = network
        if worker.count > 1:
            shared = DistributedDataParallel(network, broadcast_buffers=False)

        def step(photos: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": accumulate_gradients(shared, network, photos, labels, settings, worker)}

        remaining = batches(source, samples, settings, worker, range(state.step, settings.steps))
        fit(state, remaining, step, learning_rate, settings.batch_size, device, progress)
    return network


def accumulate_gradients(
    shared: nn.Module,
    network: DeepLab,
    photos: Tensor,
    labels: Tensor,
    settings: SegmenterTraining,
    worker: Worker,
) -> Tensor:
    """The mean loss over the labeled pixels of all workers' batches; the network gets its gradients.

    shared: `network`, or what shares its gradients among workers. photos uint8 [n, 3, S, S] and labels int32 [n, S, S]
    are this worker's. They go through it in `settings.grad_accum_steps` parts with separate BatchNorm
    statistics.
    """
    labeled = worker.sum((labels != IGNORE).sum()).clamp_min(1)
    precision = torch.autocast(photos.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    parts = list(zip(photos.chunk(settings.grad_accum_steps), labels.chunk(settings.grad_accum_steps), strict=True))
    whole = torch.zeros((), device=photos.device)
    for number, (part, truth) in enumerate(parts, 1):
        alone = worker.count > 1 and number < len(parts)  # gradients are shared with those of the last part
        with shared.no_sync() if alone else contextlib.nullcontext():
            with precision:
                found = shared(network.normalized(part))
            loss = network.loss(found, truth) / labeled
            (loss * worker.count).backward()  # sharing takes the mean over workers
        whole += loss.detach()
    return worker.sum(whole)


def batches(
    source: PhotoSource, samples: Sequence[Sample], settings: SegmenterTraining, worker: Worker, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step this worker's part of its batch: photos uint8 [n, 3, S, S] and labels int32 [n, S, S].

    Every epoch goes through the samples in an order of its own; pasted objects are of any samples, drawn uniformly.
    """

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((settings.seed, 0, epoch)).permutation(len(samples))

    def view(place: int) -> View:
        epoch, index = divmod(place, len(samples))
        rng = np.random.default_rng((settings.seed, 1, place))
        first = load_view(source, samples[order(epoch)[index]], settings, rng)
        copies = rng.integers(settings.paste_objects[0], settings.paste_objects[1] + 1)
        others = [load_view(source, samples[rng.integers(len(samples))], settings, rng) for _ in range(copies)]
        copy_paste(first, others, rng)
        return first

    places = (place for step in steps for place in worker.share(step * settings.batch_size, settings.batch_size))
    loaded = map_ahead(view, places, thread_count(), one_torch_thread)
    for _ in steps:
        photos, labels = zip(*(next(loaded) for _ in range(settings.batch_size // worker.count)), strict=True)
        yield torch.stack(photos), torch.stack(labels)


def load_view(source: PhotoSource, sample: Sample, settings: SegmenterTraining, rng: np.random.Generator) -> View:
    """A sample's photo, decoded and augmented. Raises UserError where it is not the photo that the mask is of."""
    try:
        pixels = source.decode(sample.record.photo).pixels
    except PhotoError as error:
        raise UserError(f"a photo that a mask is of cannot be used any more: {error}") from None
    if pixels.shape[:2] != sample.record.size:
        raise UserError(f"photo {sample.record.photo!r} has changed since its mask was made: it has another size")
    labels = np.where(sample.record.mask(), np.int32(sample.label), np.int32(sample.background))
    return augmented(pixels, labels, settings, rng)


def _digest(samples: Sequence[Sample]) -> str:
    """Tells one list of samples from another."""
    return digest((sample.record for sample in samples), [(sample.label, sample.background) for sample in samples])
