# SPDX-License-Identifier: MIT
"""Number of threads: the cores that this process may use, and a single thread in forked children."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: str | os.PathLike[str] = "/") -> int:
    """Number of cores that this process may use: its CPU affinity, or its cgroup's CPU quota, rounded up, if lower.

    Args:
        root: Folder with `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas(Path(root)))]))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's cgroup and of all cgroups around it, of version 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        for folder in (group := mount / path.lstrip("/"), *group.parents):
            yield from _quota(folder)
            if folder == mount:  # a container sees its own cgroup here, whatever path it reads
                break


def _quota(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and float(quota) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no quota at this level
        return
