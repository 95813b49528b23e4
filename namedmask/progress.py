# SPDX-License-Identifier: MIT
"""Messages and progress of the pipeline. It prints nothing itself: messages go to the logger "namedmask", progress to
the listener of the caller. `console` prints both for the commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

from .distributed import Worker

logger = logging.getLogger("namedmask")
logger.addHandler(logging.NullHandler())  # else Python would print warnings
warn = logger.warning


@contextmanager
def handling(handler: logging.Handler) -> Iterator[None]:
    """Within the context, messages go to this handler, and not to the root logger: other libraries give it a handler,
    which would print them again."""
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of a stage, over all workers.

    Attributes:
        stage: Name of the stage, such as "pseudolabel".
        done: Number of photos processed so far, including the skipped ones.
        total: Number of photos to process; 0 if it is not known.
        note: A short text, such as the loss of a training; "" if there is none.
        skipped: Number of photos whose results already existed.
        seconds: Seconds since the stage began.
        finished: Whether this is the last event of the stage. A stage that fails has none.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    skipped: int = 0
    seconds: float = 0.0
    finished: bool = False

    @property
    def rate(self) -> float:
        """Photos per second, without the skipped ones."""
        return (self.done - self.skipped) / max(self.seconds, 1e-9)


Listener = Callable[[ProgressEvent], object]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Within the context, stages that this thread runs report their progress to `listener`. None: to nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def current_listener() -> Listener | None:
    """The listener of the context."""
    return _listener.get()


class Progress:
    """Progress of a stage, over all workers. The main worker reports it to the listener of the context.

    Use it as a context manager.

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
        self.listener = current_listener() if worker.is_main else None

    def __enter__(self) -> Progress:
        self.start = time.monotonic()
        return self

    def advance(self, photos: int, existing: bool = False) -> None:
        """Counts photos of this worker as done.

        Args:
            photos: Number of photos.
            existing: The results already existed. Such photos do not count toward the rate.
        """
        self._count(photos, existing)
        self._report()

    def advance_new(self, photos: int, existing: bool = False) -> None:
        """As `advance`, for a second pass over the same photos: existing results have been counted."""
        if not existing:
            self.advance(photos)

    def _count(self, photos: int, existing: bool = False) -> None:
        self.skipped = self.worker.count_done(f"{self.stage}/skipped", photos if existing else 0)
        self.done = self.worker.count_done(self.stage, photos)

    def _report(self, finished: bool = False) -> None:
        if self.listener is not None:
            seconds = time.monotonic() - self.start
            event = ProgressEvent(self.stage, self.done, self.total, self.note, self.skipped, seconds, finished)
            self.listener(event)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.worker.is_main:
            self._count(0)
            self._report(finished=True)
