# SPDX-License-Identifier: MIT
"""How much memory the photos in flight may take.

A photo of 48 megapixels takes gigabytes while it is decoded, refined or segmented. Stages therefore limit not only the
number of photos in flight but also their bytes, which they estimate from the number of pixels. A photo above the limit
is processed alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .threads import thread_count

MIN_BUDGET = 64 << 20  # bytes, even if less is available: 0 would be no limit
MIN_CAP = 4 << 30  # bytes
CAP_PER_THREAD = 384 << 20  # bytes; a ResNet-50 segmenter takes this much for half a megapixel
BATCH_PIXELS = 1 << 24  # maximum number of pixels in a batch of several photos

DECODE_SHARE = 0.25  # of the budget; the rest is for what follows
CACHE_SHARE = DECODE_SHARE / 4  # of the budget, for what is read from URLs; it is part of DECODE_SHARE


def photo_budget() -> int:
    """Bytes that the photos in flight in this process may take.

    It is half of the available memory, in proportion to the threads of this process per usable core, and at most
    384 MiB per thread or 4 GiB, whichever is more.
    """
    from namedmask_kernels.threads import usable_cores

    threads = thread_count()
    share = available_memory() / 2 * min(1.0, threads / usable_cores())
    return max(MIN_BUDGET, int(min(share, max(MIN_CAP, CAP_PER_THREAD * threads))))


def processing_budget() -> int:
    """The part of `photo_budget` for photos that are decoded."""
    return int(photo_budget() * (1 - DECODE_SHARE))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that are available to this process, by /proc/meminfo and the limits of its control groups."""
    from namedmask_kernels.threads import cgroup_folders

    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([available, *(left for folder in cgroup_folders("memory", root) for left in _left(folder))]))


def _left(folder: Path) -> Iterator[int]:
    """What a cgroup leaves to its processes, if it has a limit."""
    if (folder / "memory.max").exists():
        limit, usage, reclaimable = "memory.max", "memory.current", "inactive_file"
    else:
        limit, usage, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield most - used + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):  # no limit at this level
        return


class MemoryBudget:
    """Limits the bytes that several threads use at once.

    Args:
        limit: Bytes; None: those of `photo_budget`.
    """

    def __init__(self, limit: int | None = None):
        self.limit = photo_budget() if limit is None else limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Waits until `amount` bytes fit into the budget, or until nobody else holds any, and holds them.

        A thread must not hold twice at a time.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + amount <= self.limit)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()
