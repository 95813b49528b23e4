# SPDX-License-Identifier: MIT
"""`namedmask doctor`: versions, devices, available kernels, plugins and where weights are stored."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from . import hub, registry
from .config import RunConfig
from .errors import counted, first_line
from .stages import STAGES

PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "triton", "xformers", "numpy", "scipy", "pillow")


def examine() -> Iterator[str]:
    """Yields the lines of the report. Computes nothing and downloads nothing."""
    import torch

    from namedmask_kernels import backends
    from namedmask_kernels.threads import usable_cores

    from . import linear
    from .threads import thread_count

    yield f"namedmask {version('namedmask')}, Python {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        try:
            yield f"  {name} {version(name)}{_import_problem(name)}"
        except PackageNotFoundError:
            yield f"  {name}: not installed"
    cores, threads = counted(os.cpu_count() or 1, "core"), counted(thread_count(), "thread")
    yield f"cpu: {cores}, of which this process may use {usable_cores()}; {threads}"
    if (native := backends.native()) is not None:
        yield f"  C++ kernels for {native.level()} (set NMK_LEVEL to choose another)"
    yield f"  with --precision bfloat16: {linear.explain(torch.device('cpu'), torch.bfloat16)}"
    if not torch.cuda.is_available():
        yield "cuda: no device" + ("" if torch.version.cuda else " (this torch is built without CUDA)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    yield "kernels"
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for op in sorted(backends.IMPLEMENTATIONS):
            obstacles = {b: backends.obstacle(op, b, torch.device(device)) for b in backends.ORDER}
            available = ", ".join(b for b, reason in obstacles.items() if reason is None)
            unavailable = "; ".join(f"{b}: {reason}" for b, reason in obstacles.items() if reason)
            yield f"  {op} on {device}: {available} ({unavailable})"
    yield "plugins with models"
    for plugin in registry.plugins():
        yield f"  {plugin.name} ({plugin.value})"
    yield "weights"
    for one in hub.needed(RunConfig(photos=""), STAGES):
        yield f"  {one.what}: {one.cached() or 'not downloaded; `namedmask fetch` does it'}"
    for cache in hub.caches():
        yield f"  cache: {cache}"
    yield "  or passed as local files: --clip-weights, --backbone-weights, --encoder-weights, --detector-weights"


def _import_problem(package: str) -> str:
    """What is wrong with a package whose builds depend on the version of torch or CUDA."""
    if package not in ("torchvision", "xformers"):
        return ""
    try:
        importlib.import_module("xformers.ops" if package == "xformers" else package)
    except (ImportError, OSError, RuntimeError) as error:
        return f", cannot be imported: {first_line(error)}"
    return ""
