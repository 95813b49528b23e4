# SPDX-License-Identifier: MIT
"""Progress of a stage: a bar in a terminal, otherwise a line from time to time. The main worker shows it for all."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from .distributed import Worker
from .process import complain

if TYPE_CHECKING:
    from rich import progress as rich
    from rich.console import Console

LINE_EVERY = 10.0  # seconds between lines, if the output is not a terminal


def warn(message: str) -> None:
    """Prints a warning as one line on stderr."""
    complain(f"warning: {message}")


def plain_console() -> Console:
    """A console of rich that prints text as it is. By default, names such as "[red]" would color what follows."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


class Progress:
    """Progress of a stage, over all workers. Use it as a context manager.

    Attributes:
        total: Number of photos to process; may be set at any time.
        note: Text to show with the progress; may be set at any time.
        done: Number of photos processed so far, including the skipped ones.
        skipped: Number of photos whose results already existed.
    """

    def __init__(self, stage: str, worker: Worker):
        self.stage, self.worker = stage, worker
        self.total, self.note = 0, ""
        self.done = self.skipped = 0
        self.bar: rich.Progress | None = None

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        return self

    def advance(self, photos: int, existing: bool = False) -> None:
        """Counts photos of this worker as done.

        Args:
            photos: Number of photos.
            existing: The results already existed. Such photos do not count toward the rate.
        """
        self.skipped = self.worker.count_done(f"{self.stage}/skipped", photos if existing else 0)
        self.done = self.worker.count_done(self.stage, photos)
        if not self.worker.is_main:
            return
        if sys.stdout.isatty():
            self._draw()
        elif (now := time.monotonic()) - self.last_line > LINE_EVERY:
            self.last_line = now
            rate = self._rate(now)
            left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
            note = f" ({self.note})" if self.note else ""
            print(f"{self.stage}: {self.done} of {self.total} photos, {rate:.1f}/s{left}{note}", flush=True)

    def _rate(self, now: float) -> float:
        return (self.done - self.skipped) / max(now - self.start, 1e-9)

    def _draw(self) -> None:
        from rich import progress as rich

        if self.bar is None:
            self.bar = rich.Progress(
                rich.TextColumn("{task.description:12}", markup=False),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[rate]}", markup=False),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[note]}", markup=False),
                console=plain_console(),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=self.total, rate="", note="")
        rate = self._rate(time.monotonic())
        self.bar.update(self.task, completed=self.done, total=self.total, rate=f"{rate:.1f}/s", note=self.note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error is None and self.worker.is_main:
            self.advance(0)
            now = time.monotonic()
            photos = f"{self.done} photos, {self._rate(now):.1f}/s, " if self.done > self.skipped else ""
            skipped = f"{self.skipped} done before, " if self.skipped else ""
            note = f" ({self.note})" if self.note else ""
            print(f"{self.stage}: {photos}{skipped}{now - self.start:.1f} s{note}", flush=True)
