# SPDX-License-Identifier: MIT
"""Parallelism over batches: how far ahead, at what cost, and torch's own threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from namedmask.threads import (
    LANES,
    kernels_on_one_thread,
    limit_torch_threads,
    map_ahead,
    thread_count,
    use_one_torch_thread,
)


@pytest.fixture
def torch_threads():
    """Torch on three threads; restores their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("costs", "limit", "taken"),
    [
        ([1] * 20, 0, 7),  # two per thread, and the next one
        ([1] * 20, 4, 5),
        ([2, 2, 1, 1], 4, 3),
        ([2, 2, 1, 1], 3, 2),
        ([9, 1, 1, 1], 4, 2),  # alone
        ([1, 9, 1, 1], 4, 2),
        ([0] * 20, 1, 7),
    ],
)
def test_items_are_taken_ahead_up_to_a_number_and_a_cost(costs, limit, taken):
    seen = []
    items = (seen.append(cost) or (number, cost) for number, cost in enumerate(costs))
    results = map_ahead(lambda item: item[0], items, 3, cost=lambda item: item[1], limit=limit)
    assert next(results) == 0 and len(seen) == taken
    assert list(results) == list(range(1, len(costs)))


@pytest.mark.parametrize("ahead, taken", [(0, 6), (4, 6), (10, 11)])
def test_a_batch_is_computed_ahead(ahead, taken):
    seen = []
    results = map_ahead(str, (seen.append(n) or n for n in range(30)), 3, ahead=ahead)
    assert [next(results) for _ in range(8)] == list("01234567") and len(seen) == taken + 8
    assert list(results) == list(map(str, range(8, 30)))


def test_cost_of_an_item_is_freed_when_the_caller_asks_for_the_next():
    seen = []
    results = map_ahead(str, (seen.append(n) or n for n in range(6)), 3, cost=lambda _: 2, limit=4)
    assert [(next(results), len(seen)) for _ in range(3)] == [("0", 3), ("1", 4), ("2", 5)]
    assert list(map_ahead(str, range(9), 2)) == list("012345678")


def test_what_has_not_begun_is_dropped_when_the_caller_stops():
    begun, go = [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            go.wait(10)
        return number

    results = map_ahead(work, range(10), 1)
    assert next(results) == 0
    threading.Timer(0.05, go.set).start()
    results.close()
    assert begun in ([0], [0, 1])


def test_each_thread_is_initialized_and_errors_come_in_their_place():
    started = []
    results = map_ahead(lambda n: 6 // n, [1, 2, 0, 3], 2, initializer=lambda: started.append(time.monotonic()))
    assert [next(results), next(results)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert 1 <= len(started) <= 2


def test_torch_threads(monkeypatch, torch_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert thread_count() == 2
    with kernels_on_one_thread("cpu") as threads:
        assert threads == 2 and torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError), kernels_on_one_thread("cpu"):
        raise RuntimeError
    assert torch.get_num_threads() == 3
    with kernels_on_one_thread("cuda:0") as threads:
        assert threads == LANES and torch.get_num_threads() == 3
    limit_torch_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    limit_torch_threads()
    assert torch.get_num_threads() == 2
    use_one_torch_thread()
    assert torch.get_num_threads() == 1
