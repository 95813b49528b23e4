# SPDX-License-Identifier: MIT
"""Category experts: segmenters of one category each, trained on its archive's masks and then asked for better ones.

A detector without learning errs in its own way on every photo; what learns the masks of all photos of a category learns
what they share, and its answer on a photo of the archive is the new mask. Every photo shows one object and the rest is
background: nothing is pasted, and no photo of another category is a negative.

mode "separate"  one network a category, as published; workers take a category at a time
mode "shared"    one network with a last layer for each category, trained on all of them at once; a photo teaches the
                 last layer of its own category alone: one training, and one pass over the photos

OUT/experts/
  NAME.safetensors      a category's network, NAME as in a URL; in the mode "shared" all of them in shared.safetensors
  NAME/                 its metrics.jsonl, tensorboard/ and, until it is finished, checkpoint.pt (`namedmask.training`)
OUT/refining/           finished shards, until all are there
OUT/refined/00000.jsonl the records of masks/ with the experts' masks and scores; in the mode "separate" a category a
                        shard, in the mode "shared" sorted by photo. The folder is there when all of them are.

A photo that was retrieved for two categories has two records, each of its own expert. Where an expert finds nothing the
record has an empty mask and the score 0, as a detector's would: it says that the photo does not show the category, and
no training uses it. A category none of whose masks has a pixel has no expert, and keeps its records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .archive import read_archive
from .backbones import Encoder, untrained_encoder
from .config import ExpertTraining
from .distributed import Worker
from .errors import UserError
from .files import atomic_write, remove_stale
from .masks import ErrorRecord, MaskRecord, errors_path, mask_score, read_masks, write_errors, write_shard
from .photos import Photo, PhotoError, PhotoSource
from .progress import Progress
from .segmenter.augment import IGNORE
from .segmenter.deeplab import DeepLab
from .segmenter.predict import Segmenter, labels_at
from .segmenter.training import Sample, train

SHARED = "shared"
SHARD = 64  # records in a shard of the mode "shared", or a few more

ObjectLogits = Callable[[Tensor, str], Tensor]


class CategoryLayers(nn.Module):
    """The last layers of all categories, of which only those that are asked for are computed: a logit a category."""

    def __init__(self, width: int, categories: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(categories, width) * (2 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(categories))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def logits(self, features: Tensor, categories: Tensor) -> Tensor:
        """features [n, width, h, w], categories int64 [n] -> logits [n, h, w], each of the photo's own category."""
        own = torch.einsum("nchw,nc->nhw", features, self.weight[categories].to(features.dtype))
        return own + self.bias[categories].view(-1, 1, 1)


class SharedExperts(DeepLab):
    """All experts in one network, which ends in features; of them `layers` makes the logits of a category."""

    def __init__(self, encoder: Encoder, categories: int, head_channels: int, encoder_bn_momentum: float = 0.01):
        super().__init__(encoder, categories, head_channels, encoder_bn_momentum)
        self.classifier.classifier[-1] = CategoryLayers(head_channels, categories)

    @property
    def layers(self) -> CategoryLayers:
        return self.classifier.classifier[-1]

    def forward(self, photos: Tensor) -> Tensor:
        """photos normalized [n, 3, H, W] -> features [n, width, ceil(H / 4), ceil(W / 4)]."""
        return self.coarse_logits(photos)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy of each photo's own category, summed over labeled pixels; labels: see `samples_of`."""
        logits = self.layers.logits(features, labels.flatten(1).amax(1).long() // 2)
        logits = F.interpolate(logits[:, None].float(), labels.shape[1:], mode="bilinear")[:, 0]
        labeled = labels != IGNORE
        return F.binary_cross_entropy_with_logits(logits[labeled], (labels[labeled] % 2).float(), reduction="sum")


def file_name(category: str) -> str:
    """What a category's file is called, without a suffix: another for every name, and none that climbs out."""
    return quote(category, safe=" ").replace(".", "%2E")


def samples_of(records: dict[str, list[MaskRecord]], names: Sequence[str]) -> list[Sample]:
    """What teaches the experts of `names`: background is 2 k, the object 2 k + 1, where k is the category's place."""
    return [
        Sample(record, 2 * place + 1, 2 * place)
        for place, name in enumerate(names)
        for record in records[name]
        if record.area
    ]


def train_experts(
    out: Path, source: PhotoSource, settings: ExpertTraining, worker: Worker, device: str, progress: Progress
) -> None:
    """Trains the experts of the run folder `out` and writes OUT/refined, or what is left of it to do.

    Every worker calls it. On the CPU an expert's weights are those of an uninterrupted training bit for bit, with the
    same number of threads; with another, to rounding. All records are held in memory, some hundred bytes each.
    Raises UserError where no mask has a pixel, where a worker was lost, or as `train` does.
    """
    if (out / "refined").exists():
        progress.note = "done before"
        return
    records: dict[str, list[MaskRecord]] = {name: [] for name in read_archive(out / "archive.json").categories}
    for record in read_masks(out / "masks"):
        records.setdefault(record.category, []).append(record)
    if not any(record.area for one in records.values() for record in one):
        raise UserError(f"{out / 'masks'}: no mask has a pixel, so there is nothing to learn from")
    for folder in ("experts", "refining"):
        (out / folder).mkdir(exist_ok=True)
    experts = _Experts(out, source, settings, records, worker, device, progress)
    shards = experts.all_at_once() if settings.mode == SHARED else experts.one_by_one()
    worker.barrier("experts have seen every photo")
    if worker.is_main:
        if not all(experts.shard(number).exists() for number in range(shards)):
            raise UserError("a worker was lost and with it what it was at; run the same command again to go on")
        (out / "refining").rename(out / "refined")


@dataclass
class _Experts:
    out: Path
    source: PhotoSource
    settings: ExpertTraining
    records: dict[str, list[MaskRecord]]
    worker: Worker
    device: str
    progress: Progress
    empty: int = 0  # masks in which an expert has found nothing

    @property
    def views(self) -> int:
        """What a training sees."""
        return self.settings.steps * self.settings.batch_size

    def one_by_one(self) -> int:
        """A network a category; returns the number of shards."""
        names = list(self.records)
        self.progress.total = len(names) * self.views + sum(map(len, self.records.values()))
        for number in self.worker.claim("experts", len(names)):
            name, records = names[number], self.records[names[number]]
            if self.shard(number).exists():
                self.progress.advance(self.views + len(records), found=True)
            elif any(record.area for record in records):
                segmenter = Segmenter(self._expert(name, [name], Worker()), [name], self.device)
                self._refine(number, records, segmenter, lambda logits, _: logits[1] - logits[0])
            else:
                self._write(number, records, [])
                self.progress.advance(self.views + len(records), found=True)
        return len(names)

    def all_at_once(self) -> int:
        """One network; returns the number of shards."""
        names = list(self.records)
        self.progress.total = self.views + sum(map(len, self.records.values()))
        network = self._expert(SHARED, names, self.worker)
        segmenter = Segmenter(network, names, self.device)
        place = {name: torch.tensor([number], device=segmenter.device) for number, name in enumerate(names)}

        def logits(features: Tensor, name: str) -> Tensor:
            return network.layers.logits(features[None], place[name])[0]

        # By photo, so that one pass serves all categories of a photo.
        records = sorted((r for one in self.records.values() for r in one), key=lambda r: r.photo)
        shards = list(_shards(records, SHARD))
        for number in self.worker.claim("experts", len(shards)):
            if self.shard(number).exists():
                self.progress.advance(len(shards[number]), found=True)
            else:
                self._refine(number, shards[number], segmenter, logits)
        return len(shards)

    def _expert(self, name: str, categories: list[str], worker: Worker) -> DeepLab:
        """The network of a file, trained first by all of `worker`'s workers if there is none."""
        kind, classes = (SharedExperts, len(categories)) if self.settings.mode == SHARED else (DeepLab, 2)
        path = self.out / "experts" / f"{file_name(name)}.safetensors"
        journal = path.with_suffix("")
        if path.exists():
            self.progress.advance(self.views if worker.is_main else 0, found=True)
        else:
            journal.mkdir(exist_ok=True)
            if worker.is_main:
                remove_stale(journal)
            samples, part = samples_of(self.records, categories), _Part(self.progress, name)
            network = train(self.source, samples, classes, journal, self.settings, worker, self.device, part, kind)
            if worker.is_main:
                with atomic_write(path) as file:
                    file.write(save({key: tensor.contiguous() for key, tensor in network.state_dict().items()}))
            worker.barrier(f"{path.name} is written")
        if worker.is_main:
            (journal / "checkpoint.pt").unlink(missing_ok=True)
        network = kind(untrained_encoder(self.settings.encoder), classes, self.settings.head_channels)
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)

    def shard(self, number: int) -> Path:
        return self.out / "refining" / f"{number:05}.jsonl"

    def _refine(self, number: int, records: list[MaskRecord], segmenter: Segmenter, logits: ObjectLogits) -> None:
        """Writes a shard: the experts' masks in place of the records'."""
        by_photo: dict[str, list[MaskRecord]] = {}
        for record in records:
            by_photo.setdefault(record.photo, []).append(record)
        refined, errors = [], []
        for name, found in relabel(self.source, by_photo, segmenter, logits):
            if isinstance(found, PhotoError):
                errors.append(ErrorRecord(name, "experts", found.reason))
            else:
                refined += found
            self.progress.advance(len(by_photo[name]))
        self._write(number, refined, errors)

    def _write(self, number: int, records: list[MaskRecord], errors: list[ErrorRecord]) -> None:
        write_errors(errors_path(self.shard(number)), errors)
        write_shard(self.shard(number), records)
        self.empty += sum(not record.area for record in records)
        if self.empty:
            self.progress.note = f"{self.empty} masks in which an expert has found nothing"


@dataclass
class _Part:
    """The progress of a training as a part of that of the stage."""

    whole: Progress
    name: str
    total: int = 0

    def advance(self, views: int, found: bool = False) -> None:
        self.whole.advance(views, found)

    @property
    def note(self) -> str:
        return self.whole.note

    @note.setter
    def note(self, text: str) -> None:
        self.whole.note = f"{self.name}: {text}"


def relabel(
    source: PhotoSource, by_photo: dict[str, list[MaskRecord]], segmenter: Segmenter, logits: ObjectLogits
) -> Iterator[tuple[str, list[MaskRecord] | PhotoError]]:
    """The records of each photo with new masks, at the photo's own size, or what is wrong with the photo.

    logits: coarse logits or features [C, h, w] of a photo and the name of a category -> logits of its object [h, w].
    The mask is where they are above 0.
    """

    def look(photos: list[Photo]) -> list[list[MaskRecord]]:
        seen = segmenter.coarse_logits([photo.pixels for photo in photos])
        return [[new(record, one) for record in by_photo[photo.name]] for photo, one in zip(photos, seen, strict=True)]

    @torch.inference_mode()
    def new(record: MaskRecord, seen: Tensor) -> MaskRecord:
        own = logits(seen, record.category)
        mask = (labels_at(torch.stack([torch.zeros_like(own), own]), *record.size) == 1).cpu().numpy()
        score = mask_score(mask, decided(own.sigmoid()))
        return MaskRecord.from_mask(record.photo, mask, record.category, record.category_score, score)

    for batch in segmenter.each(source, by_photo, look):
        for name, photo, found in batch:
            sizes = {record.size for record in by_photo[name]}
            if isinstance(photo, Photo) and sizes != {photo.pixels.shape[:2]}:
                found = PhotoError(name, "has changed since its mask was made: it has another size")
            yield name, photo if found is None else found


def decided(soft: Tensor) -> float:
    """How sure a network is of a mask, in [0, 1]: the Dice coefficient of its probabilities [h, w] and their mask.

    Times the share of the photo's border that the mask leaves free (`mask_score`) it is the score of a relabeled mask.
    """
    hard = soft > 0.5
    return float(2 * soft[hard].sum() / (soft.sum() + hard.sum())) if hard.any() else 0.0


def _shards(records: list[MaskRecord], size: int) -> Iterator[list[MaskRecord]]:
    """Records, those of a photo beside each other, in shards of at least `size`, a photo's in one."""
    shard: list[MaskRecord] = []
    for record in records:
        if len(shard) >= size and record.photo != shard[-1].photo:
            yield shard
            shard = []
        shard.append(record)
    if shard:
        yield shard
