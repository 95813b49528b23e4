# SPDX-License-Identifier: MIT
"""Where the time of a stage goes: the time of each step, how long the device was busy, and a trace."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

UNTRACED, TRACED = 2, 8  # batches before the trace, and in it
MOST_INTERVALS = 4096  # until those that overlap are merged


class StepTimes:
    """Times the steps of batches that several threads process.

    On a GPU, a step lasts from the moment that its stream reaches its first kernel until it has finished its last one.
    Nothing is waited for: `collect` reads the times of a batch when its results are there.

    Attributes:
        seconds: Time of each step so far, summed over threads.
    """

    def __init__(self, device: str):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._on_gpu = device != "cpu"
        self._own = threading.local()
        self._lock = threading.Lock()
        self._intervals: list[tuple[float, float]] = []  # of the steps, in seconds after the start
        self._busy = 0.0  # seconds until `_until` in which a step was running
        self._until = 0.0
        if self._on_gpu:
            with torch.cuda.device(device):  # of the threads that process batches
                self._origin = self._now()
                torch.cuda.synchronize()  # so that it is the time of `_start`
        else:
            self._origin = self._now()
        self._start = time.perf_counter()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times what runs on the device within the context."""
        with torch.profiler.record_function(name):
            begin = self._now()
            yield
            self._pending.append((name, begin, self._now()))

    @contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Times what runs on the CPU within the context, in parallel with the device."""
        begin = time.perf_counter()
        yield
        with self._lock:
            self.seconds[name] += time.perf_counter() - begin

    def collect(self) -> None:
        """Adds the times of this thread's steps, whose results must be there."""
        pending, self._own.pending = self._pending, []
        if self._on_gpu and pending:
            pending[-1][2].synchronize()  # the end of the last step was recorded after its results came
        with self._lock:
            for name, begin, end in pending:
                at = self._after(self._origin, begin), self._after(self._origin, end)
                self.seconds[name] += at[1] - at[0]
                self._intervals.append(at)
            if len(self._intervals) > MOST_INTERVALS:
                self._merge()

    def busy(self) -> float:
        """The share of the time since the start in which a step was running, in [0, 1].

        It is an upper bound of the share in which kernels were running: steps include the gaps between their kernels.
        """
        with self._lock:
            self._merge()
            return min(1.0, self._busy / max(time.perf_counter() - self._start, 1e-9))

    def _merge(self) -> None:
        """Replaces the intervals by their total length. A later one that began before their end counts from there."""
        for first, last in sorted(self._intervals):
            self._busy += max(0.0, last - max(first, self._until))
            self._until = max(self._until, last)
        self._intervals.clear()

    def summary(self) -> str:
        """The times in words."""
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        return f"summed over threads: {steps}; {1 - self.busy():.0%} of the time no batch was ready"

    @property
    def _pending(self) -> list[tuple[str, Any, Any]]:
        if not hasattr(self._own, "pending"):
            self._own.pending = []
        return self._own.pending

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _after(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin


def traced(batches: Iterator[Any], path: Path | None) -> Iterator[Any]:
    """Yields `batches`; writes torch's profiler trace of some of the first ones to `path`, for chrome://tracing."""
    if path is None:
        yield from batches
        return
    yield from itertools.islice(batches, UNTRACED)
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=everywhere) as profiler:
        yield from itertools.islice(batches, TRACED)
    profiler.export_chrome_trace(str(path))
    yield from batches
