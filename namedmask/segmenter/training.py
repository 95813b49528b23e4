# SPDX-License-Identifier: MIT
"""Trains a segmenter on masks, either of all categories or, as an expert, of one.

OUT/segmenter/
  model.safetensors, categories.json   the network (see `deeplab`), written last
  best.safetensors   the network at its best agreement with held-out masks
  metrics.jsonl, tensorboard/, checkpoint.pt   see `namedmask.training`; the checkpoint is removed at the end

Every step derives its photos, their augmentation and their dropout from the seed and the step number. On the CPU, an
interrupted training therefore ends with weights that are bit-identical to those of one that was not; on a GPU, some of
torch's gradients are not reproducible. Several workers share each batch; BatchNorm and the loss are those of the whole
batch, so that the result does not depend on the number of workers, up to rounding.

With `score_power`, photos with better masks are drawn more often. With `ema_decay`, the network that is scored and
stored is a moving average of the one that is trained.

A share of the photos is held out: the network is not trained on them, and scored by the mean IoU of its predictions and
their masks. These masks are no ground truth, so the score is called agreement. Scoring changes nothing in the training.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..archive import read_archive
from ..backbones import load_encoder
from ..config import DeepLabTraining, SegmenterTraining
from ..distributed import Worker
from ..errors import UserError, counted
from ..evaluate.metrics import Confusion
from ..files import make_folder, name_digest
from ..mask_counts import check_mask_counts, expect_listed
from ..masks import Key, MaskRecord, best_masks, digest
from ..photos import PhotoSource
from ..progress import Progress, logger
from ..review import Verdict, current_masks, read_review, warn_of_others
from ..selection import select
from ..threads import map_ahead, thread_count, use_one_torch_thread
from ..training import MovingAverage, Scoring, TrainingPhotos, TrainingState, fit, loaded_batches, take_outdated
from .augment import IGNORE, View, augment, copy_paste, whole_view
from .batch_norm import synchronize
from .deeplab import DeepLab, on_device, read_about, save_segmenter
from .predict import upsampled_argmax

FEWEST_HELD_OUT = 20  # photos; an agreement with fewer masks says little
SCORED_SHARE = 0.1  # of the photos trained on between two scores; a forward pass takes a third of a training step


class Sample(NamedTuple):
    """A training sample: a photo with the mask of one object, which may be empty.

    Attributes:
        record: The mask and the name of the photo.
        label: Label of the object.
        background: Label of all other pixels.
        weight: How often it is drawn, relative to other samples.
        others: Further masks of the photo, of other categories, with their labels.
    """

    record: MaskRecord
    label: int
    background: int = 0
    weight: float = 1.0
    others: tuple[tuple[MaskRecord, int], ...] = ()


def train_segmenter(
    out: Path, source: PhotoSource, settings: SegmenterTraining, worker: Worker, device: str, progress: Progress
) -> None:
    """Trains on the masks of the run folder `out`, unless that is done; continues from a checkpoint.

    It uses the masks of the experts (OUT/refined) if there are any, else OUT/masks, and of those the ones that
    `settings.selection` and the review of the run keep. A share of the photos is held out (`held_out_photos`). Class
    i + 1 is the i-th category of the archive. Every worker calls it.

    Raises:
        UserError: If there are no masks, if a category has none (`check_mask_counts`), if a finished segmenter was
            trained on other masks than `out` and its review give now, or as `train` does.
    """
    folder = out / "segmenter"
    make_folder(folder)
    categories = read_archive(out / "archive.json").categories
    masks, review = best_masks(out), read_review(out)
    records = list(current_masks(out, review))
    if not records:
        raise UserError(f"there are no masks in {masks}; make them with `namedmask-pseudolabel`")
    expect_listed(records, categories, masks)
    label = {name: number for number, name in enumerate(categories, 1)}
    if worker.is_main:
        warn_of_others(out, review, (record.key for record in records))
    selected = select(records, settings.selection, review)
    used = training_records(selected, settings)
    weights = draw_weights(used, settings.score_power, review)
    others = other_masks(records, used, label) if settings.label_others else {}
    samples = [
        Sample(record, label[record.category], weight=weight, others=others.get(record.key, ()))
        for record, weight in zip(used, weights, strict=True)
    ]
    photos, note = held_out_photos(samples, settings)
    seen = [sample for sample in samples if sample.record.photo not in photos]
    held_out = [sample for sample in samples if sample.record.photo in photos]
    if worker.is_main:
        take_outdated(out, folder, training_about(settings, seen, len(categories) + 1, held_out))
    worker.barrier("an earlier segmenter is taken")
    if (folder / "model.safetensors").exists():
        remedy = f"train it again with `namedmask train {out} --overwrite`"
        if read_about(folder / "categories.json", remedy).get("masks") != samples_digest(samples):
            now = f"{masks} and review.jsonl give now" if review else f"{masks} has now"
            raise UserError(
                f"{folder} was trained on other masks than {now}; `namedmask train {out} --update` trains it again"
            )
        if worker.is_main:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        progress.note = "done before"
        return
    check_mask_counts(categories, records, selected, masks, settings.allow_empty, worker)
    progress.total = settings.steps * settings.batch_size
    if worker.is_main and note:
        logger.info(note)
    network = train(source, seen, len(categories) + 1, folder, settings, worker, device, progress, DeepLab, held_out)
    if worker.is_main:
        save_segmenter(folder, network, categories, samples_digest(samples))
        (folder / "checkpoint.pt").unlink()


def training_records(records: Iterable[MaskRecord], settings: DeepLabTraining) -> list[MaskRecord]:
    """The masks to train on, in order: all masks of the categories that have a mask that is not empty.

    Photos with an empty mask are background photos, or are left out if `settings.empty_masks` is "skip".
    """
    records = list(records)
    usable = {record.category for record in records if record.area}
    keep_empty = settings.empty_masks == "background"
    return [record for record in records if record.area or (keep_empty and record.category in usable)]


def other_masks(
    records: Iterable[MaskRecord], used: Iterable[MaskRecord], label: Mapping[str, int]
) -> dict[Key, tuple[tuple[MaskRecord, int], ...]]:
    """The masks of other categories in the photo of each mask, with their labels, by the key of the mask.

    Args:
        records: All masks of the run.
        used: Those that are trained on. The label of the others is IGNORE, also of those that the review rejects.
        label: Label of each category.
    """
    keys = {record.key for record in used}
    photos: dict[str, list[MaskRecord]] = {}
    for record in records:
        photos.setdefault(record.photo, []).append(record)
    return {
        record.key: tuple(
            (other, label[other.category] if other.key in keys else IGNORE)
            for other in together
            if other is not record and other.area and other.size == record.size
        )
        for together in photos.values()
        if len(together) > 1
        for record in together
        if record.key in keys
    }


def draw_weights(records: Sequence[MaskRecord], power: float, review: Mapping[Key, Verdict] = {}) -> list[float]:
    """How often to draw each mask: score ** power, divided by the mean of the category.

    So categories are drawn in proportion to their numbers of masks. A mask with a verdict has the mean score at least,
    so that it is drawn. Empty masks, whose score is 0, are not drawn if the power is above 0, unless all scores of the
    category are 0.

    Args:
        records: Masks of any categories.
        power: 0: all weights are 1.
        review: Verdicts by photo and category, see `namedmask.review`.
    """
    weights = [1.0] * len(records)
    places: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.category, []).append(place)
    for own in places.values():
        scores = [max(0.0, records[place].score) for place in own]
        mean = sum(scores) / len(scores)
        scores = [max(s, mean) if records[p].key in review else s for p, s in zip(own, scores, strict=True)]
        if largest := max(scores):
            # Not in numpy, whose powers differ between CPUs: weights are part of what a training is recognized by.
            powers = [(score / largest) ** power for score in scores]
            mean = sum(powers) / len(powers)
            for place, value in zip(own, powers, strict=True):
                weights[place] = value / mean
    return weights


def held_out_photos(samples: Sequence[Sample], settings: SegmenterTraining) -> tuple[set[str], str]:
    """Chooses the photos to hold out.

    Photos with a usable mask are ordered by a digest of the seed and their name, so the choice depends neither on the
    order of the samples nor on workers, and changes little when photos are added. The first `settings.held_out` of them
    are held out, of each category at most that share, rounded up; a category keeps at least one. Scoring may take at
    most `SCORED_SHARE` of the photos that are trained on in the same time, so there may be fewer.

    Args:
        samples: All samples.
        settings: Settings of the training.

    Returns:
        The names of the photos, none or at least `FEWEST_HELD_OUT`; and a line about them for the user.
    """
    if not settings.held_out:
        return set(), ""
    labels: dict[str, set[int]] = {}
    for sample in samples:
        if sample.record.area:
            labels.setdefault(sample.record.photo, set()).add(sample.label)
    every = min(settings.score_every, settings.steps)
    most = int(SCORED_SHARE * every * settings.batch_size)
    count = min(round(settings.held_out * len(labels)), most)
    left = Counter(label for own in labels.values() for label in own)
    kept = {label: max(1, number - math.ceil(settings.held_out * number)) for label, number in left.items()}
    chosen: set[str] = set()
    for photo in sorted(labels, key=lambda name: name_digest(f"{settings.seed} {name}")):
        if len(chosen) < count and all(left[label] > kept[label] for label in labels[photo]):
            chosen.add(photo)
            left.subtract(labels[photo])
    if len(chosen) >= FEWEST_HELD_OUT:
        return chosen, f"held out: {len(chosen)} of {len(labels)} photos, scored every {counted(every, 'step')}"
    if most < FEWEST_HELD_OUT:
        steps = f"{counted(every, 'step')} of {counted(settings.batch_size, 'photo')}"
        why = f"every {steps}, at most {most} could be scored (--score-every)"
    else:
        why = f"it would be {len(chosen)} of {len(labels)} (--held-out)"
    return set(), f"no photo is held out: at least {FEWEST_HELD_OUT} are needed, and {why}"


def train(
    source: PhotoSource,
    samples: Sequence[Sample],
    classes: int,
    folder: Path,
    settings: DeepLabTraining,
    worker: Worker,
    device: str,
    progress: Progress,
    network_type: type[DeepLab] = DeepLab,
    held_out: Sequence[Sample] = (),
) -> DeepLab:
    """Trains a network, continuing from the checkpoint in `folder` if there is one. Every worker calls it.

    Args:
        source: The photos.
        samples: The training samples.
        classes: Number of classes, including the background.
        folder: Existing folder for metrics and the checkpoint.
        settings: Settings of the training.
        worker: This worker.
        device: "cpu", or this worker's GPU as torch names it.
        progress: Advances with every photo, by `settings.steps * settings.batch_size` in all.
        network_type: Class of the network.
        held_out: Samples on which the network is scored every `settings.score_every` steps. The best network is kept in
            `folder`/best.safetensors.

    Returns:
        The trained network, or the average of its weights (`settings.ema_decay`), the same in every worker.

    Raises:
        UserError: If the batch cannot be split evenly, if no photo of a category can be used any more, or if the
            checkpoint is of other settings or samples.
    """
    expect_even_batch(settings, worker.count)
    network = initial_network(settings, classes, network_type)
    if worker.count > 1:
        synchronize(network, device)
    network = on_device(network, device).train()
    average = None
    if isinstance(settings, SegmenterTraining) and settings.ema_decay:
        average = MovingAverage(network, settings.ema_decay)
    result = average.network if average else network
    optimizer = torch.optim.Adam(
        [
            {"params": network.backbone.parameters(), "highest": settings.encoder_lr},
            {"params": network.classifier.parameters(), "highest": settings.lr},
        ],
        weight_decay=settings.weight_decay,
        fused=True,
    )
    about = training_about(settings, samples, classes, held_out)
    scoring = None
    if isinstance(settings, SegmenterTraining) and held_out:
        unseen = TrainingPhotos(source, [sample.record for sample in held_out], folder, progress)
        score = functools.partial(agreement, result, unseen, held_out, settings, worker, device)
        scoring = Scoring(score, settings.score_every)

    def learning_rate(step: int, highest: float) -> float:
        decayed = highest * (1 - step / settings.steps) ** settings.poly_power
        return max(decayed, min(highest, settings.min_lr))

    with (
        worker.collective(device),
        TrainingState(folder, about, network, optimizer, settings.steps, worker, scoring, average) as state,
    ):
        parallel = DistributedDataParallel(network) if worker.count > 1 else None

        def step(photos: Tensor, labels: Tensor) -> dict[str, Tensor]:
            first = worker.share(state.step * settings.batch_size, settings.batch_size).start
            return {"loss": accumulate_gradients(network, parallel, photos, labels, settings, worker, first)}

        photos = TrainingPhotos(source, [sample.record for sample in samples], folder, progress)
        remaining = batches(photos, samples, settings, worker, range(state.step, settings.steps))
        fit(state, remaining, step, learning_rate, settings.batch_size, device, progress)
        if state.latest and state.best:
            progress.note = f"{state.note()}; best {state.best.value:.3f} after step {state.best.step}"
    return result


def training_about(
    settings: DeepLabTraining, samples: Sequence[Sample], classes: int, held_out: Sequence[Sample] = ()
) -> dict:
    """What a network depends on, as for `TrainingState`."""
    about = {"settings": settings.without_files(), "masks": samples_digest(samples), "classes": classes}
    return {**about, "held_out": samples_digest(held_out)} if held_out else about


@torch.inference_mode()
def agreement(
    network: DeepLab,
    photos: TrainingPhotos,
    samples: Sequence[Sample],
    settings: DeepLabTraining,
    worker: Worker,
    device: str,
) -> float | None:
    """Mean IoU of the predictions of a network and the masks of samples. Every worker calls it and scores a share.

    Photos are scored whole, reduced to the size of the training views (`whole_view`). The IoU of a class is that over
    all samples; the mean is over the background and the categories that are in a mask or predicted.

    Args:
        network: The network. It is in the same mode before and after.
        photos: The photos of the samples. Those that cannot be read are reported and left out.
        samples: The samples.
        settings: Settings of the training.
        worker: This worker.
        device: "cpu", or this worker's GPU as torch names it.

    Returns:
        A number in [0, 1], the same for every worker; None if no photo can be read. On the CPU, it is the same for any
        number of workers with the same network, up to rounding.
    """
    size, batch = settings.crop_size, settings.batch_size // settings.grad_accum_steps // worker.count

    def load(number: int) -> View | None:
        return photos.use_one(number, lambda chosen, pixels: whole_view(pixels, labels_of(samples[chosen]), size))

    views = map_ahead(load, worker.share(0, len(samples)), thread_count(), use_one_torch_thread)
    readable = (view for view in views if view is not None)
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    confusion = Confusion(network.classes, ignore=IGNORE)
    mode = network.training
    network.eval()
    while part := list(itertools.islice(readable, max(1, batch))):
        with precision:
            logits = network.coarse_logits(network.normalized(torch.stack([view.photo for view in part]).to(device)))
        for own, view in zip(logits.float(), part, strict=True):
            confusion.add(upsampled_argmax(own, size, size).cpu().numpy(), view.labels.numpy())
    network.train(mode)
    confusion.counts = worker.sum(torch.from_numpy(confusion.counts).to(device)).cpu().numpy()
    score = confusion.metrics().mean_iou
    return None if math.isnan(score) else score


def expect_even_batch(settings: DeepLabTraining, workers: int) -> None:
    """Raises UserError if a batch cannot be split evenly, or into parts of at least two photos."""
    if settings.batch_size % (workers * settings.grad_accum_steps):
        raise UserError(
            f"a batch of {settings.batch_size} cannot be split evenly among {counted(workers, 'worker')} in "
            f"{counted(settings.grad_accum_steps, 'part')} each; choose another --batch-size or --grad-accum-steps"
        )
    if settings.batch_size // settings.grad_accum_steps < 2:
        raise UserError(
            "BatchNorm needs two photos at a time: choose a larger --batch-size or a smaller --grad-accum-steps"
        )


def initial_network(settings: DeepLabTraining, classes: int, network_type: type[DeepLab] = DeepLab) -> DeepLab:
    """The network with which a training starts. Raises UserError if its encoder or weights cannot be loaded."""
    torch.manual_seed(settings.seed)
    encoder = load_encoder(settings.encoder, settings.encoder_weights)
    network = network_type(
        encoder,
        classes,
        settings.head_channels,
        settings.encoder_bn_momentum,
        settings.dropout,
        settings.dilations,
    )
    if isinstance(settings, SegmenterTraining):
        network.background_weight = settings.background_weight
    return network


def accumulate_gradients(
    network: DeepLab,
    parallel: DistributedDataParallel | None,
    photos: Tensor,
    labels: Tensor,
    settings: DeepLabTraining,
    worker: Worker,
    first: int = 0,
) -> Tensor:
    """Computes the gradients of a batch in `settings.grad_accum_steps` parts, which have separate BatchNorm statistics.

    Args:
        network: The network, which receives the gradients.
        parallel: Wraps `network` to average gradients over the workers; None for a single worker.
        photos: This worker's part of the batch, uint8 [n, 3, S, S].
        labels: Its labels, int32 [n, S, S].
        settings: Settings of the training.
        worker: This worker.
        first: Number of the first photo among all photos of the training. Dropout of a photo depends on its number and
            `settings.seed` only.

    Returns:
        The weighted mean loss over the labeled pixels of all workers, float32 scalar.
    """
    discount = (1 - network.background_weight) * (labels == 0).sum()
    labeled = worker.sum((labels != IGNORE).sum() - discount).clamp_min(1)
    precision = torch.autocast(photos.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    parts = list(zip(photos.chunk(settings.grad_accum_steps), labels.chunk(settings.grad_accum_steps), strict=True))
    total = torch.zeros((), device=photos.device)
    for number, (photos_part, labels_part) in enumerate(parts, 1):
        is_last = number == len(parts)  # gradients are averaged over the workers once, with the last part
        numbers = range(first, first + len(photos_part))
        first = numbers.stop
        network.classifier.aspp.dropout.seeds = [dropout_seed(settings.seed, number) for number in numbers]
        with parallel.no_sync() if parallel is not None and not is_last else contextlib.nullcontext():
            with precision:
                logits = (network if parallel is None else parallel)(network.normalized(photos_part))
            loss = network.loss(logits, labels_part) / labeled
            (loss * worker.count).backward()  # DDP takes the mean over the workers
        total += loss.detach()
    return worker.sum(total)


def dropout_seed(seed: int, number: int) -> int:
    """Seed of the dropout of a photo, from the seed of the training and the number of the photo in it."""
    return int(np.random.SeedSequence((seed, 2, number)).generate_state(1, np.uint64)[0])


def batches(
    photos: TrainingPhotos, samples: Sequence[Sample], settings: DeepLabTraining, worker: Worker, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's part of the batch of each step.

    Every epoch has a new order of the samples. If their weights differ, a sample with a weight of w times the mean is
    in it about w times: rounded up or down at random, so that w is the mean over the epochs. Pasted objects are from
    samples drawn at random from those with a mask that is not empty, likewise by weight; the other objects of their
    photos are not pasted. A sample whose photo cannot be read is replaced by the next one with the same label, one with
    an object by one with an object.

    Args:
        photos: The photos of the samples.
        samples: The training samples.
        settings: Settings of the training.
        worker: This worker.
        steps: Numbers of the steps.

    Yields:
        photos uint8 [n, 3, S, S] and labels int32 [n, S, S].
    """

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((settings.seed, 0, epoch))
        if even:
            return rng.permutation(len(samples))
        return rng.permutation(at(weights, (np.arange(len(samples)) + rng.random()) / len(samples)))

    weights = np.array([sample.weight for sample in samples])
    even = len(np.unique(weights)) == 1
    with_object = np.array([number for number, sample in enumerate(samples) if sample.record.area])
    alike: dict[tuple[int, bool], list[int]] = {}
    places = []  # of each sample among those that are alike
    for number, sample in enumerate(samples):
        group = alike.setdefault((sample.label, sample.record.area > 0), [])
        places.append(len(group))
        group.append(number)

    def load_view(number: int, rng: np.random.Generator) -> View:
        label, place = samples[number].label, places[number]
        group = alike[label, samples[number].record.area > 0]
        candidates = itertools.chain(itertools.islice(group, place, None), itertools.islice(group, place))
        if not samples[number].record.area:
            candidates = itertools.chain(candidates, alike.get((label, True), ()))
        return photos.use(candidates, lambda chosen, pixels: make_view(samples[chosen], pixels, settings, rng))

    def pasted(rng: np.random.Generator) -> int:
        if even:
            return int(with_object[rng.integers(len(with_object))])
        return int(with_object[at(weights[with_object], rng.random())])

    def load_object(rng: np.random.Generator) -> View:
        number = pasted(rng)
        view = load_view(number, rng)
        return View(view.photo, view.labels.where(view.labels == samples[number].label, 0))

    def load(number: int) -> View:
        epoch, index = divmod(number, len(samples))
        rng = np.random.default_rng((settings.seed, 1, number))
        view = load_view(order(epoch)[index], rng)
        count = rng.integers(settings.paste_objects[0], settings.paste_objects[1] + 1)
        copy_paste(view, [load_object(rng) for _ in range(count)], rng)
        return view

    return loaded_batches(load, steps, settings.batch_size, worker)


def at(weights: np.ndarray, positions: np.ndarray | float) -> np.ndarray:
    """Which of several weights is at each position, in [0, 1) of their sum, if they are laid end to end."""
    ends = np.cumsum(weights)
    return np.searchsorted(ends[:-1], np.asarray(positions) * ends[-1], side="right")


def make_view(sample: Sample, pixels: np.ndarray, settings: DeepLabTraining, rng: np.random.Generator) -> View:
    """Augments the photo of a sample, uint8 [H, W, 3], and its labels."""
    return augment(pixels, labels_of(sample), settings, rng)


def labels_of(sample: Sample) -> np.ndarray:
    """The labels of the pixels of a sample's photo, int32 [H, W].

    The mask of the sample covers the others, so that a sample always teaches its category. Where others overlap, the
    label is IGNORE.
    """
    labels = np.full(sample.record.size, np.int32(sample.background))
    covered = np.zeros(sample.record.size, bool)
    for record, label in sample.others:
        other = record.mask()
        labels[other] = np.where(covered[other], np.int32(IGNORE), np.int32(label))
        covered |= other
    return np.where(sample.record.mask(), np.int32(sample.label), labels)


def samples_digest(samples: Sequence[Sample]) -> str:
    """A digest of the samples."""
    weights = [sample.weight for sample in samples]
    about: list[object] = [(sample.label, sample.background) for sample in samples]
    about += [digest(*zip(*sample.others, strict=True)) for sample in samples if sample.others]
    return digest((sample.record for sample in samples), about + (weights if set(weights) - {1.0} else []))
