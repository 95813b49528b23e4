# SPDX-License-Identifier: MIT
"""Many workers for one run: who does which shard, who waits for whom, and how workers are started.

Nothing outside this file knows about ranks. Shards are handed out one at a time by a counter that all workers share, so
a slow shard holds nobody up. A shard is done when its file exists; when a worker dies, torch's elastic launcher starts
all of them again, finished shards are skipped and the dead worker's shard is done by whoever asks first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_RESTARTS = 3


@dataclass(frozen=True)
class Worker:
    """One of `count` workers. `store` is torch's TCPStore, None for a worker that is alone."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None
    attempt: int = 0  # restarts so far: their counters start anew
    alone: Counter = field(default_factory=Counter)  # what the store counts, for a worker without one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def claim(self, stage: str, shards: int) -> Iterator[int]:
        """Shard numbers for this worker until all `shards` of the stage are given out."""
        if self.store is None:
            yield from range(shards)
            return
        while (shard := self.store.add(f"{self.attempt}/{stage}", 1) - 1) < shards:
            yield shard

    def count_done(self, stage: str, photos: int) -> int:
        """Adds `photos` to what all workers have done of the stage and returns the sum."""
        if self.store is not None:
            return self.store.add(f"{self.attempt}/{stage}/done", photos)
        self.alone[stage] += photos
        return self.alone[stage]

    def barrier(self, name: str) -> None:
        """Waits until every worker has come here; UserError when one has said that it will not (`fail`)."""
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
        """Tells the workers that wait, or will wait, at a barrier that this one will not come."""
        if self.store is not None:
            self.store.set(f"{self.attempt}/failed", f"worker {self.rank} stopped: {reason}")

    def share(self, begin: int, count: int) -> range:
        """This worker's part of the `count` numbers from `begin` on; all workers' parts, in order, are the whole."""
        return range(begin + count * self.rank // self.count, begin + count * (self.rank + 1) // self.count)

    @contextlib.contextmanager
    def collective(self, device: str) -> Iterator[None]:
        """Within it `sum` and torch.distributed work between the workers; a worker that is alone needs neither."""
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
        """The sum of all workers' tensors, in place; within `collective`."""
        if self.store is not None:
            from torch.distributed import all_reduce

            all_reduce(tensor)
        return tensor

    def device(self, kind: str) -> str:
        """ "cpu", or this worker's GPU as "cuda:0": one that all its threads name, whatever their current device is."""
        if kind == "cpu":
            return kind
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}"  # where each task sees one GPU alone, it is 0


def current() -> Worker:
    """This process's place, from the environment that torchrun or SLURM has set; alone without one."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, count, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        serve = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone: a batch script by itself is no worker
        rank, count, local = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
        host = _first_slurm_host(env["SLURM_STEP_NODELIST"])
        port = 20000 + int(env["SLURM_JOB_ID"]) % 20000
        serve = rank == 0
    else:
        return Worker()
    from torch.distributed import TCPStore

    store = TCPStore(host, port, count, serve, timedelta(minutes=5), wait_for_workers=False)
    return Worker(rank, count, local, store, int(env.get("TORCHELASTIC_RESTART_COUNT", 0)))


def _first_slurm_host(nodes: str) -> str:
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def count_gpus(asked: int | None, workers: int) -> int:
    """How many GPUs to use: as asked, or one if there is one and nobody asked for several CPU processes.

    Raises UserError when fewer are here than asked for, or both kinds of processes were.
    """
    import torch

    here = torch.cuda.device_count()
    if asked and workers > 1:
        raise UserError("give --gpus or --workers, not both: a process with a GPU is a worker")
    if asked is None:
        return min(here, 1) if workers == 1 else 0
    if asked > here:
        raise UserError(
            f"--gpus {asked}: this machine shows {here} CUDA device{'s' if here != 1 else ''} "
            "(see `namedmask doctor`); use --workers N for N processes on the CPU"
        )
    return asked


def launch(arguments: Sequence[str], workers: int) -> None:
    """Runs `python -m namedmask.run ARGUMENTS` in `workers` processes; returns when all have ended well.

    When one dies all are started again, up to MAX_RESTARTS times; then UserError says which died and how.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"namedmask-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "namedmask.run", *arguments)
    except SignalException:  # the launcher's form of Ctrl-C and SIGTERM; it has ended the workers
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        raise UserError(
            f"worker {rank} died ({how}), and did so again after {MAX_RESTARTS} restarts; finished shards are kept: "
            "run the same command again to go on, or with --workers 1 to see where it dies"
        ) from None


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that kill -9 of a run leaves no worker behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
