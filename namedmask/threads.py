# SPDX-License-Identifier: MIT
"""Parallelism over batches: each thread runs its batch through all kernels, and each kernel runs on one thread.

Kernels that run on several threads synchronize at their end, which takes much longer if another process uses one of the
cores. Threads that work on separate batches never wait for each other. It also makes results independent of the number
of threads.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from .process import omp_num_threads

LANES = 3  # threads per GPU that process batches

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count() -> int:
    """Number of threads of this process: OMP_NUM_THREADS, which is set for multiple workers, or its usable cores.

    Raises:
        UserError: If OMP_NUM_THREADS is malformed.
    """
    from namedmask_kernels.threads import usable_cores

    return omp_num_threads() or usable_cores()


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    initializer: Callable[[], None] | None = None,
    cost: Callable[[Item], int] | None = None,
    limit: int = 0,
    ahead: int = 0,
) -> Iterator[Result]:
    """Like `map`, but computes results in threads ahead of the caller, at most two per thread or `ahead`.

    Args:
        function: Called with each item, in one of the threads.
        items: The items.
        threads: Number of threads.
        initializer: Called once at the start of each thread.
        cost: Cost of an item, such as its bytes; None: 0.
        limit: Maximum total cost of the items whose results the caller has not finished with. An item that costs more
            is processed alone.
        ahead: Number of results that the caller takes at once, such as those of a batch. As many are computed while the
            caller is busy with the last ones, or two per thread if that is more.

    Yields:
        The result for each item, in order. An exception in `function` is raised where its result would be.
    """
    pool = ThreadPoolExecutor(threads, initializer=initializer)
    most = max(2 * threads, ahead + 1)  # the result that the caller is busy with counts, too
    pending: deque[tuple[Future[Result], int]] = deque()
    used = 0
    try:
        for item in items:
            needed = cost(item) if cost else 0
            while len(pending) >= most or (pending and used + needed > limit > 0):
                yield pending[0][0].result()
                used -= pending.popleft()[1]
            pending.append((pool.submit(function, item), needed))
            used += needed
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)  # the caller may stop early


def use_one_torch_thread() -> None:
    """Makes torch's kernels that are called from this thread run on one thread.

    It does not affect threads that have called torch before.
    """
    import torch

    torch.set_num_threads(1)


def limit_torch_threads() -> None:
    """Makes torch use at most `thread_count` threads. By itself it follows CPU affinity, but no CPU quota."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), thread_count()))


def map_batches(
    function: Callable[[Item], Result],
    batches: Iterable[Item],
    device: str,
    cost: Callable[[Item], int] | None = None,
    limit: int = 0,
) -> Iterator[Result]:
    """Like `map_ahead`, for a function that processes a batch on a device, from upload to results.

    On a CPU, each core processes its own batches. On a GPU, `LANES` threads do, each with a stream of its own: while
    one of them prepares a batch or waits for its results, the GPU runs the kernels of the others.

    Args:
        function: Called with each batch.
        batches: The batches.
        device: Device as torch names it.
        cost: See `map_ahead`.
        limit: See `map_ahead`.
    """
    with kernels_on_one_thread(device) as threads:
        initializer = None if device == "cpu" else functools.partial(_use_own_stream, device)
        yield from map_ahead(function, batches, threads, initializer, cost, limit)


def _use_own_stream(device: str) -> None:
    import torch

    torch.cuda.set_device(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())  # on which the networks are loaded
    torch.cuda.set_stream(stream)


@contextmanager
def kernels_on_one_thread(device: str) -> Iterator[int]:
    """Within the context, torch's kernels on the CPU run on one thread each.

    Args:
        device: Device as torch names it.

    Yields:
        The number of threads over which to distribute batches.
    """
    import torch

    if device != "cpu":
        yield LANES
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield thread_count()
    finally:
        torch.set_num_threads(before)
