# SPDX-License-Identifier: MIT
"""How long a run will take on this machine, and how much disk and memory it needs.

The stages' own code processes a sample of the user's photos for some seconds per stage. What it does per second, times
the photos, prompts and training views of the job, gives the hours; the bytes of the files that it writes give the disk.
A run folder is neither needed nor touched.

Not included: starting up, downloads, the search in the index and the gallery. A stage that is measured for seconds
runs on a machine that is cooler, and whose caches are warmer, than after hours.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import logging
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import hub
from .config import DeepLabTraining, RunConfig, flatten, make_config, merge, nest
from .distributed import Worker
from .errors import UserError
from .masks import MaskRecord
from .photos import Photo, PhotoError, PhotoSource, decode_ahead, open_source
from .progress import Progress

if TYPE_CHECKING:
    import torch

    from .hub import Published
    from .index import Embedder

SAMPLE = 256  # photos
LONG = {"cpu": 1000, "cuda": 20_000}  # photos of a run that is measured before it starts
ANNOUNCE_WITHIN = 10.0  # seconds of measuring before a run
STEP_PHOTOS = 2  # least of a training step on a CPU, for BatchNorm; its time is about proportional to them
CHECKPOINT = 3  # times the bytes of the network: weights and the two moments of Adam

MEASURED = ("index", "archive", "pseudolabel")  # stages of `namedmask run`


@dataclass(frozen=True)
class Row:
    """The cost of a stage, or of a part of it.

    Attributes:
        stage: Name of the stage.
        part: Part of the stage; "" for all of it.
        unit: What is counted: "photos", "prompts" or "views", which are photos as a training sees them.
        measured: Number of units that were processed to measure the rate.
        rate: Units per second on this machine.
        count: Units of the job.
        disk: Bytes of its files when they take most.
        memory: Bytes of memory of the process at its peak.
        gpu_memory: Bytes of GPU memory at the peak; 0 on a CPU.
    """

    stage: str
    part: str
    unit: str
    measured: int
    rate: float
    count: int
    disk: int
    memory: int
    gpu_memory: int

    @property
    def seconds(self) -> float:
        """Time of the job."""
        return self.count / self.rate


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        photos: Number of photos of the job.
        categories: Number of categories.
        megapixels: Mean size of the sampled photos.
        device: The device, in words.
        rows: Costs, in the order of the stages.
        decoding: Photos per second if they are only decoded; index, labeling and relabeling cannot be faster.
        random_weights: Models that had random weights.
        free_disk: Free bytes of the disk of the current folder.
        available_memory: Bytes of memory that were available before the measurement.
        gpu_memory: Bytes of memory of the GPU; 0 on a CPU.
    """

    photos: int
    categories: int
    megapixels: float
    device: str
    rows: tuple[Row, ...]
    decoding: float
    random_weights: tuple[str, ...]
    free_disk: int
    available_memory: int
    gpu_memory: int

    def seconds(self, stages: Sequence[str] = ()) -> float:
        """Time of some stages; () for all."""
        return sum(row.seconds for row in self.rows if not stages or row.stage in stages)

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Bytes that the run needs at its peak and bytes that there are, of disk, memory and GPU memory."""
        needed = {
            "disk": (sum(row.disk for row in self.rows), self.free_disk),
            "memory": (max(row.memory for row in self.rows), self.available_memory),
            "GPU memory": (max(row.gpu_memory for row in self.rows), self.gpu_memory),
        }
        return {name: pair for name, pair in needed.items() if pair[1]}

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain values, with the seconds of each row."""
        return asdict(self) | {"rows": [asdict(row) | {"seconds": row.seconds} for row in self.rows]}

    def line(self, stages: Sequence[str] = ()) -> str:
        """The time in one line: "about 3 h 10 min: index 2 h, pseudolabel 1 h 10 min"."""
        chosen = [row for row in self.rows if not stages or row.stage in stages]
        times = {row.stage: sum(other.seconds for other in chosen if other.stage == row.stage) for row in chosen}
        parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in times.items())
        return f"about {duration(sum(times.values()))}: {parts}"

    def table(self) -> str:
        """The estimate as a table, with the sums and what ends first."""
        shown = 7 if self.gpu_memory else 6
        heads = ("stage", "rate here", "of this job", "hours", "disk, GB", "memory, GB", "GPU, GB")
        lines: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            name = f"{row.stage}: {row.part}" if row.part else row.stage
            sizes = map(_gb, (row.disk, row.memory, row.gpu_memory))
            lines.append(
                (name, f"{_short(row.rate)} {row.unit}/s", f"{row.count:,} {row.unit}", _hours(row.seconds), *sizes)
            )
        for name, stages in (("namedmask run", MEASURED), ("everything", ())):
            chosen = [row for row in self.rows if not stages or row.stage in stages]
            if not stages or len(chosen) < len(self.rows):
                peaks = (max(row.memory for row in chosen), max(row.gpu_memory for row in chosen))
                sizes = map(_gb, (sum(row.disk for row in chosen), *peaks))
                lines.append((name, "", "", _hours(self.seconds(stages)), *sizes))
        lines = [line[:shown] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        name, (needed, there) = max(self.needs.items(), key=lambda item: item[1][0] / item[1][1])
        limits = ", ".join(f"{key} {_gb(a)} of {_gb(b)} GB" for key, (a, b) in self.needs.items())
        verdict = "is not enough" if needed > there else "ends first"
        text += ["", f"{name} {verdict}: needed of what there is: {limits}"]
        text.append(f"decoding alone: {_short(self.decoding)} photos/s; mean size {self.megapixels:.2f} megapixels")
        return "\n".join(line.rstrip() for line in text)


def duration(seconds: float) -> str:
    """A time in words, such as "50 s", "40 min", "3 h 10 min" or "4 days 2 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    days, hours = divmod(hours + (minutes >= 30), 24)
    return f"{days} days" + (f" {hours} h" if hours else "")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}" if seconds < 36_000 else f"{seconds / 3600:,.0f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:,.0f}"


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def estimate(
    config: RunConfig,
    device: str = "cpu",
    seconds: float = 60.0,
    photos_total: int | None = None,
    trainings: bool = True,
    random_weights: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Estimate:
    """Estimates the cost of a run with these settings by measuring its stages on this machine.

    Every call measures again; two calls agree as well as the machine is free. Loading models comes on top of `seconds`,
    and a stage whose single batch takes longer than its share of them finishes it.

    Args:
        config: The settings. Its photos are sampled.
        device: "cpu" or a GPU as torch names it. Rates are those of one process.
        seconds: Time to measure in all.
        photos_total: Number of photos of the job; None: those that there are.
        trainings: Measure `experts` and `train` besides what `namedmask run` does.
        random_weights: Use random weights for models whose published weights are not in the caches.
        report: Called with the name of each part before it is measured.

    Raises:
        UserError: If there are no usable photos, or if a model cannot be loaded.
    """
    from .memory import available_memory

    source = open_source(config.photos)
    names, found = _sample(source.names(lambda _: None), SAMPLE)
    if not names:
        raise UserError(f"there are no photos in {config.photos}")
    labeling = MEASURED if config.categories else ("pseudolabel",)  # class folders need no CLIP model
    stages = (*labeling, "experts", "train") if trainings else labeling
    needed, replaced = hub.needed(config, stages), list[str]()
    with tempfile.TemporaryDirectory(prefix="namedmask-estimate-") as folder:
        if random_weights:
            config, replaced = _with_random_weights(config, needed, Path(folder))
        else:
            _require(needed)
        job = _Job(config, source, names, photos_total or found, device, seconds, Path(folder), report)
        free, memory = shutil.disk_usage(".").free, available_memory()
        return Estimate(
            photos=job.photos,
            categories=job.categories,
            decoding=job.measure_decoding(len(stages)),
            megapixels=job.megapixels,
            rows=tuple(job.measure(stages)),
            device=_about(device),
            random_weights=tuple(replaced),
            free_disk=free,
            available_memory=memory,
            gpu_memory=_gpu_memory(device),
        )


def _require(needed: Sequence[Published]) -> None:
    try:
        hub.require(needed)
    except UserError as error:
        raise UserError(f"{error}; or pass --random-weights: rates hardly depend on the values") from None


def announce(config: RunConfig, device: str) -> str | None:
    """The time that a new `namedmask run` will take, in one line, measured on some of its photos within seconds.

    Returns:
        None for runs of fewer than `LONG` photos, and if they cannot be measured; the run itself says why.
    """
    kind = device.split(":")[0]
    with contextlib.suppress(UserError, OSError):
        photos = open_source(config.photos).names(lambda _: None)
        if sum(1 for _ in itertools.islice(photos, LONG[kind])) < LONG[kind]:
            return None
        return estimate(config, device, ANNOUNCE_WITHIN, trainings=False).line()
    return None


def _sample(names: Iterable[str], count: int) -> tuple[list[str], int]:
    """A random sample of names in their order, the same at each call, and how many there are."""
    rng = random.Random(0)
    chosen: list[tuple[int, str]] = []
    total = 0
    for number, name in enumerate(names):
        total += 1
        if number < count:
            chosen.append((number, name))
        elif (place := rng.randrange(total)) < count:
            chosen[place] = number, name
    return [name for _, name in sorted(chosen)], total


@dataclass
class _Job:
    config: RunConfig
    source: PhotoSource
    names: list[str]
    photos: int
    device: str
    seconds: float
    folder: Path
    report: Callable[[str], None]
    share: float = 0  # seconds of each measurement
    megapixels: float = 0

    def __post_init__(self) -> None:
        self.on_gpu = self.device != "cpu"
        if self.config.categories:
            self.categories = len(self.config.categories)
            self.retrieved = self.categories * min(self.config.archive.photos_per_category, self.photos)
        else:
            try:
                self.categories = len(self.source.categories(lambda _: None))
            except ValueError as error:
                raise UserError(str(error)) from None
            self.retrieved = self.photos
        self.labeled = min(self.photos, self.retrieved)

    def measure_decoding(self, stages: int) -> float:
        """Photos that are decoded per second. Leaves out the photos that cannot be."""
        self.share = self.seconds / (stages + 2)  # decoding, and experts are measured twice
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
        self.megapixels = sum(sizes.values()) / len(sizes) / 1e6
        return rate

    def measure(self, stages: Sequence[str]) -> Iterator[Row]:
        """Measures each stage and forgets its models."""
        if "index" in stages:
            yield from self._index()
        row, records = self._pseudolabel()
        yield row
        if "experts" in stages:
            yield from self._experts(records, row.disk)
        if "train" in stages:
            yield self._train(records)

    def _index(self) -> Iterator[Row]:
        from .archive import prompts
        from .index import CLIP_BATCH, SAME_KERNELS, make_embedder

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
        from .masks import write_shard
        from .pseudolabel import Labeler

        self.report("pseudolabel")
        peak = _Peak(self.device)
        labeler = Labeler(self.config, self.device)
        found: dict[str, MaskRecord] = {}

        def label() -> Iterator[int]:
            for batch in labeler.label(self.source, itertools.cycle(self.names)):
                for name, result in batch:
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
        row = Row("pseudolabel", "", "photos", measured, rate, self.labeled, int(disk), *peak.sizes())
        return row, [record for record in records if record.area] or [_box(record) for record in records]

    def _experts(self, records: list[MaskRecord], masks: int) -> Iterator[Row]:
        """masks: bytes of the detector's masks, which are also those of the experts' masks."""
        from .experts import SHARED, SharedExperts, expert_samples, relabel
        from .segmenter.deeplab import DeepLab
        from .segmenter.predict import Segmenter

        settings, name = self.config.experts, records[0].category
        shared = settings.mode == SHARED
        classes, network_type = (self.categories, SharedExperts) if shared else (2, DeepLab)
        trainings = 1 if shared else self.categories
        samples = expert_samples({name: records}, [name], settings)
        network = _untrained(settings, classes, network_type)
        size = _bytes(network)
        row = self._training("experts", "training", samples, classes, settings, network_type, trainings, size)
        yield row
        self.report("experts: relabeling")
        peak = _Peak(self.device)
        segmenter = Segmenter(network, [name], self.device)
        by_photo = {record.photo: [record] for record in records}

        def predict() -> Iterator[int]:
            while True:
                for _ in relabel(self.source, by_photo, segmenter, lambda logits, _: logits[-1] - logits[0]):
                    yield 1

        measured, rate = _rate(predict, self.share)
        count = self.labeled if shared else self.retrieved
        yield Row("experts", "relabeling", "photos", measured, rate, count, masks, *peak.sizes())

    def _train(self, records: list[MaskRecord]) -> Row:
        from .segmenter.deeplab import DeepLab
        from .segmenter.training import Sample

        settings, samples = self.config.segmenter, [Sample(record, 1) for record in records]
        size = _bytes(_untrained(settings, self.categories + 1, DeepLab))
        return self._training("train", "", samples, self.categories + 1, settings, DeepLab, 1, size)

    def _training(
        self,
        stage: str,
        part: str,
        samples: Sequence[Any],
        classes: int,
        settings: DeepLabTraining,
        network_type: type,
        trainings: int,
        size: int,
    ) -> Row:
        """Runs the first steps of a training. size: bytes of the network."""
        from .segmenter.training import train

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
        memory, gpu_memory = watch.peak.sizes()
        fixed = watch.before + CHECKPOINT * size  # gradients and moments do not grow with the photos of a step
        memory += int(max(0, memory - fixed) * (at_once / step - 1))
        count = trainings * settings.steps * settings.batch_size
        disk = size * (trainings + CHECKPOINT)
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
    from .backbones import untrained_encoder

    encoder = untrained_encoder(settings.encoder)
    network = network_type(encoder, classes, settings.head_channels, dilations=settings.dilations)
    return network.eval().requires_grad_(False)


def _bytes(network: Any) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _box(record: MaskRecord) -> MaskRecord:
    """A record with an object in the middle: trainings need one, and the detector found none."""
    mask = np.zeros(record.size, bool)
    height, width = record.size
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return MaskRecord.from_mask(record.photo, mask, record.category, record.category_score, 0.5)


def _with_random_weights(config: RunConfig, needed: Iterable[Published], folder: Path) -> tuple[RunConfig, list[str]]:
    """The settings with files of random weights for the models that have none in the caches, and the models' names."""
    import open_clip
    from safetensors.torch import save_file

    from .backbones import TokenPyramid, untrained, untrained_encoder

    missing = [one.what for one in needed if one.cached() is None]

    def clip(model: str) -> torch.nn.Module:
        return open_clip.create_model(model.partition(":")[0], load_weights=False)

    def encoder(name: str) -> torch.nn.Module:
        network = untrained_encoder(name).network
        return network.vit if isinstance(network, TokenPyramid) else network

    def file(kind: str, name: str, make: Callable[[str], torch.nn.Module]) -> str | None:
        if (what := f"{kind} {name}") not in missing:
            return None
        path = folder / f"{missing.index(what)}.safetensors"
        if not path.exists():  # float16 takes half of the disk; it is read as float32
            logging.disable(logging.WARNING)  # open_clip warns of random weights
            state = make(name).state_dict().items()
            logging.disable(logging.NOTSET)
            save_file({key: t.half().contiguous() if t.is_floating_point() else t for key, t in state}, path)
        return str(path)

    more = {name: file("backbone", name, untrained) for name in config.detector.more_backbones}
    changes: dict[str, Any] = {
        "index": {"clip_weights": file("CLIP model", config.index.clip_model, clip)},
        "detector": {
            "backbone_weights": file("backbone", config.detector.backbone, untrained),
            "more_backbones": [f"{name}={path}" if path else name for name, path in more.items()],
        },
        "experts": {"encoder_weights": file("encoder", config.experts.encoder, encoder)},
        "segmenter": {"encoder_weights": file("encoder", config.segmenter.encoder, encoder)},
    }
    given = nest({name: value for name, value in flatten(changes).items() if value})
    return make_config(merge(config.model_dump(), given)), missing


def _about(device: str) -> str:
    """The device in words."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    from .threads import thread_count

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{thread_count()} threads of {next(names, platform.machine())}"


def _gpu_memory(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.get_device_properties(device).total_memory
