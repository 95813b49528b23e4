# SPDX-License-Identifier: MIT
"""Category experts: one binary segmenter per category, trained on its archive's masks, which it then replaces.

A detector without learning errs differently on every photo; a network that has to explain all masks of a category
learns what they share, and its prediction for a photo of the archive is the new mask. Every photo shows one object, and
everything else is background: no objects are pasted, and photos of other categories do not serve as negatives.

mode "separate"  one network per category, as published; workers claim one category at a time
mode "shared"    one network with an output layer per category, trained on all categories together. Each photo trains
                 the output layer of its own category only: one training, and one forward pass per photo

OUT/experts/
  NAME.safetensors      network of a category, NAME percent-encoded; in the mode "shared" a single shared.safetensors
  NAME/                 metrics.jsonl, tensorboard/, *.errors.jsonl and, until the training is finished, checkpoint.pt
                        (see `namedmask.training`)
OUT/refining/           finished shards, until all are finished
OUT/refined/00000.jsonl the records of masks/ with the experts' masks and scores; in the mode "separate" one category
                        per shard, in the mode "shared" sorted by photo. The folder appears when all are finished.

With --select name, a mask of an expert replaces that of the detector only where the two hardly overlap and CLIP finds
the name of the category more likely inside it (`namedmask.names`). Else the record of the detector stays as it is, with
its score. The score of an expert's mask is the mean of three numbers in [0, 1]: the score of the detector's mask, the
IoU of the two, and the certainty of the expert times the share of the photo's border that its mask leaves free.

A photo that was retrieved for two categories has two records, one from each expert. If an expert predicts no object,
the record has an empty mask and the score 0, like that of a detector: the photo does not show the category. Trainings
use such photos as background, or leave them out if `empty_masks` is "skip". A category whose masks are all empty is an
error, or with `allow_empty` has no expert and keeps its records.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from namedmask_kernels import Ragged

from . import weights as stored
from .archive import read_archive
from .backbones import Encoder, untrained_encoder
from .config import ExpertTraining
from .distributed import Worker
from .errors import DamagedFile, UserError, counted, listed
from .files import atomic_write, fitted, make_folder, outdated_folders, remove_empty, remove_stale
from .mask_counts import check_mask_counts, expect_listed, show_mask_counts
from .masks import (
    RESIZED,
    EncodedMask,
    ErrorRecord,
    MaskRecord,
    encode_masks,
    errors_path,
    is_refined,
    mask_iou,
    read_masks,
    read_shard,
    write_errors,
    write_shard,
)
from .names import NameScorer
from .photos import Photo, PhotoError, PhotoSource
from .progress import Progress, warn
from .review import read_review, warn_of_others
from .segmenter.augment import IGNORE
from .segmenter.deeplab import DILATIONS, DeepLab
from .segmenter.predict import Segmenter, upsampled_argmax
from .segmenter.training import Sample, samples_digest, train, training_about, training_records
from .selection import select
from .training import take_outdated, trained_on

SHARED = "shared"
# Counters of all workers: networks from before an update, and masks that this command has written.
KEPT, KEPT_MASKS, EMPTY_MASKS = "experts/kept", "experts/kept masks", "experts/empty masks"
SHARD_SIZE = 64  # minimum number of records in a shard of the mode "shared", except for the last

# With --select name, an expert's mask replaces the detector's if their IoU is below MOST_OVERLAP, so one of them has
# missed the object, and if the probability of the category inside the expert's is higher by MARGIN.
MOST_OVERLAP = 0.1
MARGIN = 0.1
ObjectLogits = Callable[[Tensor, str], Tensor]  # coarse output [C, h, w] and category -> logits of the object [h, w]


class CategoryLayers(nn.Module):
    """One linear output layer per category, evaluated only for the categories that are requested.

    Args:
        in_channels: Channels of the features.
        categories: Number of categories.
    """

    def __init__(self, in_channels: int, categories: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(categories, in_channels) * (2 / in_channels) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(categories))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features unchanged."""
        return x

    def logits(self, features: Tensor, categories: Tensor) -> Tensor:
        """Logits of one category per photo.

        Args:
            features: [n, in_channels, h, w].
            categories: Index of the category of each photo, int64 [n].

        Returns:
            [n, h, w].
        """
        logits = torch.einsum("nchw,nc->nhw", features, self.weight[categories].to(features.dtype))
        return logits + self.bias[categories].view(-1, 1, 1)


class SharedExperts(DeepLab):
    """All experts as one network: a shared encoder and head with an output layer per category.

    Args:
        encoder: The encoder.
        categories: Number of categories.
        head_channels: Channels of the head.
        encoder_bn_momentum: Momentum of the encoder's BatchNorm statistics.
        dropout: Probability of dropout after the ASPP projection, in training mode.
        dilations: Dilations of the ASPP.
    """

    def __init__(
        self,
        encoder: Encoder,
        categories: int,
        head_channels: int,
        encoder_bn_momentum: float = 0.01,
        dropout: float = 0.1,
        dilations: Sequence[int] = DILATIONS,
    ):
        super().__init__(encoder, categories, head_channels, encoder_bn_momentum, dropout, dilations)
        self.classifier.classifier[-1] = CategoryLayers(head_channels, categories)

    @property
    def layers(self) -> CategoryLayers:
        """The output layers, which turn the features that `forward` returns into logits."""
        layers = self.classifier.classifier[-1]
        assert isinstance(layers, CategoryLayers)
        return layers

    def forward(self, photos: Tensor) -> Tensor:
        """Features that all categories share.

        Args:
            photos: Normalized photos [n, 3, H, W].

        Returns:
            [n, head_channels, ceil(H / 4), ceil(W / 4)].
        """
        return self.coarse_logits(photos)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy of the category of each photo, summed over the labeled pixels.

        Args:
            features: The output of `forward`.
            labels: int32 [n, H, W]. Of category k, background has the label 2 k and the object 2 k + 1, as in
                `expert_samples`; pixels with the label IGNORE are left out.

        Returns:
            float32 scalar.
        """
        logits = self.layers.logits(features, labels.flatten(1).amax(1).long() // 2)
        logits = F.interpolate(logits[:, None].float(), labels.shape[1:], mode="bilinear")[:, 0]
        labeled = labels != IGNORE
        return F.binary_cross_entropy_with_logits(logits[labeled], (labels[labeled] % 2).float(), reduction="sum")


def file_name(category: str) -> str:
    """File name of a category, without a suffix. It is unique and never leads out of its folder.

    Names that are too long, such as those of 30 Chinese characters, end with a digest.
    """
    return fitted(quote(category, safe=" ", errors="surrogatepass").replace(".", "%2E"), 200)


def expert_samples(
    records: dict[str, list[MaskRecord]], names: Sequence[str], settings: ExpertTraining
) -> list[Sample]:
    """The training samples of experts.

    Args:
        records: Selected masks by category.
        names: Categories of the experts that share a network.
        settings: Settings of the training.

    Returns:
        The masks of each category to train on (`training_records`). Of the k-th category, background has the label 2 k
        and the object 2 k + 1.
    """
    return [
        Sample(record, 2 * index + 1, 2 * index)
        for index, name in enumerate(names)
        for record in training_records(records[name], settings)
    ]


def network_path(out: Path, name: str) -> Path:
    """File of the network of a category, or of `SHARED`."""
    return out / "experts" / f"{file_name(name)}.safetensors"


def expect_imported_networks(out: Path) -> None:
    """Raises UserError if the imported network of a category is missing: training it would mix both kinds."""
    for name in read_archive(out / "archive.json").categories:
        if not network_path(out, name).exists():
            raise UserError(
                f"{network_path(out, name)}, the imported network of {name!r}, is missing; import the networks again "
                "with `namedmask import experts` and --overwrite"
            )


def train_experts(
    out: Path,
    source: PhotoSource,
    settings: ExpertTraining,
    worker: Worker,
    device: str,
    progress: Progress,
    imported: bool = False,
    scorer: Callable[[], NameScorer] | None = None,
) -> None:
    """Trains the experts of the run folder `out` and writes OUT/refined; continues where it was interrupted.

    It trains on the masks of the detector that `settings.selection` and the review of the run keep, and relabels all
    photos. A warning says which finished networks were trained on other masks. With `imported`, OUT/experts holds a
    network of every category already. Nothing is trained, and categories without a usable mask are relabeled too. A
    `scorer`, which is created where it is needed, helps to decide which masks the experts replace (`relabel`).

    Every worker calls it. On the CPU, an interrupted training ends with weights that are bit-identical to those of one
    that was not, with the same number of threads; with another number, they are equal up to rounding. All records are
    held in memory, some hundred bytes each.

    Raises:
        UserError: If a category has no usable mask (`check_mask_counts`), if a worker died, or as
            `segmenter.training.train` does.
    """
    if is_refined(out) and not (out / "masks").is_dir():
        progress.note = "done before"
        return
    masks, categories = list(read_masks(out / "masks")), read_archive(out / "archive.json").categories
    expect_listed(masks, categories, out / "masks")
    review = read_review(out)
    if worker.is_main:
        warn_of_others(out, review, (record.key for record in masks))
    selected = select(masks, settings.selection, review)
    records, training = _by_category(masks, categories), _by_category(selected, categories)
    experts = _Experts(out, source, settings, records, training, worker, device, progress, imported, scorer)
    if worker.is_main and not imported:
        experts.warn_of_other_masks()
    if worker.is_main and is_refined(out):
        names = [experts.shard(number).name for number in range(experts.shard_count())]
        if not all((out / "refined" / name).exists() for name in names):  # one was deleted because it was damaged
            _move_shards(out / "refined", out / "refining")
    worker.barrier("experts continue or are done")
    if is_refined(out):
        progress.note = "done before"
        return
    if not imported:
        check_mask_counts(list(records), masks, selected, out / "masks", settings.allow_empty, worker)
    for folder in ("experts", "refining"):
        make_folder(out / folder)
    if settings.mode == SHARED:
        experts.train_shared()
    else:
        experts.train_separate()
    worker.barrier("all photos are relabeled")
    if worker.is_main:
        networks, kept, empty = (worker.count_done(name, 0) for name in (KEPT, KEPT_MASKS, EMPTY_MASKS))
        counts = [f"{counted(networks, 'network')} kept"] if networks else []
        counts += [f"{counted(kept, 'mask')} of the detector kept"] if kept else []
        counts += [counted(empty, "empty mask")] if empty else []
        progress.note = ", ".join(counts)
        if not all(experts.shard(number).exists() for number in range(experts.shard_count())):
            raise UserError("a worker died before it finished its shard; run the same command again to continue")
        _move_shards(out / "refining", out / "refined")
        show_mask_counts(list(records), list(read_masks(out / "refined")), out / "refined")


def _by_category(records: Iterable[MaskRecord], categories: Sequence[str]) -> dict[str, list[MaskRecord]]:
    """The masks of each of these categories, in order."""
    grouped: dict[str, list[MaskRecord]] = {name: [] for name in categories}
    for record in records:
        grouped[record.category].append(record)
    return grouped


def _move_shards(source: Path, target: Path) -> None:
    """Moves a folder of shards. If it is killed, `is_refined` is false and `source` still has all shards.

    Either may be a link to a folder, perhaps on another disk, and stays one.
    """
    if not source.is_symlink() and not target.is_symlink() and not (target.exists() and any(target.iterdir())):
        source.rename(target)
        return
    make_folder(target)
    paths = sorted(source.glob("*.jsonl"), reverse=True)  # the errors of a shard after it
    for path in paths[::-1]:
        with atomic_write(target / path.name) as file:
            file.write(path.read_bytes())
    for path in paths:
        path.unlink()
    remove_empty(source, source.parent)


@dataclass
class _Experts:
    out: Path
    source: PhotoSource
    settings: ExpertTraining
    records: dict[str, list[MaskRecord]]  # all masks, by category
    selected: dict[str, list[MaskRecord]]  # those to train on
    worker: Worker
    device: str
    progress: Progress
    imported: bool
    make_scorer: Callable[[], NameScorer] | None
    empty: int = 0  # masks of the result that are empty
    kept: int = 0  # masks of the detector in the result

    @property
    def views(self) -> int:
        """Number of photos that a training processes."""
        return 0 if self.imported else self.settings.steps * self.settings.batch_size

    def shard_count(self) -> int:
        return len(self._shared_shards() if self.settings.mode == SHARED else self.records)

    def warn_of_other_masks(self) -> None:
        """Warns of finished networks that were trained on other masks than are selected now."""
        names = list(self.records)
        networks = {SHARED: names} if self.settings.mode == SHARED else {name: [name] for name in names}
        changed = []
        for name, categories in networks.items():
            path = network_path(self.out, name)
            if path.exists() and not self._is_half_taken(path):
                samples = expert_samples(self.selected, categories, self.settings)
                if trained_on(path.with_suffix(""), f"namedmask experts {self.out}") != samples_digest(samples):
                    changed.append(path.name)
        if changed:
            warn(
                f"{listed(changed)} in {self.out / 'experts'}: trained on other masks than {self.out / 'masks'} and "
                "review.jsonl give now; start over with --overwrite to train on these"
            )

    def _is_half_taken(self, path: Path) -> bool:
        """Whether `take_outdated` was killed before it moved the metrics, after this network."""
        has_metrics = self.imported or (path.with_suffix("") / "metrics.jsonl").exists()
        return not has_metrics and bool(outdated_folders(self.out))

    def _shared_shards(self) -> list[list[MaskRecord]]:
        """Sorted by photo, so that one forward pass serves all categories of a photo."""
        records = sorted((record for masks in self.records.values() for record in masks), key=lambda r: r.photo)
        return list(_shards(records, SHARD_SIZE))

    def train_separate(self) -> None:
        """Trains one network per category and relabels."""
        names = list(self.records)
        self.progress.total = len(names) * self.views + sum(map(len, self.records.values()))
        for number in self.worker.claim("experts", len(names)):
            name, records = names[number], self.records[names[number]]
            if self.shard(number).exists():
                self.progress.advance(self.views + len(records), existing=True)
            elif self.imported or any(record.area for record in self.selected[name]):
                network = self._expert(name, [name], Worker())
                if not self._take_shard(number, records, name):
                    segmenter = Segmenter(network, [name], self.device, self.settings.precision)
                    self._refine(number, records, segmenter, lambda logits, _: logits[1] - logits[0])
            else:
                self._write(number, records, [])
                self.progress.advance(self.views + len(records), existing=True)

    def train_shared(self) -> None:
        """Trains one network for all categories and relabels."""
        names = list(self.records)
        self.progress.total = self.views + sum(map(len, self.records.values()))
        network = self._expert(SHARED, names, self.worker)
        assert isinstance(network, SharedExperts)
        layers, segmenter = network.layers, Segmenter(network, names, self.device, self.settings.precision)
        trained = {name for name, masks in self.selected.items() if any(record.area for record in masks)}
        indices = {name: torch.tensor([index], device=segmenter.device) for index, name in enumerate(names)}

        def logits(features: Tensor, name: str) -> Tensor:
            if name not in trained:  # its masks stay empty
                return features.new_full(features.shape[1:], -torch.inf)
            return layers.logits(features[None], indices[name])[0]

        shards = self._shared_shards()
        for number in self.worker.claim("experts", len(shards)):
            if self.shard(number).exists():
                self.progress.advance(len(shards[number]), existing=True)
            elif not self._take_shard(number, shards[number], SHARED):
                self._refine(number, shards[number], segmenter, logits)

    def _expert(self, name: str, categories: list[str], worker: Worker) -> DeepLab:
        """Loads the network of a file. If there is none, all workers of `worker` train it first."""
        shared = self.settings.mode == SHARED
        network_type, classes = (SharedExperts, len(categories)) if shared else (DeepLab, 2)
        path = network_path(self.out, name)
        folder = path.with_suffix("")
        samples = expert_samples(self.selected, categories, self.settings)
        if worker.is_main and (not path.exists() or self._is_half_taken(path)):
            about = training_about(self.settings, samples, classes)
            self.worker.count_done(KEPT, int(take_outdated(self.out, folder, about, path)))
        worker.barrier(f"an earlier {path.name} is taken")
        if path.exists():
            self.progress.advance(self.views if worker.is_main else 0, existing=True)
        else:
            make_folder(folder)
            if worker.is_main:
                remove_stale(folder)
            progress = _ExpertProgress(self.progress, name)
            network = train(
                self.source, samples, classes, folder, self.settings, worker, self.device, progress, network_type
            )
            if worker.is_main:
                stored.write(path, network)
            worker.barrier(f"{path.name} is written")
        if worker.is_main:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        encoder, settings = untrained_encoder(self.settings.encoder), self.settings
        network = network_type(encoder, classes, settings.head_channels, dilations=settings.dilations)
        try:
            stored.load(network, stored.read(path), f"the network of {name!r}")
        except UserError as error:
            raise DamagedFile(path, error) from None
        return network.eval().requires_grad_(False)

    @functools.cached_property
    def scorer(self) -> NameScorer | None:
        return self.make_scorer() if self.make_scorer else None

    def shard(self, number: int) -> Path:
        return self.out / "refining" / f"{number:05}.jsonl"

    @functools.cached_property
    def _outdated_shards(self) -> dict[tuple, Path]:
        """The shards from before an update by what they are made of, apart from the network."""
        folders = [outdated / name for outdated in outdated_folders(self.out) for name in ("refined", "refining")]
        paths = [path for folder in folders for path in sorted(folder.glob("*[0-9].jsonl"))]
        return {_made_of(read_shard(path)): path for path in paths}

    def _take_shard(self, number: int, records: list[MaskRecord], name: str) -> bool:
        """Writes a shard from before an update, if there is one of the same masks and its network has been kept.

        Not if names decide which masks it replaces: their scores depend on all names of the run.

        Args:
            number: Number of the shard.
            records: Its masks.
            name: Name of its network.
        """
        replaced = any(network_path(outdated, name).exists() for outdated in outdated_folders(self.out))
        path = None if replaced or self.make_scorer else self._outdated_shards.get(_made_of(records))
        if path is not None:
            self._write(number, list(read_shard(path)), [])
            self.progress.advance(len(records), existing=True)
        return path is not None

    def _refine(self, number: int, records: list[MaskRecord], segmenter: Segmenter, logits: ObjectLogits) -> None:
        """Writes a shard: the records with the experts' masks."""
        by_photo: dict[str, list[MaskRecord]] = {}
        for record in records:
            by_photo.setdefault(record.photo, []).append(record)
        refined: list[MaskRecord] = []
        errors: list[ErrorRecord] = []
        for name, result in relabel(self.source, by_photo, segmenter, logits, self.scorer):
            if isinstance(result, PhotoError):
                errors.append(ErrorRecord(name, "experts", result.reason))
            else:
                refined += result
                kept = sum(record is before for record, before in zip(result, by_photo[name], strict=True))
                self.worker.count_done(KEPT_MASKS, kept)
            self.progress.advance(len(by_photo[name]))
        self._write(number, refined, errors)

    def _write(self, number: int, records: list[MaskRecord], errors: list[ErrorRecord]) -> None:
        write_errors(errors_path(self.shard(number)), errors)
        write_shard(self.shard(number), records)
        self.worker.count_done(EMPTY_MASKS, sum(not record.area for record in records))


def _made_of(records: Iterable[MaskRecord]) -> tuple:
    """What the experts' masks for these records are made of, besides the networks."""
    return tuple((record.photo, record.size, record.category, record.category_score) for record in records)


class _ExpertProgress(Progress):
    """The training of an expert as part of the progress of the stage."""

    def __init__(self, stage: Progress, name: str):
        super().__init__(stage.stage, stage.worker)
        self.parent, self.name = stage, name

    def advance(self, photos: int, existing: bool = False) -> None:
        if self.note:
            self.parent.note = f"{self.name}: {self.note}"
        self.parent.advance(photos, existing)


def relabel(
    source: PhotoSource,
    by_photo: dict[str, list[MaskRecord]],
    segmenter: Segmenter,
    logits: ObjectLogits,
    scorer: NameScorer | None = None,
) -> Iterator[tuple[str, list[MaskRecord] | PhotoError]]:
    """Predicts new masks for records.

    Args:
        source: The photos.
        by_photo: Records by name of their photo.
        segmenter: The network.
        logits: From the coarse output of the network for a photo, [C, h, w], and a category: the logits of its object,
            [h, w]. The mask is where they are above 0, at the size of the photo.
        scorer: For the choice between old and new masks by `MOST_OVERLAP` and `MARGIN`. None: all records get a new
            mask.

    Yields:
        The name of each photo with its new records, or with an error if it cannot be used or has changed.
    """

    @torch.inference_mode()
    def predict(photos: list[Photo]) -> list[list[MaskRecord]]:
        outputs = segmenter.coarse_logits([photo.pixels for photo in photos])
        masks, certainties = [], []
        for photo, output in zip(photos, outputs, strict=True):
            for record in by_photo[photo.name]:
                own = logits(output, record.category)
                masks.append(upsampled_argmax(torch.stack([torch.zeros_like(own), own]), *record.size) == 1)
                certainties.append(certainty(own.sigmoid()))
        encoded = zip(encode_masks(Ragged.pack(masks)), torch.stack(certainties).tolist(), strict=True)
        new = [[new_record(record, *next(encoded)) for record in by_photo[photo.name]] for photo in photos]
        return new if scorer is None else [keep_good(*pair) for pair in zip(photos, new, strict=True)]

    def keep_good(photo: Photo, new: list[MaskRecord]) -> list[MaskRecord]:
        before = by_photo[photo.name]
        if any(record.size != photo.size for record in before):
            return new  # reported below
        pairs = zip(before, new, strict=True)
        return [own if is_better(photo, old, own) else old for old, own in pairs]

    def is_better(photo: Photo, old: MaskRecord, own: MaskRecord) -> bool:
        assert scorer is not None
        if mask_iou(old, own) >= MOST_OVERLAP:
            return False
        pair = np.stack([old.mask(), own.mask()], -1)
        both = (Ragged.pack([array]) for array in (photo.pixels, pair.astype(np.float32)))
        images, candidates = (batch.with_rows(batch.rows.to(segmenter.device)) for batch in both)
        numbers = torch.tensor([[0, 1]], device=segmenter.device)
        by_old, by_own = scorer.score(images, candidates, numbers, [own.category])[0].tolist()
        return by_own >= by_old + MARGIN

    def new_record(record: MaskRecord, mask: EncodedMask, confidence: float) -> MaskRecord:
        terms = record.score, mask_iou(record, mask), mask.score(confidence)
        score = sum(terms) / len(terms) if mask.area else 0.0
        return MaskRecord.from_encoded(record.photo, mask, record.category, record.category_score, score)

    for batch in segmenter.map_photos(source, by_photo, predict):
        for name, photo, records in batch:
            if isinstance(photo, PhotoError):
                yield name, photo
            elif {record.size for record in by_photo[name]} != {photo.pixels.shape[:2]}:
                yield name, PhotoError(name, RESIZED)
            else:
                yield name, records


def certainty(soft: Tensor) -> Tensor:
    """Certainty of a predicted mask: the Dice coefficient of its probabilities and the mask.

    Args:
        soft: Probabilities of the object, [h, w].

    Returns:
        A number in [0, 1], float32 []; 0 for an empty mask.
    """
    hard = soft > 0.5
    return torch.where(hard.any(), 2 * soft[hard].sum() / (soft.sum() + hard.sum()), 0)


def _shards(records: list[MaskRecord], size: int) -> Iterator[list[MaskRecord]]:
    """Splits records, grouped by photo, into shards of at least `size`. All records of a photo are in one shard."""
    shard: list[MaskRecord] = []
    for record in records:
        if len(shard) >= size and record.photo != shard[-1].photo:
            yield shard
            shard = []
        shard.append(record)
    if shard:
        yield shard
