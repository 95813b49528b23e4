# SPDX-License-Identifier: MIT
"""What a command prints while it runs: the messages of the logger "namedmask", and the progress of stages as a bar in a
terminal, otherwise as a line from time to time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import counted
from .process import complain
from .progress import ProgressEvent, handling, listening

if TYPE_CHECKING:
    from rich import progress as rich
    from rich.console import Console

LINE_EVERY = 10.0  # seconds between lines, if the output is not a terminal


@contextmanager
def printing() -> Iterator[Printer]:
    """Within the context, messages and progress are printed: messages and progress on stdout, warnings on stderr."""
    printer = Printer()
    try:
        with handling(printer), listening(printer.show):
            yield printer
    finally:
        printer.close_bar()


def plain_console() -> Console:
    """A console of rich that prints text as it is. By default, names such as "[red]" would color what follows."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


class Printer(logging.Handler):
    """Prints messages, and the progress of one stage at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: rich.Progress | None = None
        self.last_line = 0.0  # in seconds since the stage began

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            complain(f"warning: {record.getMessage()}")
        else:
            print(record.getMessage(), flush=True)

    def show(self, event: ProgressEvent) -> None:
        """Prints the progress of a stage."""
        note = f" ({event.note})" if event.note else ""
        if sys.stdout.isatty():
            self._draw(event)
        elif event.seconds - self.last_line > LINE_EVERY:
            self.last_line = event.seconds
            left = f", {(event.total - event.done) / event.rate:.0f} s left" if event.rate else ""
            done = f"{event.done:,} of {counted(event.total, 'photo')}"
            print(f"{event.stage}: {done}, {event.rate:.1f}/s{left}{note}", flush=True)
        if event.finished:
            self.close_bar()
            self.last_line = 0.0
            photos = f"{counted(event.done, 'photo')}, {event.rate:.1f}/s, " if event.done > event.skipped else ""
            skipped = f"{event.skipped} done before, " if event.skipped else ""
            print(f"{event.stage}: {photos}{skipped}{event.seconds:.1f} s{note}", flush=True)

    def _draw(self, event: ProgressEvent) -> None:
        from rich import progress as rich

        if self.bar is None:
            if event.finished:
                return
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
            self.task = self.bar.add_task(event.stage, total=event.total, rate="", note="")
        self.bar.update(self.task, completed=event.done, total=event.total, rate=f"{event.rate:.1f}/s", note=event.note)

    def close_bar(self) -> None:
        """Ends the bar of a stage, also of one that has failed."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
