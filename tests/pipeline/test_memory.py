# SPDX-License-Identifier: MIT
"""The memory that photos in flight may take."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from namedmask import photos
from namedmask.memory import MIN_BUDGET, MemoryBudget, available_memory, photo_budget, processing_budget
from namedmask.photos import PhotoSource, decode_ahead
from namedmask.threads import map_ahead

MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_available_memory_respects_control_groups(tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_memory(tmp_path) == 8000 << 10
    group = "sys/fs/cgroup/a/memory."
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            group + "max": "5000000\n",
            group + "current": "2000000\n",
            group + "stat": "anon 1\ninactive_file 300000\n",
        },
    )
    assert available_memory(tmp_path) == 3_300_000
    group = "sys/fs/cgroup/memory/memory."
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/docker/1\n",
            group + "limit_in_bytes": "1000000\n",
            group + "usage_in_bytes": "600000\n",
            group + "stat": "total_inactive_file 1000\n",
        },
    )
    assert available_memory(tmp_path) == 401_000
    write(tmp_path, {group + "stat": "anon 1\n"})
    assert available_memory(tmp_path) == 400_000
    write(tmp_path, {group + "usage_in_bytes": "1000001\n"})
    assert available_memory(tmp_path) == 0
    write(tmp_path, {group + "usage_in_bytes": "1000000\n", group + "stat": "total_inactive_file 1\n"})
    assert available_memory(tmp_path) == 1


def test_without_meminfo_all_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    assert available_memory(tmp_path) == 4_096_000
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\n"})
    assert available_memory(tmp_path) == 4_096_000


def test_budget_follows_memory_and_threads(monkeypatch):
    monkeypatch.setattr("namedmask_kernels.threads.usable_cores", lambda: 16)
    for threads, available, budget in (
        (16, 64 << 30, 6 << 30),
        (16, 8 << 30, 4 << 30),
        (4, 16 << 30, 2 << 30),
        (4, 64 << 30, 4 << 30),  # the least cap
        (32, 6 << 30, 3 << 30),  # more threads than cores
        (16, 0, MIN_BUDGET),  # a limit of 0 would be none
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        monkeypatch.setattr("namedmask.memory.available_memory", lambda available=available: available)
        assert photo_budget() == MemoryBudget().limit == budget
        assert processing_budget() == budget * 3 // 4


def test_what_fits_exactly_does_not_wait():
    budget = MemoryBudget(10)
    with budget.hold(6), budget.hold(4):
        pass
    held, waited = threading.Event(), threading.Event()

    def wait():
        with budget.hold(5):
            held.set()
        waited.set()

    with budget.hold(6):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not held.wait(0.05)
    assert waited.wait(10)
    with budget.hold(11):  # alone, since nothing is held any more
        pass


def test_held_memory_stays_below_the_limit_and_large_photos_are_alone():
    budget, lock, used, most = MemoryBudget(10), threading.Lock(), 0, 0

    def work(amount):
        nonlocal used, most
        with budget.hold(amount):
            with lock:
                used += amount
                most = max(most, used)
                assert used <= 10 or used == amount
            time.sleep(0.001)
            with lock:
                used -= amount

    list(map_ahead(work, [3, 4, 25, 5, 1, 30, 2] * 10, 8))
    assert most == 30 and used == 0


def test_map_ahead_limits_the_cost_in_flight():
    live, most = 0, 0
    lock = threading.Lock()

    def work(cost):
        nonlocal live, most
        with lock:
            live += cost
            most = max(most, live if live > cost else 0)
        return cost

    results = map_ahead(work, [2, 2, 7, 2, 50, 1, 1, 1, 1, 1, 1, 1, 1, 1] * 5, 8, cost=lambda cost: cost, limit=9)
    for result in results:
        time.sleep(0.0005)
        with lock:
            live -= result
    assert live == 0 and most == 9
    assert list(map_ahead(str, range(30), 4)) == [str(i) for i in range(30)]


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "F"])
def test_large_photos_are_decoded_one_at_a_time(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(photos, "photo_budget", lambda: 1 << 20)
    pixels = np.full((300, 300), 200)
    image = Image.fromarray(pixels.astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    names = [f"{i}.tif" for i in range(6)]
    for name in names:
        (image.convert("RGB") if mode == "RGB" else image).save(tmp_path / name)
    source, decoding, most = PhotoSource(tmp_path), 0, 0

    def decode(name):
        nonlocal decoding, most
        decoding += 1
        most = max(most, decoding)
        time.sleep(0.01)
        photo = source.decode(name)
        decoding -= 1
        return photo

    assert source.decoding_cost("0.tif") > 90_000 * 16
    assert [name for name, _ in decode_ahead(source, names, decode)] == names
    assert most == 1
