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
import platform
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .. import hub
from ..config import RunConfig
from ..errors import UserError, counted
from ..photos import open_source
from .figures import MEASURED, Estimate
from .figures import Row as Row
from .measure import Measurement, Photos

if TYPE_CHECKING:
    from ..hub import Published

SAMPLE = 256  # photos
LONG = {"cpu": 1000, "cuda": 20_000}  # photos of a run that is measured before it starts
ANNOUNCE_WITHIN = 10.0  # seconds of measuring before a run


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
    photos = _list(config)
    if photos_total:
        photos = photos._replace(total=photos_total)
    return _estimate(config, photos, device, seconds, trainings, random_weights, report)


def announce(config: RunConfig, device: str) -> str | None:
    """The time that a new `namedmask run` will take, in one line, measured on some of its photos within seconds.

    Returns:
        None for runs of fewer than `LONG` photos, and if they cannot be measured; the run itself says why.
    """
    with contextlib.suppress(UserError, OSError):
        photos = _list(config)
        if photos.total >= LONG[device.split(":")[0]]:
            return _estimate(config, photos, device, ANNOUNCE_WITHIN, trainings=False).line()
    return None


def _list(config: RunConfig) -> Photos:
    """Lists the photos once. Raises UserError if there are none."""
    source = open_source(config.photos)
    if config.categories:
        categories = len(config.categories)
        sample, count = _sample(source.names(lambda _: None), SAMPLE)
    else:
        folders = source.categories(lambda _: None)
        categories = len(folders)
        sample, count = _sample(chain.from_iterable(folders.values()), SAMPLE)
    if not count:
        raise UserError(f"there are no photos in {config.photos}")
    return Photos(source, sample, count, categories)


def _sample(names: Iterable[str], size: int) -> tuple[list[str], int]:
    """A random sample of names in their order, the same at each call, and how many there are."""
    rng = random.Random(0)
    chosen: list[tuple[int, str]] = []
    count = 0
    for number, name in enumerate(names):
        count += 1
        if number < size:
            chosen.append((number, name))
        elif (place := rng.randrange(count)) < size:
            chosen[place] = number, name
    return [name for _, name in sorted(chosen)], count


def _estimate(
    config: RunConfig,
    photos: Photos,
    device: str,
    seconds: float,
    trainings: bool,
    random_weights: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Estimate:
    from ..memory import available_memory
    from .random_weights import with_random_weights

    labeling = MEASURED if config.categories else ("pseudolabel",)  # class folders need no CLIP model
    stages = (*labeling, "experts", "train") if trainings else labeling
    needed, replaced = hub.needed(config, stages), list[str]()
    with tempfile.TemporaryDirectory(prefix="namedmask-estimate-") as folder:
        if random_weights:
            config, replaced = with_random_weights(config, needed, Path(folder))
        else:
            _require(needed)
        free, memory = shutil.disk_usage(".").free, available_memory()
        about, gpu_memory = _machine(device)
        share = seconds / (len(stages) + 2)  # decoding is measured, too, and experts twice
        measurement = Measurement(config, photos, device, share, Path(folder), report)
        decoding, megapixels = measurement.decoding()
        return Estimate(
            photos=photos.total,
            categories=photos.categories,
            decoding=decoding,
            megapixels=megapixels,
            rows=tuple(measurement.rows(stages)),
            device=about,
            random_weights=tuple(replaced),
            free_disk=free,
            available_memory=memory,
            gpu_memory=gpu_memory,
        )


def _require(needed: Sequence[Published]) -> None:
    try:
        hub.require(needed)
    except UserError as error:
        raise UserError(f"{error}; or pass --random-weights: rates hardly depend on the values") from None


def _machine(device: str) -> tuple[str, int]:
    """A device in words, and the bytes of its memory if it is a GPU, else 0."""
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_properties(device)
        return gpu.name, gpu.total_memory
    from ..threads import thread_count

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{counted(thread_count(), 'thread')} of {next(names, platform.machine())}", 0
