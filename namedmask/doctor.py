# SPDX-License-Identifier: MIT
"""What `namedmask doctor` says: versions, devices, kernels and where weights are looked for."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "triton", "xformers", "numpy", "scipy", "pillow")


def examine() -> Iterator[str]:
    """The lines of the doctor's report; nothing is computed and nothing is fetched."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from namedmask_kernels import backends

    yield f"namedmask {version('namedmask')}, Python {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        try:
            yield f"  {name} {version(name)}{_import_problem(name)}"
        except PackageNotFoundError:
            yield f"  {name}: not installed"
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if (native := backends.native()) is not None:
        yield f"  C++ kernels for {native.level()} (NMK_LEVEL chooses another)"
    if not torch.cuda.is_available():
        yield "cuda: no device" + ("" if torch.version.cuda else " (this torch is built without CUDA)")
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        yield f"cuda:{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    yield "kernels"
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for op in sorted(backends.IMPLEMENTATIONS):
            obstacles = {b: backends.obstacle(op, b, torch.device(device)) for b in backends.ORDER}
            runs = ", ".join(b for b, reason in obstacles.items() if reason is None)
            not_here = "; ".join(f"{b}: {reason}" for b, reason in obstacles.items() if reason)
            yield f"  {op} on {device}: {runs} ({not_here})"
    yield "weights"
    yield f"  fetched by timm and open_clip into {HF_HUB_CACHE} (HF_HOME moves it), {_size(HF_HUB_CACHE)}"
    yield "  or given as local files: --clip-weights, --backbone-weights, --embeddings"


def _import_problem(package: str) -> str:
    """xformers installs anywhere but loads only beside the CUDA that it was built for."""
    if package != "xformers":
        return ""
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:
        return f", cannot be loaded: {str(error).splitlines()[0]}"
    return ""


def _size(folder: str) -> str:
    models = len(list(Path(folder).glob("models--*")))
    return f"{models} models there" if models else "nothing there yet"
