# SPDX-License-Identifier: MIT
"""Bootstrapping: a SelfMask network trained on the masks that a run has made without it.

OUT/saliency/
  model.safetensors   the network, tensors named as in the authors' checkpoint; written last
  metrics.jsonl, tensorboard/, checkpoint.pt   see `namedmask.training`

A detector without learning errs in its own way on every photo; a network that must explain thousands of its masks
learns what they share. `keep` lets the masks with the best scores alone teach it; that these are of the easiest photos
is made good by `paste`, which puts their objects before the backgrounds of all the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..backbones import load as load_backbone
from ..config import SaliencyTraining, read_config
from ..distributed import Worker
from ..errors import UserError
from ..files import atomic_write
from ..masks import MaskRecord, digest, read_masks
from ..photos import PhotoSource
from ..progress import Progress
from ..threads import map_ahead, thread_count
from ..training import TrainingState
from .selfmask import UPSAMPLED, SelfMask
from .selfmask import load as load_selfmask

WARM_UP = 50  # steps until the learning rate is reached


def train_saliency(out: Path, settings: SaliencyTraining, device: str) -> Path:
    """Trains on the masks of the run folder `out`; goes on from a checkpoint. Returns the path of the network.

    Reads photos and pseudo-masks alone. Every step draws its photos and their augmentation from the seed and the
    number of the step, so that an interrupted training ends with the weights of one that was not.
    Raises UserError where there are no masks, or where a checkpoint is of other settings or masks.
    """
    source = PhotoSource(read_config(out / "run.toml").photos)
    records = ranked_masks(out / "masks")
    folder, path = out / "saliency", out / "saliency" / "model.safetensors"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(settings.seed)
    network = start_network(settings).to(device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": network.encoder.parameters(), "high": settings.encoder_rate},
            {
                "params": [p for n, p in network.named_parameters() if n.partition(".")[0] != "encoder"],
                "high": settings.rate,
            },
        ],
        weight_decay=settings.weight_decay,
    )
    steps = settings.steps or math.ceil(settings.epochs * teaching_count(records, settings) / settings.batch)
    about = {"settings": settings.model_dump(), "masks": digest(records)}
    with (
        Progress("train-saliency", Worker()) as progress,
        TrainingState(folder, about, network, optimizer, steps, Worker()) as state,
    ):
        progress.total = steps * settings.batch
        progress.advance(state.step * settings.batch, found=True)
        rest = range(state.step, steps)
        for step, (photos, targets) in zip(rest, batches(source, records, settings, network, rest), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["high"] * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps) ** 0.9
            dice, rank = losses(*network(photos.to(device)), targets.to(device))
            optimizer.zero_grad()
            (dice.mean() + rank).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            state.end_step(settings.batch, {"dice": dice[-1].mean().detach(), "ranking": rank.detach()})
            if state.step % 10 == 0:  # not more often: reading it makes a GPU wait
                progress.note = f"dice loss {float(dice[-1].detach().mean()):.3f}"
            progress.advance(settings.batch)
    with atomic_write(path) as file:
        file.write(save({name: value.contiguous() for name, value in network.state_dict().items()}))
    return path


def ranked_masks(folder: Path) -> list[MaskRecord]:
    """The masks of a run, the best scores first, one a photo, empty ones left out; ties by name."""
    by_photo = {record.photo: record for record in read_masks(folder) if record.area}
    if not by_photo:
        raise UserError(f"there are no masks in {folder}; make them with `namedmask-pseudolabel`")
    return sorted(by_photo.values(), key=lambda record: (-record.score, record.photo))


def teaching_count(records: list[MaskRecord], settings: SaliencyTraining) -> int:
    """How many of the ranked masks teach."""
    return max(1, round(settings.keep * len(records)))


def start_network(settings: SaliencyTraining) -> SelfMask:
    """What the training starts from: a SelfMask network, or a backbone's encoder and a decoder of random weights."""
    if settings.start is not None:
        return load_selfmask(settings.backbone, settings.start)
    encoder = load_backbone(settings.backbone, settings.backbone_weights).model.requires_grad_(True)
    return SelfMask(encoder, settings.queries, settings.layers)


def batches(
    source: PhotoSource, records: list[MaskRecord], settings: SaliencyTraining, network: SelfMask, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step photos float32 [batch, 3, S, S], normalized, and masks [batch, h, w] in [0, 1], h the decoder's.

    records: the masks, the best first, of which the share `settings.keep` teaches; every epoch goes through those in an
    order of its own. The others lend their corners as new backgrounds.
    """
    cfg = network.encoder.pretrained_cfg
    mean, std = torch.tensor(cfg["mean"]).view(3, 1, 1), torch.tensor(cfg["std"]).view(3, 1, 1)
    side = settings.crop // network.encoder.patch_embed.patch_size[0] * UPSAMPLED
    teaching = records[: teaching_count(records, settings)]
    orders: dict[int, np.ndarray] = {}

    def decode(record: MaskRecord) -> Tensor:
        return torch.from_numpy(source.decode(record.photo).pixels).permute(2, 0, 1)

    def corner(rng: np.random.Generator) -> Tensor:
        other = records[rng.integers(len(records))]
        return recolored(cropped(decode(other), corner_box(*other.size, rng), settings.crop), rng)

    def sample(place: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(place, len(teaching))
        if epoch not in orders:  # drawn alike by every thread that comes here first
            orders[epoch] = np.random.default_rng((settings.seed, 0, epoch)).permutation(len(teaching))
        record = teaching[orders[epoch][index]]
        rng = np.random.default_rng((settings.seed, 1, place))
        mask = torch.from_numpy(record.mask())[None].float()
        box = random_box(*record.size, settings.scale, rng)
        photo = recolored(cropped(decode(record), box, settings.crop), rng)
        if rng.random() < settings.texture:
            photo = photo.lerp(corner(rng), cropped(mask, box, settings.crop) * rng.uniform(0.3, 0.9))
        if rng.random() < settings.paste:
            photo = corner(rng).lerp(photo, cropped(mask, box, settings.crop))
        # Antialiased: a cell of the target is the share of it that the object covers.
        target = cropped(mask, box, side)
        return (photo.flip(2), target.flip(2)) if rng.random() < 0.5 else (photo, target)

    places = range(steps.start * settings.batch, steps.stop * settings.batch)
    loaded = map_ahead(sample, places, thread_count())
    for _ in steps:
        photos, masks = zip(*(next(loaded) for _ in range(settings.batch)), strict=True)
        yield (torch.stack(photos) - mean) / std, torch.cat(masks)


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


def recolored(photo: Tensor, rng: np.random.Generator) -> Tensor:
    """A photo uint8 [3, h, w] in other light and colors, sometimes gray: float32 [3, h, w] in [0, 1].

    Saturation and hue are one matrix on RGB, a rotation about the gray axis: a tenth of the time of a way through HSV.
    """
    gray = torch.full((3, 3), 1 / 3)
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    angle, saturation = rng.uniform(-0.6, 0.6), 0.0 if rng.random() < 0.1 else rng.uniform(0.4, 1.6)
    matrix = gray + saturation * (math.cos(angle) * (torch.eye(3) - gray) + math.sin(angle) * turn)
    pixels = matrix @ (photo.flatten(1).float() / 255)
    middle = pixels.mean()
    pixels = (pixels - middle) * rng.uniform(0.6, 1.4) + middle * rng.uniform(0.6, 1.4)
    return pixels.clamp(0, 1).view(photo.shape)


def losses(masks: Tensor, objectness: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Dice losses [layers, n, Q] of every query of every layer, and the mean ranking loss of their objectness.

    masks: logits [layers, n, Q, h, w]; objectness: logits [layers, n, Q]; targets [n, h, w] in [0, 1].
    Of two queries the one with the lower Dice loss is to have the higher objectness: softplus of the difference, over
    all such pairs.
    """
    soft, target = masks.sigmoid(), targets[:, None]
    overlap = (soft * target).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (soft.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    worse = dice.detach()[..., :, None] > dice.detach()[..., None, :]
    rank = F.softplus(objectness[..., :, None] - objectness[..., None, :])
    return dice, (rank * worse).sum() / worse.sum().clamp_min(1)
