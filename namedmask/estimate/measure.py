# SPDX-License-Identifier: MIT
"""Measures the stages of a run on some of its photos."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..config import DeepLabTraining, RunConfig
from ..distributed import Worker
from ..errors import UserError
from ..masks import MaskRecord
from ..photos import Photo, PhotoError, PhotoSource, decode_ahead
from ..progress import Progress
from .figures import Row

if TYPE_CHECKING:
    from ..index import Embedder

STEP_PHOTOS = 2  # least of a training step on a CPU, for BatchNorm; its time is about proportional to them
CHECKPOINT = 3  # times the bytes of the network: weights and the two moments of Adam; a moving average is another copy


class Photos(NamedTuple):
    """The photos of a job.

    Attributes:
        source: The source of the photos.
        sample: Names of some of them.
        total: How many there are.
        categories: Number of categories.
    """

    source: PhotoSource
    sample: list[str]
    total: int
    categories: int


class Measurement:
    """Measures the stages of a job, each for some seconds.

    Args:
        config: The settings.
        photos: The photos of the job.
        device: "cpu" or a GPU as torch names it.
        share: Seconds of each measurement.
        folder: An empty folder for files.
        report: Called with the name of each part before it is measured.
    """

    def __init__(
        self,
        config: RunConfig,
        photos: Photos,
        device: str,
        share: float,
        folder: Path,
        report: Callable[[str], None],
    ):
        self.config, self.device, self.share, self.folder, self.report = config, device, share, folder, report
        self.source, self.names, self.photos, self.categories = photos
        self.on_gpu = device != "cpu"
        self.retrieved = self.photos  # names of photos in the archive, repeated ones included
        if config.categories:
            self.retrieved = self.categories * min(config.archive.photos_per_category, self.photos)
        self.labeled = min(self.photos, self.retrieved)

    def decoding(self) -> tuple[float, float]:
        """Photos that are decoded per second, and their mean size in megapixels. Leaves out those that cannot be."""
        self.report("decoding")
        sizes: dict[str, int] = {}

        def decode() -> Iterator[int]:
            for name, photo in decode_ahead(self.source, itertools.cycle(self.names), self.source.decode):
                if isinstance(photo, Photo):
                    sizes[name] = photo.pixels.size // 3
                yield 1

        _, rate = _rate(decode, min(self.share, 3.0), least=min(32, len(self.names)))
        if not sizes:
            raise UserError(f"none of the sampled photos in {self.config.photos} can be read")
        self.names = list(sizes)
        return rate, sum(sizes.values()) / len(sizes) / 1e6

    def rows(self, stages: Sequence[str]) -> Iterator[Row]:
        """Measures each stage, after `decoding`, and forgets its models."""
        if "index" in stages:
            yield from self._index()
        row, records = self._pseudolabel()
        yield row
        if "experts" in stages:
            yield from self._experts(records, row.disk)
        if "train" in stages:
            yield self._train(records)

    def _index(self) -> Iterator[Row]:
        from ..archive import prompts
        from ..index import CLIP_BATCH, SAME_KERNELS, make_embedder

        self.report("index")
        results: dict[str, np.ndarray | PhotoError] = {}
        embedder: Embedder
        # On a CPU, larger batches gain nothing and would take longer than there is time; smaller ones are padded.
        together = CLIP_BATCH["cuda"] if self.on_gpu else SAME_KERNELS

        def embed() -> Iterator[int]:
            names = itertools.cycle(self.names)
            shards = iter(lambda: list(itertools.islice(names, together)), [])
            for number, (name, result) in enumerate(embedder.images(self.source, shards), 1):
                results[name] = result
                if number % together == 0:
                    yield together

        peak = _Peak(self.device)
        embedder = make_embedder(self.config.index, self.device)
        measured, rate = _rate(embed, self.share)
        rows = [result for result in results.values() if not isinstance(result, PhotoError)]
        if not rows:
            raise UserError(f"none of the sampled photos in {self.config.photos} has an embedding")
        listed = sum(len(json.dumps({"photo": name})) + 1 for name in self.names) / len(self.names)
        row_bytes = rows[0].astype(np.float16).nbytes + np.int64().nbytes  # of a shard
        disk = self.photos * (row_bytes + listed)
        yield Row("index", "", "photos", measured, rate, self.photos, int(disk), *peak.sizes())
        if self.config.index.embeddings:
            return
        self.report("archive")
        templates = prompts()
        some = templates if self.on_gpu else templates[: 2 * STEP_PHOTOS]

        def read() -> Iterator[int]:
            chosen = self.config.categories[: 6 if self.on_gpu else 1]
            while True:
                embedder.texts(chosen, some)
                yield len(chosen) * len(some)

        peak = _Peak(self.device)
        measured, rate = _rate(read, self.share)
        entry = listed + len(', "score": 0.123456')
        count = self.categories * len(templates)
        yield Row("archive", "", "prompts", measured, rate, count, int(self.retrieved * entry), *peak.sizes())

    def _pseudolabel(self) -> tuple[Row, list[MaskRecord]]:
        """The row, and the masks of the sampled photos."""
        from ..masks import write_shard
        from ..pseudolabel import Labeler

        self.report("pseudolabel")
        peak = _Peak(self.device)
        labeler = Labeler(self.config, self.device, ["category"])
        found: dict[str, MaskRecord] = {}

        def label() -> Iterator[int]:
            units = ((name, "category") for name in itertools.cycle(self.names))
            for batch in labeler.label(self.source, units):
                for (name, _), result in batch:
                    if not isinstance(result, PhotoError):
                        found[name] = MaskRecord.from_encoded(name, result.mask, "category", 0.5, result.score)
                yield len(batch)

        measured, rate = _rate(label, self.share)
        if not found:
            raise UserError(f"none of the sampled photos in {self.config.photos} could be labeled")
        records = list(found.values())
        shard = self.folder / "00000.jsonl"
        write_shard(shard, records)
        disk = self.retrieved * shard.stat().st_size / len(records) * (1 + self.config.pseudolabel.keep_detected)
        # Names select a mask for each category of a photo.
        count = self.retrieved if self.config.detector.selection == "name" else self.labeled
        row = Row("pseudolabel", "", "photos", measured, rate, count, int(disk), *peak.sizes())
        return row, [record for record in records if record.area] or [_box(record) for record in records]

    def _experts(self, records: list[MaskRecord], masks: int) -> Iterator[Row]:
        """masks: bytes of the detector's masks, which are also those of the experts' masks."""
        from ..experts import SHARED, SharedExperts, expert_samples, relabel
        from ..segmenter.deeplab import DeepLab
        from ..segmenter.predict import Segmenter

        settings, name = self.config.experts, records[0].category
        shared = settings.mode == SHARED
        classes, network_type, trainings = (
            (self.categories, SharedExperts, 1) if shared else (2, DeepLab, self.categories)
        )
        samples = expert_samples({name: records}, [name], settings)
        yield self._training("experts", "training", settings, samples, classes, network_type, trainings)
        self.report("experts: relabeling")
        peak = _Peak(self.device)
        network = _untrained(settings, classes, network_type)
        segmenter = Segmenter(network, [name], self.device, settings.precision)
        by_photo = {record.photo: [record] for record in records}

        def predict() -> Iterator[int]:
            while True:
                for _ in relabel(self.source, by_photo, segmenter, lambda logits, _: logits[-1] - logits[0]):
                    yield 1

        measured, rate = _rate(predict, self.share)
        count = self.labeled if shared else self.retrieved
        yield Row("experts", "relabeling", "photos", measured, rate, count, masks, *peak.sizes())

    def _train(self, records: list[MaskRecord]) -> Row:
        from ..segmenter.deeplab import DeepLab
        from ..segmenter.training import Sample

        samples = [Sample(record, 1) for record in records]
        return self._training("train", "", self.config.segmenter, samples, self.categories + 1, DeepLab)

    def _training(
        self,
        stage: str,
        part: str,
        settings: DeepLabTraining,
        samples: Sequence[Any],
        classes: int,
        network_type: type,
        trainings: int = 1,
    ) -> Row:
        """Runs the first steps of a training, of which the job has `trainings`."""
        from ..segmenter.training import train

        self.report(f"{stage}: {part}" if part else stage)
        folder, at_once = self.folder / stage, settings.batch_size // settings.grad_accum_steps

        def run(step: int, seconds: float) -> _Stopwatch:
            """The first steps of a training, of `step` photos at a time."""
            folder.mkdir()
            changes: dict[str, Any] = {"steps": 1_000_000_000}  # more than there is time for
            if step != at_once:
                changes |= {"batch_size": step, "grad_accum_steps": 1}
            watch = _Stopwatch(stage, seconds, self.device)
            with contextlib.suppress(_Enough):
                train(
                    self.source, samples, classes, folder, settings.model_copy(update=changes), Worker(), self.device,
                    watch, network_type,
                )  # fmt: skip
            shutil.rmtree(folder)
            return watch

        # A step of the paper's settings takes half a minute on a laptop: a CPU gets the photos that there is time for.
        first = run(at_once if self.on_gpu else min(STEP_PHOTOS, at_once), 0)
        step = at_once if self.on_gpu else min(max(STEP_PHOTOS, int(first.rate * self.share)), at_once)
        watch = run(step, self.share)
        size = sum(tensor.nbytes for tensor in _untrained(settings, classes, network_type).state_dict().values())
        memory, gpu_memory = watch.peak.sizes()
        copies = CHECKPOINT + bool(getattr(settings, "ema_decay", 0))
        fixed = watch.before + copies * size  # gradients and moments do not grow with the photos of a step
        memory += int(max(0, memory - fixed) * (at_once / step - 1))
        count = trainings * settings.steps * settings.batch_size
        disk = size * (trainings + copies)
        return Row(stage, part, "views", watch.measured, watch.rate, count, disk, memory, gpu_memory)


def _rate(work: Callable[[], Iterator[int]], seconds: float, least: int = 1) -> tuple[int, float]:
    """Runs an endless iterator for some seconds, after a first one that ends with its first value and loads kernels.

    Args:
        work: Makes the iterator. It yields how many units it has processed since its last value.
        seconds: Time to measure.
        least: Units to measure even if it takes longer.

    Returns:
        The units that were measured, and units per second.
    """
    with contextlib.closing(work()) as first:  # type: ignore[type-var]  # a generator
        next(first)
    start, done, elapsed = time.monotonic(), 0, 0.0
    with contextlib.closing(work()) as results:  # type: ignore[type-var]
        for count in results:
            done += count
            elapsed = time.monotonic() - start
            if elapsed >= seconds and done >= least:
                break
    return done, done / elapsed


class _Enough(Exception):
    """Ends a training that has been measured."""


class _Stopwatch(Progress):
    """Measures a training from its first step on, and ends it when the time is over.

    Attributes:
        measured: Number of photos of the measured steps: all but the first one, unless there is no time for another.
        before: Bytes of memory before the first step.
    """

    def __init__(self, stage: str, seconds: float, device: str):
        super().__init__(stage, Worker())
        self.seconds, self.peak = seconds, _Peak(device)
        self.times: list[float] = []
        self.measured = self.before = 0
        self.rate = 0.0

    def advance(self, photos: int, existing: bool = False) -> None:
        """Counts a step; `existing` marks the call before the first one."""
        self.times.append(time.monotonic())
        if existing:
            self.before = self.peak.now()
            return
        first = 0 if len(self.times) == 2 else 1
        self.measured = photos * (len(self.times) - 1 - first)
        self.rate = self.measured / (self.times[-1] - self.times[first])
        if self.times[-1] - self.times[0] >= self.seconds:
            raise _Enough


class _Peak:
    """The peak of the memory of this process from now on, from Linux' own counter, and that of its GPU."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        with contextlib.suppress(AttributeError):  # not in every C library
            ctypes.CDLL(None).malloc_trim(0)  # what earlier stages have freed
        with contextlib.suppress(OSError):  # a container may forbid it: the peak is then that of the process
            Path("/proc/self/clear_refs").write_text("5")
        if self.device != "cpu":
            import torch

            torch.cuda.init()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        """Bytes of memory of the process."""
        return _status("VmRSS")

    def sizes(self) -> tuple[int, int]:
        """Peak so far, of the process and of its GPU."""
        if self.device == "cpu":
            return _status("VmHWM"), 0
        import torch

        return _status("VmHWM"), torch.cuda.max_memory_reserved(self.device)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _untrained(settings: DeepLabTraining, classes: int, network_type: type) -> Any:
    from ..backbones import untrained_encoder

    encoder = untrained_encoder(settings.encoder)
    network = network_type(encoder, classes, settings.head_channels, dilations=settings.dilations)
    return network.eval().requires_grad_(False)


def _box(record: MaskRecord) -> MaskRecord:
    """A record with an object in the middle: trainings need one, and the detector found none."""
    mask = np.zeros(record.size, bool)
    height, width = record.size
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return MaskRecord.from_mask(record.photo, mask, record.category, record.category_score, 0.5)
