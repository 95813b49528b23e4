# SPDX-License-Identifier: MIT
"""Threads that each take a piece of work through all its kernels, instead of kernels that share each piece out.

Kernels that share a piece wait for each other at the end of every one, and much longer where somebody else uses a core
too; pieces of work that go their own way never do. It also makes results independent of the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count() -> int:
    """Threads for this process: OMP_NUM_THREADS, which the launcher of several workers sets, or one a core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """`function` of each item, in order, computed in threads ahead of the caller; at most two items a thread wait.

    prepare: called first in every thread
    """
    pool = ThreadPoolExecutor(threads, initializer=prepare)
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # the caller may stop early


def one_torch_thread() -> None:
    """Torch's kernels, called from this thread, stay in it. Threads that have called torch before are not affected."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def kernels_on_one_thread(device: str) -> Iterator[int]:
    """Gives the number of threads to spread pieces of work over; on the CPU torch's kernels run on one each meanwhile.

    device: as torch names it; work for a GPU comes from one thread.
    """
    import torch

    if device != "cpu":
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield thread_count()
    finally:
        torch.set_num_threads(before)
