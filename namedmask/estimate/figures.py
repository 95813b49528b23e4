# SPDX-License-Identifier: MIT
"""The figures of an estimate, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import counted

MEASURED = ("index", "archive", "pseudolabel")  # stages of `namedmask run`


@dataclass(frozen=True)
class Row:
    """The cost of a stage, or of a part of it.

    Attributes:
        stage: Name of the stage.
        part: Part of the stage; "" for all of it.
        unit: What is counted: "photos", "prompts" or "views", the photos as augmented for a training.
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

    def line(self) -> str:
        """The time in one line: "about 3 h 10 min: index 2 h, pseudolabel 1 h 10 min"."""
        times: dict[str, float] = {}
        for row in self.rows:
            times[row.stage] = times.get(row.stage, 0.0) + row.seconds
        parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in times.items())
        return f"about {duration(sum(times.values()))}: {parts}"

    def table(self) -> str:
        """The estimate as a table, with the sums and what there is."""
        shown = 7 if self.gpu_memory else 6
        heads = ("stage", "rate here", "of this job", "hours", "disk, GB", "memory, GB", "GPU, GB")
        lines: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            name = f"{row.stage}: {row.part}" if row.part else row.stage
            sizes = map(_gb, (row.disk, row.memory, row.gpu_memory))
            count = counted(row.count, row.unit[:-1])
            lines.append((name, f"{_short(row.rate)} {row.unit}/s", count, _hours(row.seconds), *sizes))
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
        needs = (
            f"{name} {_gb(needed)} of {_gb(there)} GB" + " (not enough)" * (needed > there)
            for name, (needed, there) in self.needs.items()
        )
        text += ["", f"needed: {', '.join(needs)}"]
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
