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
    quotas = (quota for folder in cgroup_folders("cpu", Path(root)) for quota in _quota(folder))
    return max(1, min([cores, *map(math.ceil, quotas)]))


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of this process's cgroups that have a controller, and of all cgroups around them; version 1 and 2.

    Args:
        controller: Its name, such as "cpu" or "memory".
        root: Folder with `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        for folder in (group := mount / path.lstrip("/"), *group.parents):
            yield folder
            if folder == mount:  # a container sees its own cgroup here, whatever path it reads
                break


def _quota(folder: Path) -> Iterator[float]:
    """The CPU quota of a cgroup in cores, if it has one."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and float(quota) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no quota at this level
        return
