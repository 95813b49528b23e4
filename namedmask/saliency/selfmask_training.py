# SPDX-License-Identifier: MIT
"""Bootstrapping: a SelfMask network, trained on the masks that a run has made without it.

OUT/saliency/
  model.safetensors   the network, tensors named as in the authors' checkpoint; written last
  metrics.jsonl, tensorboard/, checkpoint.pt   see `namedmask.training`; the checkpoint is removed at the end

A detector without learning errs differently on every photo; a network that has to explain thousands of its masks learns
what they share. `keep_fraction` trains on the masks with the best scores alone. These tend to be of easy photos, which
`paste_prob` compensates for: it pastes their objects onto the backgrounds of all other photos.

The defaults are those of the paper. A photo is squeezed to a square, shrunk, placed at a uniformly random position and
padded with its mean color; then the view is recolored and blurred as in the training of a segmenter. The loss of a
photo is the sum of the Dice losses of all queries and decoder layers, at the size of the view, and of the ranking
losses of their objectness; that of a batch is the mean over its photos with an object, for a small one may vanish in a
shrunk view. `views`, `loss`, `warmup_steps` and `clip_grad_norm` select what short trainings on few photos need.

Every step derives its photos and their augmentation from the seed and the step number. On the CPU, an interrupted
training therefore ends with weights that are bit-identical to those of one that was not. Several workers share each
batch; their losses and gradients are those of the whole batch, up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF

from .. import weights as stored
from ..backbones import load as load_backbone
from ..config import SaliencyTraining, SegmenterTraining
from ..distributed import Worker
from ..errors import UserError
from ..files import make_folder
from ..masks import MaskRecord, digest, read_masks
from ..photos import PhotoSource
from ..progress import Progress
from ..review import read_review
from ..segmenter.augment import GRAY, TURN, recolored
from ..selection import Selection, select
from ..training import TrainingPhotos, TrainingState, fit, loaded_batches, trained_on
from .selfmask import SelfMask
from .selfmask import load as load_selfmask

NEAREST = TF.InterpolationMode.NEAREST_EXACT
COLORS = SegmenterTraining()  # how views with a shrunk photo are recolored and blurred


def train_saliency(
    out: Path, source: PhotoSource, settings: SaliencyTraining, worker: Worker, device: str, progress: Progress
) -> None:
    """Trains on the masks of the run folder `out`, unless that is done; continues from a checkpoint.

    It reads photos and pseudo-masks only. Every worker calls it.

    Raises:
        UserError: there are no masks; a finished network or a checkpoint is of other masks than `out` has now; the
            batch cannot be split evenly among the workers.
    """
    records = ranked_masks(out)
    folder, path = out / "saliency", out / "saliency" / "model.safetensors"
    make_folder(folder)
    about = {"settings": settings.without_files(), "masks": digest(records)}
    if path.exists():
        if trained_on(folder, f"namedmask train-saliency {out}") != about["masks"]:
            raise UserError(f"{path} was trained on other masks than {out} has now; start over with --overwrite")
        progress.note = "done before"
        return
    expect_even_batch(settings, worker.count)
    torch.manual_seed(settings.seed)
    network = initial_network(settings).to(device).train()
    decoder = [p for n, p in network.named_parameters() if n.partition(".")[0] != "encoder"]
    optimizer = torch.optim.AdamW(
        [
            {"params": network.encoder.parameters(), "highest": settings.encoder_lr},
            {"params": decoder, "highest": settings.lr},
        ],
        weight_decay=settings.weight_decay,
    )
    steps = settings.steps or math.ceil(settings.epochs * training_count(records, settings) / settings.batch_size)
    progress.total = steps * settings.batch_size
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bfloat16")

    def learning_rate(step: int, highest: float) -> float:
        return highest * min(1.0, (step + 1) / max(1, settings.warmup_steps)) * (1 - step / steps) ** 0.9

    with worker.collective(device), TrainingState(folder, about, network, optimizer, steps, worker) as state:
        shared: nn.Module = network
        if worker.count > 1:
            shared = DistributedDataParallel(network)

        def step(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            with precision:
                masks, objectness = shared(images)
            dice, rank, pairs = losses(masks.float(), objectness.float(), targets, settings.loss)
            share: Tensor | float = 1 / len(images)
            if settings.loss == "sum":  # views without an object do not count
                share = worker.count / worker.sum(shown(targets).sum()).clamp_min(1)
                dice_loss, rank_loss = dice.sum() * share, rank * share
            else:
                dice_loss = dice.mean()
                rank_loss = rank / worker.sum(pairs).clamp_min(1) * worker.count  # DDP takes the mean over the workers
            (dice_loss + rank_loss).backward()
            if settings.clip_grad_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_grad_norm)
            last = torch.stack([dice[-1].mean(1).sum().detach() * share, rank_loss.detach()])
            dice_last, ranking = worker.sum(last) / worker.count
            return {"dice": dice_last, "ranking": ranking}

        photos = TrainingPhotos(source, records, folder, progress)
        remaining = batches(photos, settings, network, worker, range(state.step, steps))
        fit(state, remaining, step, learning_rate, settings.batch_size, device, progress)
    if worker.is_main:
        stored.write(path, network)
        (folder / "checkpoint.pt").unlink()


def expect_even_batch(settings: SaliencyTraining, workers: int) -> None:
    """Raises UserError if a batch cannot be split evenly."""
    if settings.batch_size % workers:
        raise UserError(
            f"a batch of {settings.batch_size} cannot be split evenly among {workers} workers; choose another "
            "--batch-size"
        )


def ranked_masks(out: Path) -> list[MaskRecord]:
    """The non-empty masks of the detector that the review does not reject, one per photo, best scores first.

    Ties are in the order of the names.
    """
    records = select(read_masks(out / "masks"), Selection(), read_review(out))
    by_photo = {record.photo: record for record in sorted(records, key=lambda record: record.rank) if record.area}
    if not by_photo:
        raise UserError(f"there are no masks in {out / 'masks'}; make them with `namedmask-pseudolabel`")
    return sorted(by_photo.values(), key=lambda record: (-record.score, record.photo))


def training_count(records: Sequence[MaskRecord], settings: SaliencyTraining) -> int:
    """How many of the ranked masks are trained on."""
    return max(1, round(settings.keep_fraction * len(records)))


def initial_network(settings: SaliencyTraining) -> SelfMask:
    """Where training starts: a SelfMask network, or a backbone as encoder and a decoder with random weights.

    Raises:
        UserError: If weights cannot be loaded, or if views are not a whole number of patches.
    """
    if settings.init_checkpoint is not None:
        network = load_selfmask(settings.backbone, settings.init_checkpoint, "--init-checkpoint")
    else:
        encoder = load_backbone(settings.backbone, settings.backbone_weights).model.requires_grad_(True)
        network = SelfMask(encoder, settings.num_queries, settings.decoder_layers)
    patch_embed: Any = network.encoder.patch_embed
    if settings.crop_size % (patch := patch_embed.patch_size[0]):
        raise UserError(
            f"--crop-size {settings.crop_size}: expected a multiple of {patch}, the patch size of {settings.backbone!r}"
        )
    return network


def batches(
    photos: TrainingPhotos,
    settings: SaliencyTraining,
    network: SelfMask,
    worker: Worker,
    steps: range,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's part of the batch of each step.

    A photo that cannot be read is replaced by the next one.

    Args:
        photos: The photos with their masks, best first. The fraction `settings.keep_fraction` of them is trained on, in
            a new order in every epoch; the corners of all of them serve as new backgrounds.
        settings: Settings of the training.
        network: The network, for the colors that it expects.
        worker: This worker.
        steps: Numbers of the steps.

    Yields:
        photos float32 [n, 3, S, S], normalized, and masks float32 [n, S, S] in [0, 1], with S = `settings.crop_size`.
    """
    encoder: Any = network.encoder
    cfg = encoder.pretrained_cfg
    mean, std = torch.tensor(cfg["mean"]).view(3, 1, 1), torch.tensor(cfg["std"]).view(3, 1, 1)
    size = settings.crop_size
    records = photos.records
    trained = training_count(records, settings)
    orders: dict[int, np.ndarray] = {}

    def from_there(number: int, count: int) -> Iterator[int]:
        return itertools.chain(range(number, count), range(number))

    def crop(pixels: np.ndarray, box: list[int], rng: np.random.Generator) -> Tensor:
        return (relit(cropped(torch.from_numpy(pixels).permute(2, 0, 1), box, size), rng) - mean) / std

    def shrunk(pixels: np.ndarray, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        side = max(1, round(size * rng.uniform(*settings.scale)))
        top, left = (int(rng.integers(size - side + 1)) for _ in range(2))
        photo = TF.resize(torch.from_numpy(pixels).permute(2, 0, 1), [side, side], antialias=True).float() / 255
        view, target = photo.mean((1, 2)).view(3, 1, 1).repeat(1, size, size), torch.zeros(1, size, size)
        view[:, top : top + side, left : left + side] = photo
        target[:, top : top + side, left : left + side] = TF.resize(mask, [side, side], NEAREST)
        return (recolored(view, COLORS, rng) - mean) / std, target

    def corner(rng: np.random.Generator) -> Tensor:
        numbers = from_there(int(rng.integers(len(records))), len(records))
        return photos.use(numbers, lambda number, pixels: crop(pixels, corner_box(*records[number].size, rng), rng))

    def sample(place: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(place, trained)
        if epoch not in orders:  # the same in every thread that gets here first
            orders[epoch] = np.random.default_rng((settings.seed, 0, epoch)).permutation(trained)
        rng = np.random.default_rng((settings.seed, 1, place))

        def make(number: int, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
            mask = torch.from_numpy(records[number].mask())[None].float()
            if settings.views == "shrink":
                return shrunk(pixels, mask, rng)
            box = random_box(*records[number].size, settings.scale, rng)
            return crop(pixels, box, rng), cropped(mask, box, size)

        photo, mask = photos.use(from_there(int(orders[epoch][index]), trained), make)
        if rng.random() < settings.texture_prob:
            photo = photo.lerp(corner(rng), mask * rng.uniform(0.3, 0.9))
        if rng.random() < settings.paste_prob:
            photo = corner(rng).lerp(photo, mask)
        return (photo.flip(2), mask[0].flip(1)) if rng.random() < 0.5 else (photo, mask[0])

    return loaded_batches(sample, steps, settings.batch_size, worker)


def random_box(h: int, w: int, scale: tuple[float, float], rng: np.random.Generator) -> list[int]:
    """A square in a photo, [top, left, side, side], whose area is a share of the photo's in `scale`."""
    side = min(math.sqrt(rng.uniform(*scale) * h * w), h, w)
    return [int(rng.uniform(0, h - side)), int(rng.uniform(0, w - side)), max(1, int(side)), max(1, int(side))]


def corner_box(h: int, w: int, rng: np.random.Generator) -> list[int]:
    """A square in a corner of a photo, where objects seldom are."""
    side = max(1, int(min(h, w) * rng.uniform(0.3, 0.5)))
    return [int(rng.integers(2)) * (h - side), int(rng.integers(2)) * (w - side), side, side]


def cropped(image: Tensor, box: list[int], side: int) -> Tensor:
    """A square [top, left, side, side] of an image [c, H, W], resized to [c, side, side]."""
    return TF.resized_crop(image, *box, [side, side], TF.InterpolationMode.BILINEAR, antialias=True)


def relit(photo: Tensor, rng: np.random.Generator) -> Tensor:
    """A photo uint8 [3, h, w] in other light and colors, sometimes gray: float32 [3, h, w] in [0, 1].

    Saturation and hue are one matrix on RGB, a rotation about the gray axis: a tenth of the time of a way through HSV.
    """
    angle, saturation = rng.uniform(-0.6, 0.6), 0.0 if rng.random() < 0.1 else rng.uniform(0.4, 1.6)
    matrix = GRAY + saturation * (math.cos(angle) * (torch.eye(3) - GRAY) + math.sin(angle) * TURN)
    pixels = matrix @ (photo.flatten(1).float() / 255)
    middle = pixels.mean()
    pixels = (pixels - middle) * rng.uniform(0.6, 1.4) + middle * rng.uniform(0.6, 1.4)
    return pixels.clamp(0, 1).view(photo.shape)


def shown(targets: Tensor) -> Tensor:
    """Whether each target [n, S, S] shows an object, bool [n]."""
    return targets.flatten(1).any(1)


def losses(masks: Tensor, objectness: Tensor, targets: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Dice losses and the ranking loss of SelfMask.

    Of two queries of a photo and layer, the one with the lower Dice loss should have the higher objectness.

    Args:
        masks: logits [layers, n, Q, h, w].
        objectness: logits [layers, n, Q].
        targets: [n, S, S] in [0, 1].
        kind: "sum", as published: soft masks are upsampled to the size of the targets. The ranking loss of a pair of
            queries is the difference of their objectness as probabilities, if that of the worse one is higher, else 0.
            Both losses of a photo without an object are 0.
            "mean": targets are averaged to the size of the masks. The ranking loss is the softplus of the difference of
            the objectness logits.

    Returns:
        Dice losses [layers, n, Q], the sum of the ranking losses of all pairs of queries, and the number of pairs.
    """
    soft = masks.sigmoid()
    if kind == "sum":
        upsampled = F.interpolate(soft.flatten(0, 1), targets.shape[1:], mode="bilinear")
        soft, score = upsampled.unflatten(0, soft.shape[:2]), objectness.sigmoid()
        rank = F.relu(score[..., :, None] - score[..., None, :])
    else:
        targets = F.interpolate(targets[:, None], soft.shape[-2:], mode="area")[:, 0]
        rank = F.softplus(objectness[..., :, None] - objectness[..., None, :])
    overlap = torch.einsum("lnqhw,nhw->lnq", soft, targets)
    dice = 1 - (2 * overlap + 1) / (soft.sum((-2, -1)) + targets.sum((-2, -1))[:, None] + 1)
    worse = dice.detach()[..., :, None] > dice.detach()[..., None, :]
    if kind == "sum":
        dice = dice * shown(targets)[:, None]
        worse = worse & shown(targets)[:, None, None]
    return dice, (rank * worse).sum(), worse.sum()
