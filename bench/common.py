# SPDX-License-Identifier: MIT
"""Shared code of the benches: interleaved timing, numbers of threads, synthetic features, and tables of results.

with threads(1):
    seconds = paired_medians({"ours": ours, "peer": peer}, rounds=20)
report("operator, 512x683", [{"method": name, "ms": 1e3 * s} for name, s in seconds.items()])
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from scipy import ndimage

CHANNELS = 384  # of a ViT-S
QUICK = False  # --quick: one round each, to check that benches run


def scene(side: int, seed: int = 0) -> np.ndarray:
    """Features of two objects before a background that varies slowly, float32 [side, side, 384].

    All features share a direction and noise is strong, so that the affinity graph is connected and its second
    eigenvalue is 0.3 to 0.8, as for the tokens of a ViT.
    """
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
    """Median seconds of each call. Calls are interleaved, so that slow phases of the machine affect all of them.

    Args:
        calls: Functions by name. Each is called once before timing starts, except with --quick.
        rounds: Maximum number of rounds, in each of which every call is timed once; one with --quick.
        seconds: Maximum duration; at least three rounds are run.
        pause: Seconds to wait before each timed call. OpenBLAS's threads keep spinning for up to 0.1 s after a product,
            which slows down the next call on more than one thread; 0.2 avoids it.
    """
    for call in () if QUICK else calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for round_number in range(1 if QUICK else rounds):
        if round_number >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(durations) for name, durations in times.items()}


def _openblas() -> Iterator[tuple[Callable[[int], None], Callable[[], int]]]:
    """(setter, getter) of the number of threads, for each OpenBLAS in this process (numpy and scipy have one each)."""
    paths = set(re.findall(r"/\S*openblas\S*", Path("/proc/self/maps").read_text()))
    for library in map(ctypes.CDLL, paths):
        for form in ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads"):
            if hasattr(library, form.format("set")):
                yield getattr(library, form.format("set")), getattr(library, form.format("get"))
                break


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the context, torch, our kernels, OpenCV and the OpenBLAS of numpy and scipy use `count` threads.

    torch.set_num_threads sets the number for our OpenMP regions too, because both use the same libgomp.
    """
    libraries = [(torch.set_num_threads, torch.get_num_threads), *_openblas()]
    if cv2 := sys.modules.get("cv2"):
        libraries.append((cv2.setNumThreads, cv2.getNumThreads))
    before = [get() for _, get in libraries]
    for set_threads, _ in libraries:
        set_threads(count)
    try:
        yield
    finally:
        for (set_threads, _), n in zip(libraries, before, strict=True):
            set_threads(n)


def on_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """Wraps `call` to run our kernels on `count` threads. Use it within a `threads` context, which restores the number.

    torch.set_num_threads takes microseconds; `threads` takes milliseconds, as OpenBLAS starts and ends its threads.
    """

    def run():
        torch.set_num_threads(count)
        call()

    return run


def blob_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth blobs that cover half of a mask, bool [height, width]."""
    noise = ndimage.gaussian_filter(rng.random((height, width)), 6)
    return noise > np.median(noise)


def compare(
    title: str,
    calls: Mapping[str, Callable[[], object]],
    benchmark,
    *,
    same: Callable[[object, object], None] = np.testing.assert_array_equal,
    count: int = 1,
    rounds: int = 30,
    seconds: float = 120.0,
    moved: int = 0,
) -> None:
    """Checks that all calls return the same, then times them on `count` threads and reports them, ours first.

    Args:
        title: Title of the table.
        calls: The calls by method, ours first.
        benchmark: Fixture of pytest-benchmark, which times our call.
        same: Takes our result and another one, and raises AssertionError if they differ.
        count: Number of threads.
        rounds: As in `paired_medians`.
        seconds: As in `paired_medians`.
        moved: Bytes that our call must read and write at least. Their bandwidth is compared with that of one thread
            that copies an array of this size, times `count`.
    """
    ours, *others = calls.values()
    for other in others:
        same(ours(), other())
    with threads(count):
        medians = paired_medians(calls, rounds, seconds)
        benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
        ceiling = copy_bandwidth(2 * moved) * count if moved else 0.0
    ours_seconds = next(iter(medians.values()))
    rows = [{"method": method, "ms": 1e3 * s, "time / ours": s / ours_seconds} for method, s in medians.items()]
    if moved:
        rows[0] |= {"GB/s": moved / ours_seconds / 1e9, "share of a copy's": moved / ours_seconds / ceiling}
    report(title, rows)


def report_two_threads(title: str, call: Callable[[], object], images: int, benchmark, rounds: int, seconds: float):
    """Reports the median time of a call that processes `images` images, on one thread and on two."""
    with threads(2):
        medians = paired_medians({f"{n} threads": on_threads(n, call) for n in (1, 2)}, rounds, seconds)
        benchmark.pedantic(call, rounds=3)
    report(
        title,
        [
            {"method": method, "ms": 1e3 * s, "images/s": images / s, "speedup": medians["1 threads"] / s}
            for method, s in medians.items()
        ],
    )


def resident_memory(which: str = "VmHWM") -> float:
    """Resident memory of this process in MiB: "VmHWM" is the peak, "VmRSS" the current value.

    getrusage would include the memory of the parent of a new process.
    """
    return int(re.search(rf"{which}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak_memory() -> None:
    """Resets the peak of resident memory, after freed memory has been returned to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def copy_bandwidth(bytes_moved: int = 1 << 28) -> float:
    """Bytes per second, read plus written, of one thread that copies an array of `bytes_moved` / 2 bytes.

    It is the ceiling of bandwidth-bound kernels. 256 MB measures the memory, a size that fits into a cache that cache.
    """
    source = np.ones(bytes_moved // 2, np.uint8)
    target = np.empty_like(source)
    repeats = max(1, (1 << 26) // bytes_moved)

    def copy():
        for _ in range(repeats):
            np.copyto(target, source)

    return repeats * bytes_moved / paired_medians({"copy": copy}, rounds=7)["copy"]


def matrix_rate(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOP/s of a square matrix product, the ceiling of convolutions and linear layers."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / paired_medians({"": lambda: a @ a}, rounds=10)[""]


def require_gpu(title: str) -> None:
    """Skips the bench if there is no GPU, and reports that in its table."""
    if not torch.cuda.is_available():
        report(title, [{"method": "cuda: absent (no CUDA device)"}])
        pytest.skip("no CUDA device")


def device_median(call: Callable[[], object], rounds: int = 30, seconds: float = 1.0) -> float:
    """Median seconds between CUDA events around a call, after three untimed calls.

    Args:
        call: Function to time.
        rounds: Maximum number of timed calls; one with --quick.
        seconds: Maximum duration; at least five calls are timed.
    """
    durations = []
    deadline = time.perf_counter() + seconds
    for round_number in range(3 + (1 if QUICK else rounds)):
        if round_number >= 8 and time.perf_counter() > deadline:
            break
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if round_number >= 3:
            durations.append(start.elapsed_time(end) / 1e3)
    return statistics.median(durations)


class Work(NamedTuple):
    """What a call on a GPU has to do at least.

    Attributes:
        bytes: Read and written.
        flops: Of products of `dtype`.
        images: Number of images, if not that of the table.
    """

    bytes: float = 0
    flops: float = 0
    dtype: torch.dtype = torch.float16
    images: int = 0

    def rates(self, seconds: float) -> dict[str, float]:
        """Columns of a table: the work, what is done per second, and its share of the ceiling of this GPU."""
        columns = {}
        if self.bytes:
            rate = self.bytes / seconds
            columns |= {"MB": self.bytes / 1e6, "GB/s": rate / 1e9, "share of a copy's": rate / device_copy_bandwidth()}
        if self.flops:
            rate = self.flops / seconds
            share = rate / device_matrix_rate(self.dtype)
            columns |= {"GFLOP": self.flops / 1e9, "TFLOP/s": rate / 1e12, "share of a product's": share}
        return columns


def report_gpu(title: str, make: Callable[[], Iterator[tuple]], images: int, benchmark) -> None:
    """Reports median times on a GPU, and the ceilings measured in the same run; skips the bench if there is no GPU.

    Args:
        title: Title of the table.
        make: Moves the data to the GPU, checks the results, and yields for each call to time, ours first, its name, the
            call (None: it cannot run here) and, if it is known, its `Work`.
        images: Number of images that a call processes.
        benchmark: Fixture of pytest-benchmark.
    """
    require_gpu(title)
    rows, ceilings = [], {}
    for method, call, *stated in make():
        if call is None:
            rows.append({"method": f"{method}: absent"})
            continue
        if not rows:
            benchmark.pedantic(lambda call=call: (call(), torch.cuda.synchronize()), rounds=10)
        work = stated[0] if stated else Work()
        seconds = device_median(call)
        row = {"method": method, "ms": 1e3 * seconds, "ms per image": 1e3 * seconds / (work.images or images)}
        rows.append(row | work.rates(seconds))
        if work.bytes:
            ceilings["ceiling: a copy of 1 GiB"] = {"GB/s": device_copy_bandwidth() / 1e9}
        if work.flops:
            name = f"ceiling: a product of {str(work.dtype)[6:]} matrices"
            ceilings[name] = {"TFLOP/s": device_matrix_rate(work.dtype) / 1e12}
    report(title, rows + [{"method": name} | rate for name, rate in ceilings.items()])


@functools.cache
def device_copy_bandwidth() -> float:
    """Bytes per second, read plus written, of the GPU when it copies 1 GiB."""
    source = torch.ones(1 << (20 if QUICK else 30), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_median(lambda: target.copy_(source))


@functools.cache
def device_matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the GPU in a square product of torch; float32 without TF32."""
    size = 128 if QUICK else 8192
    a = torch.ones(size, size, dtype=dtype, device="cuda")
    return 2 * size**3 / device_median(lambda: a @ a)


def machine() -> str:
    """Name of the processor and number of threads of this process."""
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{match.group(1) if match else platform.machine()}, {torch.get_num_threads()} threads"


_reported: list[tuple[str, list[str], list[list[str]]]] = []


def results_page() -> str:
    """All tables that `report` has printed in this process, as Markdown."""
    lines = [
        "# Results of the benches",
        "",
        f"Generated by `pytest {shlex.join(sys.argv[1:])}`; do not edit by hand.",
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
    """Prints rows as a table, floats with three significant digits, and keeps it for `results_page`."""
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
