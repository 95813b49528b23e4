# SPDX-License-Identifier: MIT
"""What the benches share: fair timing on a noisy machine, one thread for every library, a scene and a table.

with one_thread():
    seconds = paired_medians({"ours": ours, "peer": peer}, rounds=20)
report("operator, 512x683", [{"who": n, "ms": 1e3 * s} for n, s in seconds.items()])
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table

CHANNELS = 384  # of a ViT-S
QUICK = False  # --quick: three turns each, to see that benches still run


def scene(side: int, seed: int = 0) -> np.ndarray:
    """float32 [side, side, 384]: two objects before a background that varies slowly; all share a direction, and noise
    is strong, so that the graph hangs together (second eigenvalues of 0.3 to 0.8, as of a ViT's tokens)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    shared = 0.9 * rng.normal(size=CHANNELS)
    features = shared + rng.normal(size=CHANNELS) + 0.5 * np.sin(3 * x + y)[..., None] * rng.normal(size=CHANNELS)
    for cy, cx, radius in rng.uniform([0.3, 0.3, 0.12], [0.7, 0.7, 0.3], (2, 3)):
        features[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = shared + rng.normal(size=CHANNELS)
    return (features + 1.6 * rng.normal(size=features.shape)).astype(np.float32)


def paired_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15, seconds: float = 120.0, pause: float = 0.0
) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a slow spell of the machine hits all alike.

    Every call runs once unmeasured first. Stops after `rounds` turns, or after `seconds` (three turns at least).
    `pause`: seconds before each timed call. OpenBLAS's threads spin for some milliseconds after a product, on the cores
    of whoever comes next: 0.05 where that is a peer and more than one thread counts.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(3 if QUICK else rounds):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _openblas() -> Iterator[tuple[Callable[[int], None], Callable[[], int]]]:
    """(set, get) of the number of threads, for every OpenBLAS in this process (numpy and scipy bring one each)."""
    paths = set(re.findall(r"/\S*openblas\S*", Path("/proc/self/maps").read_text()))
    for library in map(ctypes.CDLL, paths):
        for form in ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads"):
            if hasattr(library, form.format("set")):
                yield getattr(library, form.format("set")), getattr(library, form.format("get"))
                break


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads for torch, our kernels and numpy's and scipy's OpenBLAS inside the block.

    Our OpenMP regions follow torch.set_num_threads: both use the one libgomp, whose setting torch changes for the
    calling thread.
    """
    before, blas = torch.get_num_threads(), list(_openblas())
    blas_before = [get() for _, get in blas]
    torch.set_num_threads(count)
    for set_threads, _ in blas:
        set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for (set_threads, _), n in zip(blas, blas_before, strict=True):
            set_threads(n)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """`threads(1)`."""
    return threads(1)


def on_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with our kernels on `count` threads, to be timed inside a `threads` block that puts things back.

    Setting torch's number takes microseconds; `threads` takes milliseconds, for OpenBLAS starts and ends its threads.
    """

    def run():
        torch.set_num_threads(count)
        call()

    return run


def report_two_threads(title: str, call: Callable[[], object], photos: int, benchmark, rounds: int, seconds: float):
    """Reports the median time of a call, of so many photos, on one thread and on two."""
    with threads(2):
        taken = paired_medians({f"{n} threads": on_threads(n, call) for n in (1, 2)}, rounds, seconds)
        benchmark.pedantic(call, rounds=3)
    report(
        title,
        [
            {"who": who, "ms": 1e3 * s, "photos/s": photos / s, "speedup": taken["1 threads"] / s}
            for who, s in taken.items()
        ],
    )


def resident(which: str = "VmHWM") -> float:
    """MiB of this process in memory: the peak, or "VmRSS" now.

    Not getrusage: what that tells of a new process counts its parent's memory too.
    """
    return int(re.search(rf"{which}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak() -> None:
    """Makes the peak start anew; memory that was freed goes back first, and so counts again when it is taken again."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def copy_bandwidth(bytes_moved: int = 1 << 28) -> float:
    """Bytes per second, read plus written, that one thread reaches when it copies an array of half `bytes_moved`.

    256 MB measures the memory; a size that fits a cache measures that cache. The ceiling for bandwidth-bound kernels.
    """
    source = np.ones(bytes_moved // 2, np.uint8)
    target = np.empty_like(source)
    repeats = max(1, (1 << 26) // bytes_moved)

    def copy():
        for _ in range(repeats):
            np.copyto(target, source)

    return repeats * bytes_moved / paired_medians({"copy": copy}, rounds=7)["copy"]


def matrix_rate(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Flops per second of a square matrix product: the ceiling of convolutions and linear layers."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / paired_medians({"": lambda: a @ a}, rounds=10)[""]


def needs_gpu(title: str) -> None:
    """Where there is no GPU: reports the table as absent and skips the bench."""
    if not torch.cuda.is_available():
        report(title, [{"who": "cuda: absent (no CUDA device here)"}])
        pytest.skip("no CUDA device here")


def device_median(call: Callable[[], object], rounds: int = 30) -> float:
    """Median seconds between CUDA events around a call, after three unmeasured ones."""
    taken = []
    for turn in range(3 + (3 if QUICK else rounds)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def on_gpu(title: str, make: Callable[[], Iterator[tuple[str, Callable]]], photos: int, benchmark) -> None:
    """Reports the median time of the calls that `make` yields with their names, or that there is no GPU.

    `make` moves the data to the GPU and checks the results. The first call is ours.
    """
    needs_gpu(title)
    calls = dict(make())
    first = next(iter(calls.values()))
    benchmark.pedantic(lambda: (first(), torch.cuda.synchronize()), rounds=10)
    seconds = {who: device_median(call) for who, call in calls.items()}
    report(title, [{"who": who, "ms": 1e3 * s, "ms a photo": 1e3 * s / photos} for who, s in seconds.items()])


def device_copy_bandwidth() -> float:
    """Bytes per second, read plus written, that the GPU reaches when it copies 1 GiB."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_median(lambda: target.copy_(source))


def machine() -> str:
    """The processor's name and how many of its cores this process sees."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found.group(1) if found else platform.machine()}, {torch.get_num_threads()} threads"


_reported: list[tuple[str, list[str], list[list[str]]]] = []


def results_page() -> str:
    """Everything that `report` has printed in this process, as Markdown."""
    lines = [
        "# What the benches printed",
        "",
        f"Made by `pytest {shlex.join(sys.argv[1:])}`; do not edit by hand.",
        f"{machine()}; {_levels()}, torch {torch.__version__}, numpy {np.__version__}, {platform.platform()}.",
    ]
    for title, columns, rows in _reported:
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def _levels() -> str:
    from namedmask_kernels import backends

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"C++ kernels for {backends.native().level()}, {gpu}"


def report(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows as a table with the machine's name; floats with three significant digits. Keeps them for the page."""
    table = Table()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    for line in cells:
        table.add_row(*line)
    Console(width=140).print(table)
    _reported.append((title, columns, cells))


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
