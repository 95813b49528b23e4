# SPDX-License-Identifier: MIT
"""Multiple workers of one run: distribution of shards, and synchronization.

All code that depends on ranks is in this file. Workers claim shards one at a time from a shared counter, so that a slow
shard does not delay the others. A shard is finished when its file exists. When a worker dies, torch's elastic launcher
restarts all workers; they skip finished shards, and one of them claims the shard of the worker that died.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from . import process
from .errors import UserError, counted, first_line

if TYPE_CHECKING:
    from torch import Tensor

CONNECT_WITHIN = timedelta(minutes=5)  # workers of a cluster start at different times


@dataclass(frozen=True)
class Worker:
    """One of the workers of a run. The default is a single worker.

    Attributes:
        rank: Index of the worker; the main worker has rank 0.
        count: Number of workers.
        local_rank: Index of the worker on its machine.
        store: torch's store, which all workers share; None for a single worker.
        attempt: Number of restarts so far. Each attempt has its own counters and barriers.
        counters: Photos done per stage, for a single worker.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None
    attempt: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def claim(self, stage: str, shards: int) -> Iterator[int]:
        """Yields the numbers of the shards that this worker should process.

        Args:
            stage: Name of the counter.
            shards: Number of shards. Each is claimed by one worker.
        """
        if self.store is None:
            yield from range(shards)
            return
        while (shard := self.store.add(f"{self.attempt}/{stage}", 1) - 1) < shards:
            yield shard

    def count_done(self, stage: str, photos: int) -> int:
        """Adds `photos` to the number of photos that all workers have done in the stage; returns the new number."""
        if self.store is not None:
            return self.store.add(f"{self.attempt}/{stage}/done", photos)
        self.counters[stage] += photos
        return self.counters[stage]

    def barrier(self, name: str) -> None:
        """Waits until every worker has reached the barrier of this name.

        Raises:
            UserError: If a worker has called `fail`.
        """
        if self.store is None:
            return
        from torch.distributed import DistStoreError

        key = f"{self.attempt}/barrier/{name}"
        if self.store.add(key, 1) == self.count:
            self.store.set(key + "/open", "1")
        while not self.store.check([key + "/open"]):
            if self.store.check([f"{self.attempt}/failed"]):
                raise UserError(self.store.get(f"{self.attempt}/failed").decode())
            with contextlib.suppress(DistStoreError):
                self.store.wait([key + "/open"], timedelta(seconds=5))

    def fail(self, reason: str) -> None:
        """Makes the other workers' barriers, current and later ones, raise a UserError with this reason."""
        if self.store is not None:
            text = f"worker {self.rank} stopped: {reason}"
            self.store.set(f"{self.attempt}/failed", text.encode(errors="backslashreplace"))  # names that are not UTF-8

    def share(self, begin: int, count: int) -> range:
        """This worker's part of range(begin, begin + count). The parts of all workers, in order, form the range."""
        return range(begin + count * self.rank // self.count, begin + count * (self.rank + 1) // self.count)

    @contextlib.contextmanager
    def collective(self, device: str) -> Iterator[None]:
        """Context in which `sum` and torch.distributed communicate between the workers; a no-op for a single worker.

        Args:
            device: "cpu", or this worker's GPU as torch names it.
        """
        if self.store is None:
            yield
            return
        import torch
        from torch import distributed

        if device != "cpu":
            torch.cuda.set_device(device)
        store = distributed.PrefixStore(f"{self.attempt}/collective", self.store)
        backend = "gloo" if device == "cpu" else "nccl"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor, in place, by the sum of all workers' tensors. Requires `collective`."""
        if self.store is not None:
            from torch.distributed import all_reduce

            all_reduce(tensor)
        return tensor

    def device(self, kind: str) -> str:
        """Device of this worker.

        Args:
            kind: "cpu" or "cuda".

        Returns:
            "cpu", or this worker's GPU such as "cuda:0". The index makes it independent of a thread's current device.
        """
        if kind == "cpu":
            return kind
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}"  # 0 if the scheduler shows each task only its GPU


def current() -> Worker:
    """The worker that this process is, from the environment variables of torchrun or SLURM; else a single worker.

    Raises:
        UserError: If a variable is missing or has no valid value, or the main worker cannot be reached.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        count = _number("WORLD_SIZE", 1)
        rank, local = _number("RANK", 0, count - 1), _number("LOCAL_RANK", 0, default=0)
        attempt = _number("TORCHELASTIC_RESTART_COUNT", 0, default=0)
        if "TORCHELASTIC_RUN_ID" in env:
            process.die_with(process.PARENT)
        if count == 1:
            return Worker(attempt=attempt)
        host, port = _text("MASTER_ADDR"), _number("MASTER_PORT", 1, 65535)
        serve = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    elif "SLURM_STEP_NUM_TASKS" in env and (count := _number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # Only srun sets it: a batch script is not a worker.
        rank, local, attempt = _number("SLURM_PROCID", 0, count - 1), _number("SLURM_LOCALID", 0), 0
        port = 20000 + _number("SLURM_JOB_ID", 0) % 20000
        host = _first_slurm_host(_text("SLURM_STEP_NODELIST"))
        serve = rank == 0
    else:
        return Worker()
    from torch.distributed import PrefixStore

    try:
        store = _connect(host, port, count, serve)
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        raise UserError(f"worker {rank} of {count} has no connection to {host}:{port}: {first_line(error)}") from None
    # A script may run several commands, one after the other; each has its own counters and barriers.
    return Worker(rank, count, local, PrefixStore(str(next(_COMMANDS)), store), attempt)


_COMMANDS = itertools.count()


@functools.cache
def _connect(host: str, port: int, count: int, serve: bool) -> Any:
    """torch's TCPStore, which lives as long as the process: the main worker may serve it."""
    from torch.distributed import TCPStore

    return TCPStore(host, port, count, serve, CONNECT_WITHIN, wait_for_workers=False)


def _text(name: str) -> str:
    """An environment variable of a launcher."""
    if not os.environ.get(name):
        starter, rank = ("srun", "SLURM_STEP_NUM_TASKS") if name.startswith("SLURM") else ("torchrun", "RANK")
        raise UserError(
            f"{rank} is set in the environment, but {name} is not: start all workers with {starter}, or unset {rank} "
            "to run alone"
        )
    return os.environ[name]


def _number(name: str, low: int, high: int = 2**31 - 1, default: int | None = None) -> int:
    """An environment variable of a launcher that holds an integer from `low` to `high`."""
    if default is not None and not os.environ.get(name):
        return default
    text = _text(name)
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise UserError(
            f"{name}={text!r} in the environment: expected an integer from {low} to {high}, as torchrun or srun sets "
            "it; unset it to run alone"
        )
    return int(text)


def _first_slurm_host(nodes: str) -> str:
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"`scontrol show hostnames {nodes}` failed: {first_line(error)}") from None


def count_gpus(requested: int | None, workers: int) -> int:
    """Number of GPUs to use.

    Args:
        requested: Number of GPUs that the user requested; None: one if there is one and `workers` is 1.
        workers: Number of processes on the CPU that the user requested.

    Raises:
        UserError: If there are fewer GPUs than requested, more workers than make sense, or if both options were given.
    """
    import torch

    from namedmask_kernels.threads import usable_cores

    available = torch.cuda.device_count()
    if workers > (limit := max(16, 4 * usable_cores())):
        cores = counted(usable_cores(), "core")
        raise UserError(f"--workers {workers}: use at most {limit} here; this process may use {cores}")
    if requested and workers > 1:
        raise UserError("give --gpus or --workers, not both: each GPU has its own worker")
    if requested is None:
        return min(available, 1) if workers == 1 else 0
    if requested > available:
        raise UserError(
            f"--gpus {requested}: this machine has {counted(available, 'CUDA device')} "
            "(see `namedmask doctor`); use --workers N for N processes on the CPU"
        )
    return requested


def warm_up(device: str) -> threading.Thread:
    """Creates the CUDA context of a GPU and loads cuBLAS in a thread, while the caller imports and loads models.

    Errors are left to the first use of the GPU by the caller.
    """

    def use() -> None:
        import torch

        with contextlib.suppress(RuntimeError):
            ones = torch.ones(16, 16, device=device)
            (ones @ ones).sum().item()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    return thread
